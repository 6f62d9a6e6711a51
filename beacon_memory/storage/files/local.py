"""Where the files of a store lie, by name: in a folder, or in object storage (`remote.py`).

A name is a path below the store with forward slashes. Whoever publishes under a name that is taken replaces the file
at once: readers see the old file or the new one, whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from beacon_memory.errors import CorruptFileError, StoreError

from .durable import make_folder, sync_folder

__all__ = [
    "FILE_NAME",
    "TEMP_PREFIX",
    "Files",
    "LocalFiles",
    "file_stem",
    "hash_id",
    "identity",
    "lay_mark",
    "mark_of",
    "number_of",
    "unlink",
]

# What a store calls its files. Nothing else that a catalog or a bucket names becomes a path of this machine.
FILE_NAME = re.compile(r"kv/\w[\w-]{0,63}/\w[\w.-]{0,199}", re.ASCII)
TEMP_PREFIX = ".tmp"  # safetensors names its own temporary files so, too: one pattern finds what a crash left


class Files(Protocol):
    """Named files that are whole from the moment in which they can be seen."""

    @property
    def staging(self) -> Path:
        """The folder on this machine in which to write what is to be published, under names from TEMP_PREFIX on."""

    def publish(self, temp: Path, name: str, *, more: bool = False) -> None:
        """Give a staged and synced file its name, durably. `temp` is gone afterwards, also if this fails.

        more: others are published into its folder right after; it need not last until the last of them does.
        """

    def fetch(self, name: str) -> Path:
        """A path of this machine where the file can be read; raises FileNotFoundError, or StoreError for no name."""

    def remove(self, name: str) -> bool:
        """Remove a file; one that is gone already is fine. False if it could not be, which `verify` finds again."""

    def names(self) -> Iterator[str]:
        """The names of all files."""

    def temps(self) -> Iterator[Path]:
        """Temporary files that are nobody's, given that nobody is writing to the store."""


class LocalFiles:
    """Files below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def staging(self) -> Path:
        """See Files; on the disk where the files will lie, since they are renamed."""
        return self.folder / "kv"

    def publish(self, temp: Path, name: str, *, more: bool = False) -> None:
        """See Files."""
        path = self.folder / name
        try:
            make_folder(path.parent)
            temp.replace(path)
            if not more:
                sync_folder(path.parent)
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror}; see to space and permissions") from error
        finally:
            unlink(temp)

    def fetch(self, name: str) -> Path:
        """See Files."""
        return self._path(name)  # whoever opens it learns whether it is there

    def remove(self, name: str) -> bool:
        """See Files."""
        return bool(FILE_NAME.fullmatch(name)) and unlink(self.folder / name)

    def _path(self, name: str) -> Path:
        if not FILE_NAME.fullmatch(name):  # a catalog that somebody else made may name any file of the machine
            raise CorruptFileError(f"{name!r} is no name of a store's file, such as kv/0f/0f3a.safetensors; refused")
        return self.folder / name

    def names(self) -> Iterator[str]:
        """See Files."""
        for path in sorted(self.folder.glob("kv/*/*")):
            if not path.name.startswith(TEMP_PREFIX):
                yield path.relative_to(self.folder).as_posix()

    def temps(self) -> Iterator[Path]:
        """See Files."""
        yield from sorted(self.staging.rglob(f"{TEMP_PREFIX}*"))


def hash_id(id: str) -> str:
    """What stands for an id, which is any text, in the name of a file or folder."""
    return hashlib.sha256(id.encode()).hexdigest()[:32]


def file_stem(id: str) -> str:
    """What the names of all files of a document begin with, followed by a hyphen."""
    return f"kv/{hash_id(id)[:2]}/{hash_id(id)}"


def number_of(name: str) -> str:
    """What tells the files of a document apart: the last 12 characters of a name in front of its ending."""
    return name.rpartition(".")[0][-12:]


def identity(path: Path) -> tuple[int, int] | None:
    """Which file a path leads to, None if to none; raises StoreError if it cannot be followed."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be reached: {error.strerror}; see to its permissions") from error
    return status.st_dev, status.st_ino


def mark_of(files: Files, name: str) -> Path:
    """What lies there until a new file has its row; a file with neither mark nor row is one whose row was lost.

    It need not outlive the machine: a file whose mark a power cut took becomes a document, and whole it is.
    """
    return files.staging / f"{TEMP_PREFIX}-{number_of(name)}"


def lay_mark(files: Files, name: str) -> Path:
    """Lay the mark of a new file; raises StoreError."""
    mark = mark_of(files, name)
    make_folder(mark.parent)
    try:
        mark.touch()
    except OSError as error:
        raise StoreError(f"{mark} cannot be written: {error.strerror}; see to space and permissions") from error
    return mark


def unlink(path: Path) -> bool:
    """Remove a file that nothing names; False if that cannot be done now."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
