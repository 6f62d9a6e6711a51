"""Marks of new files: an empty file in the staging folder, from before a file is published until its row is committed.

A file with a mark and no row is what a crash left of a write, and may be removed. A file with neither has lost its row,
with the catalog for instance, and gets a new one. Marks are not synced: if a power cut takes one, the file beside it is
taken for a document that has lost its row. That is safe, since a file is only published when it is complete.

So it is with labels: one that is newer than its row, and has no mark, has been committed, and the row was lost.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from .access import Files
from .durable import create_file, entries
from .names import TEMP_PREFIX, number_of

__all__ = ["has_label_mark", "lay_label_mark", "lay_mark", "mark_of"]


def mark_of(files: Files, name: str) -> Path:
    """Return the path of the mark of a file, whether or not it exists."""
    return files.staging / f"{TEMP_PREFIX}-{number_of(name)}"


def lay_mark(files: Files, name: str) -> Path:
    """Create the mark of a new file; raises StoreError."""
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


def has_label_mark(files: Files, name: str) -> bool:
    """Tell whether somebody has marked the label of a K/V file; raises StoreError."""
    mark = mark_of(files, name)
    return any(one.name.startswith(f"{mark.name}-") for one in entries(mark.parent))
