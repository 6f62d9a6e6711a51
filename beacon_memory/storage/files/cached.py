"""The files of a store in a backend, such as object storage, behind a cache on this machine.

    <cache>/kv/<folder>/<file>   the files that were used last, each with the time of its last use
    <cache>/kv/.tmp...           being written or uploaded
    <cache>/downloads/.tmp...    being downloaded

A cached file is renamed into place, so no reader meets half a file. Any number of threads and processes may share a
cache. It can be deleted at any time: the backend has all of it, except what is being published.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

from beacon_memory.errors import InputError, StoreError

from .backend import FilesBackend
from .durable import entries, identity, make_folder, refuse_links, sync_file, unlink
from .local import LocalFiles
from .names import EVERYWHERE, FILE_NAME, TEMP_PREFIX, check_name, new_temp, temps_in

__all__ = ["CachedFiles"]

_STALE_SECONDS = 3600  # without a byte, after which nobody can still be downloading
_MOST_NOTED = 10_000  # downloads whose time is known


class CachedFiles:
    """Keep files in a backend and a cache: `Files` that are read from this machine. Raises StoreError if that fails.

    cache:       a folder of this machine for the files of this backend alone
    cache_bytes: what the cache may hold; the least recently used files make room, except the one that was just
                 published or fetched. What is being written or downloaded comes on top, and what other processes have
                 added lately, up to a sixteenth each.
    """

    def __init__(self, backend: FilesBackend, cache: Path, cache_bytes: int) -> None:
        if cache_bytes < 0:
            raise InputError(f"cache_bytes is {cache_bytes}, but must be 0 or more")
        self.backend = backend
        self.cache = cache
        self.cache_bytes = cache_bytes
        self._downloads = cache / "downloads"
        self._noted: OrderedDict[str, float] = OrderedDict()  # when files were downloaded last, by time.monotonic
        self._room = 0  # bytes that this process may add before it looks what the cache holds
        self._locks = tuple(threading.Lock() for _ in range(64))  # one for a name, shared by few others

    @property
    def staging(self) -> Path:
        """Return the folder to write in: in the cache, where the file stays when it is published."""
        return self.cache / "kv"

    def make_staging(self) -> Path:
        """Create that folder if it is missing, and return it; raises StoreError."""
        return self._folder(self.staging)

    def claim(self, owner: str) -> None:
        """Reserve the backend's place for the store whose id is `owner`; does nothing if it is already.

        Raises StoreError if it belongs to another store: each would take the other's files for its own leftovers.
        """
        with self._reporting("claiming the url"):
            holder = self.backend.claim(owner)
        if holder != owner:
            raise StoreError(
                f"{self.backend.url} belongs to another store ({holder!r}, and this is {owner!r}): choose another url "
                f"or, if that store is gone, remove its claim, in a folder or bucket {self.backend.url}/.beacon-memory"
            )

    def publish(self, temp: Path, name: str, *, more: bool = False) -> None:  # noqa: ARG002  # lasts in any case
        """Upload a staged file, and keep it in the cache; raises StoreError, and the old file is still there then."""
        try:
            path = self._path(name)
            with self._reporting(f"uploading {name}"):
                self.backend.publish(temp, name)
                self._keep(temp, path)
        finally:
            unlink(temp)

    def fetch(self, name: str) -> Path:
        """Return the path of a cached file, which is downloaded if need be; raises FileNotFoundError or StoreError.

        Another thread or process may need the room before the caller opens the file: then fetch it again. One that is
        open stays readable.
        """
        path = self._path(name)
        if not _used(path):
            with self._locks[hash(name) % len(self._locks)]:
                if not _used(path):  # another thread may have fetched it by now
                    self._download(name, path)
        return path

    def refresh(self, name: str) -> bool:
        """Download a file whose cached copy is damaged; True. Raises as `fetch`, and the copy is still there then."""
        path = self._path(name)
        with self._locks[hash(name) % len(self._locks)]:
            self._download(name, path, identity(path))
        return True

    def downloaded(self, names: Iterable[str], since: float) -> bool:
        """Tell whether this process has downloaded one of these files; since: a time of time.monotonic."""
        return any(self._noted.get(name, -math.inf) >= since for name in names)

    def remove(self, name: str) -> bool:
        """Remove a file from backend and cache; returns False if it cannot be removed now."""
        with contextlib.suppress(StoreError, OSError):
            path = self._path(name)
            self.backend.remove(name)
            return unlink(path)
        return False

    def sync(self, names: Iterable[str]) -> None:
        """Wait until the backend has made the removal of these files durable."""
        with self._reporting("syncing"):
            self.backend.sync(names)

    def present(self, names: Iterable[str]) -> set[str]:
        """Return those of these names that the backend has."""
        return set(names) & set(self.names()) if names else set()

    def erase(self, names: Iterable[str]) -> None:
        """Remove files from the backend, what its uploads left there, and all of this machine that it does not have.

        Whoever is downloading a file begins again.
        """
        with self._reporting("erasing"):
            left = [name for name in self.backend.names() if name.rpartition("/")[2].startswith(TEMP_PREFIX)]
            for name in [*names, *left]:
                self.backend.remove(name)
            self.backend.sync([*EVERYWHERE, *left])
        for temp in temps_in(self._downloads):  # first: what is renamed from here now is in the cache
            unlink(temp)
        there, cached = set(self.names()), LocalFiles(self.cache)
        cached.erase([name for name in cached.names() if name not in there])

    def names(self) -> Iterator[str]:
        """Yield the names of all files, sorted; leaves out what no store would name so."""
        with self._reporting("listing"):
            found = sorted(name for name in self.backend.names() if FILE_NAME.fullmatch(name))
        yield from found

    def temps(self) -> Iterator[Path]:
        """Yield what a crash left; a download takes no lock of a writer, so a recent one may still be going on."""
        for folder in (self.staging, self._downloads):
            refuse_links(self.cache.parent, folder)
        yield from temps_in(self.staging)
        yield from temps_in(self._downloads, idle=_STALE_SECONDS)

    @contextlib.contextmanager
    def _reporting(self, doing: str, but: tuple[type[OSError], ...] = ()) -> Iterator[None]:
        """Turn an OSError of the backend, `but` these, into a StoreError that says where and while doing what."""
        try:
            yield
        except but:
            raise
        except OSError as error:
            raise StoreError(f"{self.backend.url}: {doing} failed: {error}; see to the place, and try again") from error

    def _path(self, name: str) -> Path:
        """Return the path that a file has in the cache; raises CorruptFileError as `fetch` does."""
        path = self.cache / check_name(name)
        refuse_links(self.cache.parent, path.parent)
        return path

    def _folder(self, folder: Path) -> Path:
        """Create a folder of the cache if it is missing, and return it; raises StoreError."""
        refuse_links(self.cache.parent, folder)
        make_folder(folder, self.cache.parent)
        return folder

    def _download(self, name: str, path: Path, damaged: tuple[int, int] | None = None) -> None:
        """Download a file; it takes the place of the `damaged` one that is cached, if there is one."""
        temp = new_temp(self._folder(self._downloads))
        try:
            with self._reporting(f"reading {name}", but=(FileNotFoundError,)):
                self.backend.fetch(name, temp)
                sync_file(temp)  # or a power cut could leave an empty file under the name
                if identity(path) in (None, damaged):  # what another process put there meanwhile is as new, or newer
                    self._keep(temp, path)
            self._noted[name] = time.monotonic()
            self._noted.move_to_end(name)
            if len(self._noted) > _MOST_NOTED:
                self._noted.popitem(last=False)
        finally:
            unlink(temp)

    def _keep(self, temp: Path, path: Path) -> None:
        """Move a file into the cache, and make room for it."""
        self._folder(path.parent)
        self._room -= temp.stat().st_size  # of threads that count at once, one may be lost: looking finds it
        temp.replace(path)
        if self._room < 0:
            self._room = self._make_room(path)

    def _make_room(self, newest: Path) -> int:
        """Remove what was not used for longest, if there is too much; returns how many bytes may be added now.

        That is a sixteenth of the cache at most, so that it is not looked through for each file.
        """
        files = []
        for folder in entries(self.staging):
            for cached in entries(Path(folder.path)) if folder.is_dir(follow_symlinks=False) else ():
                with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                    status = cached.stat()
                    files.append((status.st_mtime_ns, status.st_size, Path(cached.path)))
        held, share = sum(size for _, size, _ in files), self.cache_bytes // 16
        if held > self.cache_bytes:
            for _, size, path in sorted(files):
                if held <= self.cache_bytes - share:
                    break
                if path != newest and unlink(path):
                    held -= size
        return min(self.cache_bytes - held, share)


def _used(path: Path) -> bool:
    """Note that a cached file is used now, if that may be noted; returns False if it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # of a cache that this user may only read
        return identity(path) is not None
    return True
