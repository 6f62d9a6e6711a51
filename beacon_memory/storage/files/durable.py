"""Write, rename and remove files of this machine so that a power cut cannot undo it: file and folder are synced.

What the machine refuses, for want of permission, room or open files, is raised as StoreError: it says nothing of what
is in a file.
"""

from __future__ import annotations

import os
from pathlib import Path

from beacon_memory.errors import StoreError

__all__ = ["entries", "identity", "make_folder", "move_into_place", "sync_file", "sync_folder", "unlink"]


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


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """List what is in a folder, sorted by name; [] if there is none. Raises StoreError if it cannot be listed."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"the folder {folder} cannot be read: {error.strerror}; see to its permissions") from error


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
