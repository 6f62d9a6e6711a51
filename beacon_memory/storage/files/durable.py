"""Write, rename and remove files of this machine so that a power cut cannot undo it: file and folder are synced."""

from __future__ import annotations

import os
from pathlib import Path

from beacon_memory.errors import StoreError

__all__ = ["identity", "make_folder", "move_into_place", "sync_file", "sync_folder", "unlink"]


_lasting: set[tuple[Path, tuple[int, int] | None]] = set()  # folders whose names this process knows to be on disk


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, so that they outlast a power cut; raises StoreError if it cannot be created.

    The names of folders that exist are synced, too, once in a process: who created them may not have come to it.
    """
    folder = folder.absolute()
    if (folder, identity(folder)) in _lasting:
        return
    try:
        if not os.path.ismount(folder):
            make_folder(folder.parent)
            _make_lasting(folder)
    except OSError as error:
        raise StoreError(f"the folder {folder} cannot be created: {error.strerror}; name another store") from error
    _lasting.add((folder, identity(folder)))


def _make_lasting(folder: Path) -> None:
    there = folder.is_dir()
    if not there:
        folder.mkdir(exist_ok=True)
    try:
        sync_folder(folder.parent)
    except PermissionError:
        if not there:  # else whoever may list the folder above has made this one
            raise


def move_into_place(temp: Path, path: Path, *, more: bool = False) -> None:
    """Rename a synced temporary file, replacing the file of that name; raises StoreError.

    more: another file is moved into the same folder right after, so the folder is synced only then.

    Readers see the old file or the new one, whole. The temporary file is gone afterwards, even if this fails.
    """
    try:
        make_folder(path.parent)
        temp.replace(path)
        if not more:
            sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}; see to space and permissions") from error
    finally:
        unlink(temp)


def unlink(path: Path) -> bool:
    """Remove a file if it exists; returns False if it cannot be removed now."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of the file at a path, None if there is none; raises StoreError if it is out of reach."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be reached: {error.strerror}; see to its permissions") from error
    return status.st_dev, status.st_ino


def sync_file(path: Path) -> None:
    """Wait until the bytes of a file are on disk."""
    _sync(path, os.O_RDWR)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk, after a file was created, renamed or removed in it."""
    if os.name == "posix":  # elsewhere a folder cannot be opened, and a rename is durable by itself
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
