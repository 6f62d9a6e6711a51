"""Marks of new files: an empty file in the staging folder, from before a file is published until its row is committed.

A file with a mark and no row is what a crash left of a write, and may be removed. A file with neither has lost its row,
with the catalog for instance, and gets a new one. So a mark is on disk before its file gets its name, and goes only
when the row is, or when it is on disk that the file is gone: else a power cut could bring back what was never stored,
or was removed since.

So it is with labels: one that is newer than its row, and has no mark, has been committed, and the row was lost.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from beacon_memory.errors import StoreError

from .access import Files
from .durable import create_file, sync_folder
from .names import TEMP_PREFIX, number_of, temps_in

__all__ = ["lay_label_mark", "lay_mark", "mark_of", "marked_labels", "sync_mark"]


def mark_of(files: Files, name: str) -> Path:
    """Return the path of the mark of a file, whether or not it exists."""
    return files.staging / f"{TEMP_PREFIX}-{number_of(name)}"


def lay_mark(files: Files, name: str) -> Path:
    """Create the mark of a new file, which `sync_mark` makes last; raises StoreError."""
    files.make_staging()
    mark = mark_of(files, name)
    create_file(mark)
    return mark


def lay_label_mark(files: Files, name: str) -> Path:
    """Create a mark of the label of a K/V file, beside those of others who are changing it; raises StoreError."""
    files.make_staging()
    mark = mark_of(files, name)
    mark = mark.with_name(f"{mark.name}-{secrets.token_hex(4)}")
    create_file(mark)
    return mark


def marked_labels(files: Files) -> set[str]:
    """Return the numbers of the K/V files whose labels somebody has marked; raises StoreError."""
    names = (temp.name.removeprefix(f"{TEMP_PREFIX}-").split("-") for temp in temps_in(files.staging))
    return {number for number, *suffix in names if suffix}


def sync_mark(mark: Path) -> None:
    """Wait until a mark outlasts a power cut; raises StoreError.

    After the file was staged rather than before: its own sync has most often taken the mark along.
    """
    try:
        sync_folder(mark.parent)
    except OSError as error:
        raise StoreError(f"{mark} cannot be written: {error.strerror}; see to the disk") from error
