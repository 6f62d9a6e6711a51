"""Folders and files that a power cut cannot take away again: what is created is synced, and so is its folder."""

from __future__ import annotations

import os
from pathlib import Path

from beacon_memory.errors import StoreError

__all__ = ["make_folder", "sync_file", "sync_folder"]


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; one that exists is left as it is. Raises StoreError if it cannot be created."""
    try:
        if folder.is_dir():
            return
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
    except OSError as error:
        raise StoreError(f"the folder {folder} cannot be created: {error.strerror}; name another store") from error


def sync_file(path: Path) -> None:
    """Return when the bytes of a file are on disk."""
    _sync(path, os.O_RDWR)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on disk, after a file was created, renamed or removed in it."""
    if os.name == "posix":  # elsewhere a folder cannot be opened, and a rename is durable by itself
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
