"""The door for storage of your own: a `FilesBackend`, found by the scheme of a URL.

A package brings a backend with an entry point in the group `beacon_memory.files`. Its name is the scheme, its value
what is called with the URL and returns the backend:

    [project.entry-points."beacon_memory.files"]
    sqlite = "my_package:SQLiteFiles"

Then `MemoryStore(folder, files="sqlite:///home/me/files")` keeps its K/V files there.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from beacon_memory.errors import InputError, MissingDependencyError

__all__ = ["GROUP", "FilesBackend", "check_scheme", "open_backend", "url_of", "within"]

GROUP = "beacon_memory.files"

_OBJECT_STORAGE = "beacon_memory.storage.files.remote:ObjectStorage"
_BUILT_IN = (
    EntryPoint("file", "beacon_memory.storage.files.folder:FolderBackend", GROUP),
    *(
        EntryPoint(scheme, _OBJECT_STORAGE, GROUP)
        for scheme in ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "https", "memory")
    ),
)


class FilesBackend(Protocol):
    """Keep the files of a store in a place of its own. Provisional: methods may change until version 1.0.

    The store adds the rest: it checks the names, keeps files that were used last in a cache on this machine, and makes
    sure that a file is complete before anything names it. A name is such as kv/0f/0f3a-0123456789ab.safetensors. Files
    are up to gigabytes large, and several threads may call a backend at a time.

    Methods raise FileNotFoundError where said so, and StoreError or OSError for whatever else fails; then nothing has
    changed, or the change can be repeated.
    """

    @property
    def url(self) -> str:
        """Return the URL of the place, which the store remembers, without secrets: sqlite:///home/me/files."""

    def within(self, folder: str) -> FilesBackend:
        """Return a backend for a place apart in this one, its URL being `<url>/<folder>`; each namespace has one."""

    def claim(self, owner: str) -> str:
        """Reserve the place for a store unless one has reserved it already; returns the id of the one that has it.

        Of several that claim a place at once, all are told the same one.
        """

    def publish(self, source: Path, name: str) -> None:
        """Copy a file of this machine to a name; readers see the old file or the new one, whole.

        When this returns, the file outlasts a power cut.
        """

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file into a new file of this machine; raises FileNotFoundError."""

    def read(self, name: str, start: int, length: int) -> bytes:
        """Read a part of a file: `length` bytes, at least one, from offset `start`; raises FileNotFoundError.

        The part lies within the file.
        """

    def remove(self, name: str) -> None:
        """Remove a file, so that nothing of it is left in the place; does nothing if there is none."""

    def sync(self, names: Iterable[str]) -> None:
        """Wait until the removal of these files outlasts a power cut; some of the names no file may ever have had."""

    def names(self) -> Iterable[str]:
        """List the names of all files, in any order. Others that lie in the place may be among them.

        What an upload that was killed left is removed by `erase` if it is listed, and its name begins with .tmp.
        """


def url_of(files: FilesBackend | str) -> str:
    """Return the URL of a backend, or a URL itself, without a slash at its end."""
    return (files if isinstance(files, str) else files.url).rstrip("/")


def within(files: FilesBackend | str, folder: str) -> FilesBackend | str:
    """Return the backend, or its URL, of a folder in another one."""
    return f"{files.rstrip('/')}/{folder}" if isinstance(files, str) else files.within(folder)


def check_scheme(url: str) -> None:
    """Raise InputError if no installed backend has the scheme of a URL; says which ones there are."""
    if "://" not in url:
        raise InputError(f"files={url!r} must be a URL such as s3://bucket/prefix")
    if _scheme(url) not in _known():
        raise InputError(f"files={url!r} cannot be used: {_advice(url)}")


def open_backend(url: str) -> FilesBackend:
    """Return the backend that a URL names.

    Raises MissingDependencyError if it is not installed, InputError if it cannot use the URL.
    """
    entry = _known().get(_scheme(url))
    if entry is None:
        raise MissingDependencyError(
            f"the files of this store are in {url}: {_advice(url)}, or pass the backend: MemoryStore(folder, files=...)"
        )
    try:
        make = entry.load()
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(
            f"the files backend {entry.value} for {entry.name}:// cannot be imported: {error}; install it anew"
        ) from error
    backend: FilesBackend = make(url)
    return backend


def _scheme(url: str) -> str:
    return urlsplit(url).scheme


def _known() -> dict[str, Any]:
    """Return the entry point of each scheme; nobody replaces a built-in one."""
    return {entry.name: entry for entry in (*entry_points(group=GROUP), *_BUILT_IN)}


def _advice(url: str) -> str:
    return (
        f"no backend for {_scheme(url)}:// is installed, only for {', '.join(sorted(_known()))}; install a package "
        f"with an entry point {_scheme(url)!r} in the group {GROUP}"
    )
