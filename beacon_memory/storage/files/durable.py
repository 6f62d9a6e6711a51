"""Write, rename and remove files of this machine so that a power cut cannot undo it: file and folder are synced.

What is made is private: files that only this user may read, in folders that only this user may enter. Only in a folder
that was there with wider rights, files and folders have the rights of that.

What the machine refuses, for want of permission, room or open files, is raised as StoreError: it says nothing of what
is in a file.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from beacon_memory.errors import CorruptFileError, StoreError

__all__ = [
    "create_file",
    "entries",
    "identity",
    "is_folder",
    "is_link",
    "is_there",
    "make_folder",
    "move_into_place",
    "refuse_links",
    "share_file",
    "status",
    "sync_file",
    "sync_folder",
    "unlink",
]


_lasting: set[tuple[Path, tuple[int, int] | None]] = set()  # folders whose names this process knows to be on disk


def make_folder(folder: Path, root: Path | None = None) -> None:
    """Create a folder and its parents, for this user alone, so that they outlast a power cut.

    root: a folder of ours, which may have wider rights: new folders below it have the same.

    One that exists is left as it is, but its name is synced, too, once in a process: who created it may not have come
    to it. Raises StoreError if it cannot be created.
    """
    folder = folder.absolute()
    if (folder, identity(folder)) in _lasting:
        return
    try:
        if not os.path.ismount(folder):
            make_folder(folder.parent, root)
            _make_lasting(folder, root)
    except OSError as error:
        raise StoreError(f"the folder {folder} cannot be created: {error.strerror}; name another store") from error
    _lasting.add((folder, identity(folder)))


def _make_lasting(folder: Path, root: Path | None) -> None:
    there = folder.is_dir()
    if not there:
        folder.mkdir(exist_ok=True, mode=0o700)
        if root is not None and root.absolute() in folder.parents and (rights := root.stat().st_mode & 0o2777) != 0o700:
            folder.chmod(rights)
    try:
        sync_folder(folder.parent)
    except PermissionError:
        if not there:  # else whoever may list the folder above has made this one
            raise


def create_file(path: Path) -> None:
    """Create an empty file, see `share_file`, unless there is one. Raises StoreError if it cannot be created."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        share_file(path)
    except FileExistsError:
        return
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}; see to space and permissions") from error


def share_file(path: Path) -> None:
    """Let those read and write a private file who may read and write its folder, unless all may, as in /tmp."""
    rights = path.parent.stat().st_mode
    if rights & 0o066 and not rights & stat.S_ISVTX:
        path.chmod(rights & 0o666)


def refuse_links(root: Path, folder: Path) -> None:
    """Raise CorruptFileError if `folder`, or one between it and `root`, is a link: it would lead out of the store."""
    for one in (folder, *folder.parents):
        if one == root:
            return
        if is_link(one):
            raise CorruptFileError(f"{one} is a link, which would lead out of the store; put a folder in its place")


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
    found = status(path)
    return (found.st_dev, found.st_ino) if found else None


def is_folder(path: Path) -> bool:
    """Tell whether a path leads to a folder; raises StoreError if it is out of reach."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_link(path: Path) -> bool:
    """Tell whether there is a link at a path; raises StoreError if it is out of reach."""
    found = status(path, follow=False)
    return found is not None and stat.S_ISLNK(found.st_mode)


def is_there(path: Path) -> bool:
    """Tell whether there is anything at a path, even a link that leads nowhere; raises StoreError as the others."""
    return status(path, follow=False) is not None


def status(path: Path, *, follow: bool = True) -> os.stat_result | None:
    """Return what the system says of a path, None if there is nothing; raises StoreError if it does not say.

    Use this and what is made of it in place of `pathlib`, which raises errors of the system or takes them for a no.
    """
    try:
        return path.stat(follow_symlinks=follow)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be reached: {error.strerror}; see to its permissions") from error


def sync_file(path: Path) -> None:
    """Wait until the bytes of a file are on disk; on POSIX also of one that may only be read."""
    _sync(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)


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
