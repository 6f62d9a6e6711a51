"""Locks of a store: many may write at a time, and one that tidies up is alone.

The lock is the operating system's, on a file, so it is gone with the process that held it, however that ended. Locks
between threads live in memory, which a forked process inherits without the threads that would release them.

Whoever begins to write passes through a gate, which is another lock. One that tidies up closes it while it waits for
those who are writing: however many they are, and though each begins before the others have ended, it gets its turn.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import portalocker

from beacon_memory.errors import StoreError

from .durable import create_file, identity, make_folder, unlink

__all__ = [
    "MOMENT_SECONDS",
    "PATIENT_SECONDS",
    "TIDY_SECONDS",
    "WRITE_SECONDS",
    "FolderLocks",
    "Locks",
    "alone",
    "claimed",
    "looking",
    "renew_in_forks",
    "tidying",
    "waited",
    "writing",
]

_FILE, _GATE = "writers.lock", "gate.lock"
MOMENT_SECONDS = 1.0  # for which the gate is closed at a time: an upload may take minutes, and others shall write
PATIENT_SECONDS = 30.0  # after which it stays closed
TIDY_SECONDS = 120.0  # how long to wait then for writers to finish
WRITE_SECONDS = 120.0  # how long to wait for one that tidies up, which lists files and removes some
_CHECK_SECONDS = 0.02


class Locks(Protocol):
    """The locks of a namespace of a store, which all share who write to it."""

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Hold the shared lock of writers, from before a file is staged until its row is committed: nobody tidies up.

        A thread may hold it several times.
        """

    def tidying(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock alone, so that nobody writes: a file that no row names now will never have one.

        Raises StoreError if a writer does not end within two minutes.
        """

    def looking(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of `tidying` without leaving anything behind where nothing may be written."""

    def alone(self, name: str, what: str) -> contextlib.AbstractContextManager[None]:
        """Hold a lock of this name alone; `what` begins the error if others hold it for more than 120 seconds."""


class FolderLocks:
    """The locks of a namespace in a folder of one machine; `Locks`, whose names are paths below the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Hold the shared lock of writers."""
        return writing(self._folder)

    def tidying(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock alone."""
        return tidying(self._folder)

    def looking(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of `tidying`, where it can be.

        A store that was never written to by this version, in a folder where nothing may be written, has no lock, and is
        looked at without.
        """
        return looking(self._folder)

    def alone(self, name: str, what: str) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of a file alone, see `alone`."""
        return alone(self._folder / name, what)


class _Renewable(Protocol):
    def _renew(self) -> None: ...


_renewables: weakref.WeakSet[_Renewable] = weakref.WeakSet()


def renew_in_forks(one: _Renewable) -> None:
    """Call `one._renew()` in each process that is forked from this one, before anything else happens there."""
    _renewables.add(one)


def _renew_all() -> None:
    for one in _renewables:
        one._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)


_held = threading.local()  # the folders that a thread is writing in


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the shared lock of writers; see `Locks.writing`."""
    folders: set[Path] = _held.__dict__.setdefault("folders", set())
    if folder in folders:
        yield
        return
    with contextlib.ExitStack() as held:
        with _locked(folder / _GATE, portalocker.LockFlags.SHARED, WRITE_SECONDS, f"{folder} is being repaired"):
            held.enter_context(
                _locked(folder / _FILE, portalocker.LockFlags.SHARED, WRITE_SECONDS, f"{folder} is being repaired")
            )
        folders.add(folder)
        held.callback(folders.remove, folder)
        yield


@contextlib.contextmanager
def tidying(folder: Path) -> Iterator[None]:
    """Hold the lock alone; see `Locks.tidying`."""
    busy = f"{folder} is being written to"
    patient = time.monotonic() + PATIENT_SECONDS
    while True:
        last = time.monotonic() >= patient
        with _locked(folder / _GATE, portalocker.LockFlags.EXCLUSIVE, TIDY_SECONDS, busy):
            seconds = TIDY_SECONDS if last else min(MOMENT_SECONDS, TIDY_SECONDS)
            lock = _acquired(folder / _FILE, portalocker.LockFlags.EXCLUSIVE, seconds)
            if lock is not None:
                try:
                    yield
                finally:
                    lock.release()
                return
        if last:
            raise waited(busy, TIDY_SECONDS)
        time.sleep(MOMENT_SECONDS)


@contextlib.contextmanager
def looking(folder: Path) -> Iterator[None]:
    """Hold the lock of `tidying` without leaving anything behind; see `FolderLocks.looking`."""
    path = folder / _FILE
    if all(os.access(one if identity(one) else folder, os.W_OK) for one in (path, folder / _GATE)):
        with tidying(folder):
            yield
    elif identity(path):
        with _locked(path, portalocker.LockFlags.EXCLUSIVE, TIDY_SECONDS, f"{folder} is being written to", mode="r"):
            yield
    else:
        yield


@contextlib.contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock on a file alone; `what` begins the error if others hold it for more than 120 seconds.

    The file is there only while somebody holds the lock, or waits for it.
    """
    with _alone(path, WRITE_SECONDS) as held:
        if not held:
            raise waited(what, WRITE_SECONDS)
        yield


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold the lock of `alone` on a file, if nobody else does now; yields whether it is held."""
    with _alone(path, 0.0) as held:
        yield held


@contextlib.contextmanager
def _alone(path: Path, seconds: float) -> Iterator[bool]:
    patient = time.monotonic() + seconds
    while True:
        lock = _acquired(path, portalocker.LockFlags.EXCLUSIVE, max(0.0, patient - time.monotonic()))
        if lock is None or _is_at(lock, path):
            break
        lock.release()  # who held it before has removed the file, and others may have made a new one
    try:
        yield lock is not None
    finally:
        try:
            with contextlib.suppress(StoreError):  # then a file stays that nobody holds: what was done is done
                if lock is not None and _is_at(lock, path):
                    unlink(path)
        finally:
            if lock is not None:
                lock.release()


def _is_at(lock: portalocker.Lock, path: Path) -> bool:
    """Tell whether a lock is on the file that is at a path now."""
    status = os.fstat(lock.fh.fileno()) if lock.fh else None
    return status is not None and identity(path) == (status.st_dev, status.st_ino)


@contextlib.contextmanager
def _locked(
    path: Path, kind: portalocker.LockFlags, seconds: float, what: str, mode: Literal["a", "r"] = "a"
) -> Iterator[None]:
    lock = _acquired(path, kind, seconds, mode)
    if lock is None:
        raise waited(what, seconds)
    try:
        yield
    finally:
        lock.release()


def _acquired(
    path: Path, kind: portalocker.LockFlags, seconds: float, mode: Literal["a", "r"] = "a"
) -> portalocker.Lock | None:
    """Return the lock on a file; None if others hold it for so long. Raises StoreError if there can be no such file."""
    if mode == "a":
        make_folder(path.parent)
        create_file(path)
    flags = kind | portalocker.LockFlags.NON_BLOCKING
    lock = portalocker.Lock(path, mode, timeout=seconds, check_interval=_CHECK_SECONDS, flags=flags)
    try:
        lock.acquire()
    except portalocker.LockException:
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error.strerror}; a store must be writable") from error
    return lock


def waited(what: str, seconds: float) -> StoreError:
    """Return the error of one who has waited for so long."""
    return StoreError(f"{what} for more than {seconds:.0f} s; try again when that is done")
