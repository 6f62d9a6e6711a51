"""The files of a store in object storage, such as S3, behind a cache on this machine.

    <url>/.beacon-memory             the id of the one store that these files belong to
    <url>/kv/<folder>/<file>         an object for each file
    <cache>/kv/<folder>/<file>       the files that were used last, each with the time of its last use
    <cache>/kv/.tmp...               being written or uploaded
    <cache>/downloads/.tmp...        being downloaded

An object is seen whole or not at all, and a cached file is renamed into place, so no reader meets half a file. Any
number of threads and processes may share a cache. It can be deleted at any time: all of it is remote, but for what is
being published.

Needs obstore (the `remote` extra), which reads credentials, region and endpoint from the environment, in variables
AWS_..., GOOGLE_... or AZURE_...; AWS_ALLOW_HTTP=true allows a line without TLS.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from beacon_memory.errors import InputError, MissingDependencyError, StoreError

from .durable import make_folder, sync_file
from .local import FILE_NAME, TEMP_PREFIX, unlink

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

__all__ = ["RemoteFiles"]

_CLAIM = ".beacon-memory"

_PIECE_BYTES = 64 * 2**20  # asked for at a time: each piece has tries of its own
_CHUNK_BYTES = 2**20  # held in memory while downloading
_PART_BYTES = 5 * 2**20  # of an upload, the least that S3 takes
_MOST_PARTS = 10_000  # that S3 takes
_PARTS_AT_ONCE = 4  # held in memory while uploading; they share the uplink, and each must get through in read_timeout

# obstore repeats requests that fail or are answered 5xx, and goes on with the rest of a body that was cut or stalled
# while downloading. It does not repeat one whose short answer was cut (to list, to delete, to end an upload), which
# `_try` does. With these a server that is down is reported after about 10 s, and one that accepts and says nothing
# after about 3 minutes.
_RETRIES: RetryConfig = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 2},
}
_TRIES = 3
_PAUSE_SECONDS = 1.0
_STALE_SECONDS = 3600  # without a byte, after which nobody can still be downloading
_CLIENT = {"connect_timeout": "5s", "read_timeout": "60s", "timeout": "15m"}  # timeout: of a piece or part as a whole
# What users may set for the connection, as AWS_ALLOW_HTTP; obstore reads these only when it is given no client options
_CLIENT_KEYS = (*_CLIENT, "allow_http", "allow_invalid_certificates", "root_certificate", "proxy_url", "proxy_excludes")
_ENVIRONMENT = {"s3": "AWS_", "gcs": "GOOGLE_", "azure": "AZURE_"}

_Result = TypeVar("_Result")


class RemoteFiles:
    """Files in object storage; see Files. Network and server failures are repeated, then raise StoreError.

    url:         where they lie: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///folder, which
                 is not synced: a power cut may take what was published last
    cache:       a folder of this machine for the files of this url alone
    cache_bytes: what the cache may hold; the least recently used files give way, but for the one just published or
                 fetched. What is being written or downloaded comes on top.

    Raises InputError for a url that cannot be used, MissingDependencyError without obstore.
    """

    def __init__(self, url: str, cache: Path, cache_bytes: int) -> None:
        if cache_bytes < 0:
            raise InputError(f"cache_bytes is {cache_bytes}, but must be 0 or more")
        self._store = _open(url)
        self.url = url.rstrip("/")
        self.cache = cache
        self.cache_bytes = cache_bytes
        self._downloads = cache / "downloads"
        self._locks = tuple(threading.Lock() for _ in range(64))  # one for a name, shared by few others

    @property
    def staging(self) -> Path:
        """See Files; in the cache, where the file stays when it is published."""
        return self.cache / "kv"

    def claim(self, owner: str) -> None:
        """Reserve the url for the store whose id is `owner`; does nothing if it is already.

        Raises StoreError if it belongs to another store: each would take the other's files for its own leftovers.
        """
        holder = self._owner()
        if holder is None:
            self._try("claiming the url", functools.partial(self._create_claim, owner.encode()))
            holder = self._owner()  # another store may have been first
        if holder != owner.encode():
            raise StoreError(
                f"{self.url} belongs to another store ({(holder or b'').decode(errors='replace')!r}, and this is "
                f"{owner!r}): choose another url, or remove {self.url}/{_CLAIM} if that store is gone"
            )

    def publish(self, temp: Path, name: str, *, more: bool = False) -> None:  # noqa: ARG002  # lasts in any case
        """See Files; the file stays in the cache. Raises StoreError; the object is then the old one, or none.

        If only the last answer was lost, it may be the new one. A process that is killed meanwhile may leave parts of
        an upload in the bucket, unseen: let a lifecycle rule of the bucket remove those that were never completed.
        """
        try:
            path = self._path(name)
            part = max(_PART_BYTES, -(-temp.stat().st_size // _MOST_PARTS))
            put = functools.partial(self._store.put, chunk_size=part, max_concurrency=_PARTS_AT_ONCE)
            self._try(f"uploading {name}", lambda: put(name, temp))
            self._keep(temp, path)
        finally:
            unlink(temp)

    def fetch(self, name: str) -> Path:
        """See Files; downloads what is not in the cache. Raises FileNotFoundError or StoreError.

        Another thread or process may need the room before the caller opens the file: then fetch it again. One that is
        open stays readable.
        """
        path = self._path(name)
        if not _used(path):
            with self._locks[hash(name) % len(self._locks)]:
                if not _used(path):  # another thread may have fetched it by now
                    self._download(name, path)
        return path

    def remove(self, name: str) -> bool:
        """See Files."""
        path = self._path(name)
        try:
            self._try(f"removing {name}", functools.partial(self._delete, name))
        except StoreError:
            return False
        return unlink(path)

    def names(self) -> Iterator[str]:
        """See Files; leaves out objects that no store would name so. Raises StoreError."""
        yield from self._try("listing", self._list)

    def temps(self) -> Iterator[Path]:
        """See Files; what is being downloaded, for which nobody needs to write, is still somebody's."""
        yield from sorted(self.staging.glob(f"{TEMP_PREFIX}*"))
        for temp in sorted(self._downloads.glob(f"{TEMP_PREFIX}*")):
            with contextlib.suppress(FileNotFoundError):  # it has just come to its end
                if time.time() - temp.stat().st_mtime > _STALE_SECONDS:
                    yield temp

    def _path(self, name: str) -> Path:
        if not FILE_NAME.fullmatch(name):
            raise StoreError(f"{name!r} is no name of a store's file, as kv/0f/0f3a.safetensors would be; refused")
        return self.cache / name

    def _try(self, doing: str, act: Callable[[], _Result]) -> _Result:
        """What `act` returns, which can be repeated from its start. Raises StoreError if that does not help."""
        from obstore.exceptions import BaseError, GenericError, InvalidPathError

        tries = 0
        while True:
            try:
                return act()
            except (BaseError, OSError) as error:
                tries += 1
                if tries >= _TRIES or not isinstance(error, (GenericError, OSError)):
                    foreign = isinstance(error, InvalidPathError)
                    advice = "remove that object" if foreign else "check url, credentials and network, and try again"
                    raise StoreError(f"{self.url}: {doing} failed: {_cause(error)}; {advice}") from error
            time.sleep(_PAUSE_SECONDS)

    def _get(self, name: str, options: GetOptions) -> GetResult | None:
        """The answer to a request for an object, or None if there is no such object."""
        with contextlib.suppress(FileNotFoundError):
            return self._store.get(name, options=options)
        return None

    def _owner(self) -> bytes | None:
        """Who claimed the url."""

        def read() -> bytes | None:
            result = self._get(_CLAIM, {})
            return None if result is None else bytes(result.bytes())

        return self._try("asking whose it is", read)

    def _create_claim(self, owner: bytes) -> None:
        from obstore.exceptions import AlreadyExistsError

        with contextlib.suppress(AlreadyExistsError):  # perhaps by a try of ours whose answer was lost
            self._store.put(_CLAIM, owner, mode="create")

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._store.delete(name)

    def _list(self) -> list[str]:
        objects = (found for page in self._store.list("kv") for found in page)
        return sorted(found["path"] for found in objects if FILE_NAME.fullmatch(found["path"]))

    def _download(self, name: str, path: Path) -> None:
        make_folder(self._downloads)
        temp = self._downloads / f"{TEMP_PREFIX}-{secrets.token_hex(8)}"
        try:
            with temp.open("wb") as file:
                self._receive(name, file)
            sync_file(temp)  # or a power cut could leave an empty file under the name
            if not _used(path):  # what another process put there meanwhile is as new, or newer
                self._keep(temp, path)
        finally:
            unlink(temp)

    def _receive(self, name: str, file: BinaryIO) -> None:
        """Write an object into an empty file, piece by piece. Raises FileNotFoundError or StoreError."""
        size, version = 1, None  # until the first answer tells
        while (start := file.tell()) < size:
            meta = self._try(f"reading {name}", functools.partial(self._piece, name, file, start, version))
            if meta is None:
                raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.url}/{name}")
            size, version = meta["size"], meta["e_tag"]

    def _piece(self, name: str, file: BinaryIO, start: int, version: str | None) -> ObjectMeta | None:
        """Write the bytes from `start` on of that version of an object, or of any; None if there is no such object."""
        file.seek(start)
        file.truncate()  # what a try before left
        options: GetOptions = {"if_match": version} if version else {}
        if start:  # not at first, since an empty object has no range
            options["range"] = (start, start + _PIECE_BYTES)
        result = self._get(name, options)
        if result is None:
            return None
        stop = min(start + _PIECE_BYTES, result.meta["size"])
        for chunk in result.stream(_CHUNK_BYTES):
            file.write(chunk)
            if file.tell() >= stop:
                break
        if file.tell() < stop:
            raise OSError(f"the answer ended at byte {file.tell()} instead of {stop}")
        return result.meta

    def _keep(self, temp: Path, path: Path) -> None:
        """Take a file into the cache, and make room for it."""
        make_folder(path.parent)
        temp.replace(path)
        files = []
        for cached in self.cache.glob("kv/*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                status = cached.stat()
                files.append((status.st_mtime_ns, status.st_size, cached))
        held = sum(size for _, size, _ in files)
        for _, size, cached in sorted(files):
            if held <= self.cache_bytes:
                break
            if cached != path and unlink(cached):
                held -= size


def _open(url: str) -> ObjectStore:
    """The place that a url names; asks nothing of it yet."""
    try:
        from obstore import parse_scheme
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise MissingDependencyError(
            "a store in object storage needs obstore: pip install 'beacon-memory[remote]'"
        ) from error
    try:
        place = urlsplit(url)
        if place.password or place.query or place.fragment:  # not shown: they may be secrets
            raise InputError("the url of a store names a place only: give credentials in the environment")
        scheme = parse_scheme(url) if "://" in url else "none"
        if scheme == "local":
            return from_url(url, mkdir=True)
        if scheme == "memory":
            return from_url(url)
        if scheme in _ENVIRONMENT:
            names = {key: _ENVIRONMENT[scheme] + key.upper() for key in _CLIENT_KEYS}
            given = {key: os.environ[name] for key, name in names.items() if name in os.environ}
            return from_url(url, client_options=cast("ClientConfig", {**_CLIENT, **given}), retry_config=_RETRIES)
        raise ValueError("it names no object storage")
    except InputError:
        raise
    except (BaseError, OSError, ValueError) as error:
        example = "s3://bucket/prefix"
        raise InputError(
            f"url is {url!r}, which cannot be used: {_cause(error)}; give one such as {example}"
        ) from error


def _cause(error: Exception) -> str:
    """What obstore says of an error, without its rendering of the Rust object."""
    return str(error).partition("\n\nDebug source")[0].strip()


def _used(path: Path) -> bool:
    """Mark a cached file as used now; False if it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
