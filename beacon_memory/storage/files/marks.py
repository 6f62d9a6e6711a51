"""Marks of new files: an empty file in the staging folder, from before a file is published until its row is committed.

A file with a mark and no row is what a crash left of a write, and may be removed. A file with neither has lost its row,
with the catalog for instance, and gets a new one. So a mark is on disk before its file gets its name, and goes only
when the row is, or when it is on disk that the file is gone: else a power cut could bring back what was never stored,
or was removed since.
"""

from __future__ import annotations

from pathlib import Path

from beacon_memory.errors import StoreError

from .access import Files
from .durable import make_folder, sync_folder
from .names import TEMP_PREFIX, number_of

__all__ = ["lay_mark", "mark_of", "sync_mark"]


def mark_of(files: Files, name: str) -> Path:
    """Return the path of the mark of a file, whether or not it exists."""
    return files.staging / f"{TEMP_PREFIX}-{number_of(name)}"


def lay_mark(files: Files, name: str) -> Path:
    """Create the mark of a new file, which `sync_mark` makes last; raises StoreError."""
    mark = mark_of(files, name)
    make_folder(mark.parent)
    try:
        mark.touch()
    except OSError as error:
        raise StoreError(f"{mark} cannot be written: {error.strerror}; see to space and permissions") from error
    return mark


def sync_mark(mark: Path) -> None:
    """Wait until a mark outlasts a power cut; raises StoreError.

    After the file was staged rather than before: its own sync has most often taken the mark along.
    """
    try:
        sync_folder(mark.parent)
    except OSError as error:
        raise StoreError(f"{mark} cannot be written: {error.strerror}; see to the disk") from error
