"""A folder as a files backend, such as one on another drive: file:///mnt/drive/notes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from beacon_memory.errors import InputError

from .durable import identity, is_link, make_folder, refuse_links, sync_file, unlink
from .local import LocalFiles
from .names import new_temp, temps_in

__all__ = ["FolderBackend"]

_CLAIM = ".beacon-memory"
_STALE_SECONDS = 3600  # after which nobody can still be copying without having written a byte


class FolderBackend:
    """Keep files in a folder, created when it is first written to; a `FilesBackend`.

        <url>/.beacon-memory     the id of the store that these files belong to
        <url>/kv/<folder>/<file> the files

    Raises InputError for a URL that is not of the form file:///folder.
    """

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        if place.scheme != "file" or place.netloc or not place.path.startswith("/") or place.query or place.fragment:
            raise InputError(f"url is {url!r}, which names no folder; give one such as file:///mnt/drive/notes")
        self.url = url.rstrip("/")
        self.folder = Path(url2pathname(place.path))
        self._files = LocalFiles(self.folder)

    def within(self, folder: str) -> FolderBackend:
        """Return the backend of a folder in this one."""
        return FolderBackend(f"{self.url}/{folder}")

    def claim(self, owner: str) -> str:
        """Reserve the folder for a store unless one has reserved it already; returns the id of the one that has it."""
        path = self.folder / _CLAIM
        make_folder(self.folder)
        self._sweep()
        if not identity(path):
            temp = new_temp(self.folder)
            try:
                temp.write_text(owner, encoding="utf-8")
                sync_file(temp)
                with contextlib.suppress(FileExistsError):  # another store may be first
                    os.link(temp, path)
            finally:
                unlink(temp)
            self._files.sync([_CLAIM])
        return path.read_text(encoding="utf-8", errors="replace")

    def publish(self, source: Path, name: str) -> None:
        """Copy a file into the folder, synced before it is renamed."""
        temp = new_temp(self._files.make_staging())
        try:
            shutil.copyfile(source, temp)
            sync_file(temp)
            self._files.publish(temp, name)
        finally:
            unlink(temp)

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file out of the folder; raises FileNotFoundError."""
        shutil.copyfile(self._files.fetch(name), target)

    def read(self, name: str, start: int, length: int) -> bytes:
        """Read a part of a file; raises FileNotFoundError."""
        with self._files.fetch(name).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        path = self.folder / name
        refuse_links(self.folder, path.parent)
        path.unlink(missing_ok=True)

    def sync(self, names: Iterable[str]) -> None:
        """Sync the folders of removed files."""
        self._files.sync(names)

    def names(self) -> Iterator[str]:
        """Yield the names of all files, and of those that an upload which was killed left."""
        yield from self._files.names()
        for temp in self._files.temps():
            yield temp.relative_to(self.folder).as_posix()

    def _sweep(self) -> None:
        """Remove what killed processes left of files that they were copying."""
        if not is_link(self._files.staging):
            for temp in temps_in(self._files.staging, idle=_STALE_SECONDS):
                unlink(temp)
