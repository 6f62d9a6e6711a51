"""How a store reads and writes its files: `LocalFiles` in its own folder, `CachedFiles` in a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from beacon_memory.errors import CorruptFileError

__all__ = ["Files", "read_file"]

_Read = TypeVar("_Read")


class Files(Protocol):
    """Give a store its files by name, each whole from the moment in which it is seen."""

    @property
    def staging(self) -> Path:
        """Return the folder of this machine in which files are written before they are published."""

    def make_staging(self) -> Path:
        """Create that folder if it is missing, and return it; raises StoreError."""

    def publish(self, temp: Path, name: str, *, more: bool = False) -> None:
        """Give a staged and synced file its name, durably; replaces the file that has it. Raises StoreError.

        more: another file is published into the same folder right after, and this one need not last until then.

        The staged file is gone afterwards, even if this fails.
        """

    def fetch(self, name: str) -> Path:
        """Return a path of this machine where a file can be read.

        Raises FileNotFoundError here or when the path is opened, CorruptFileError for what is no name of a file, and
        StoreError if a backend cannot be reached.
        """

    def refresh(self, name: str) -> bool:
        """Take a file that was found damaged from the backend again; returns False if it is nowhere but here.

        Raises as `fetch`.
        """

    def downloaded(self, names: Iterable[str], since: float) -> bool:
        """Tell whether one of these files had to be fetched from elsewhere; since: a time of time.monotonic."""

    def remove(self, name: str) -> bool:
        """Remove a file if it exists; returns False if it cannot be removed now. A power cut may bring it back."""

    def sync(self, names: Iterable[str]) -> None:
        """Wait until the removal of these files outlasts a power cut; raises StoreError."""

    def present(self, names: Iterable[str]) -> set[str]:
        """Return those of these names that there is something of."""

    def erase(self, names: Iterable[str]) -> None:
        """Remove files and all temporary ones, wherever they are, so that no power cut brings them back.

        Nobody may be writing. Raises StoreError if something is left.
        """

    def names(self) -> Iterator[str]:
        """Yield the names of all files, sorted."""

    def temps(self) -> Iterator[Path]:
        """Yield the temporary files that a crash left, provided that nobody is writing to the store."""


def read_file(files: Files, name: str, read: Callable[[Path], _Read]) -> _Read:
    """Read a file by its name; if a copy on this machine is damaged, the file that it was made of. Raises as `read`."""
    try:
        return read(files.fetch(name))
    except CorruptFileError:
        if not files.refresh(name):
            raise
    return read(files.fetch(name))
