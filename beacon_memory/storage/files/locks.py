"""Locks of a store: many may write at a time, and one that tidies up is alone.

The lock is the operating system's, on a file, so it is gone with the process that held it, however that ended. Locks
between threads live in memory, which a forked process inherits without the threads that would release them.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import portalocker

from beacon_memory.errors import StoreError

from .durable import identity, make_folder

__all__ = ["alone", "looking", "renew_in_forks", "tidying", "writing"]

_FILE = "writers.lock"
_TIDY_SECONDS = 10.0  # how long to wait for writers to finish
_WRITE_SECONDS = 120.0  # how long to wait for one that tidies up, which lists files and removes some
_CHECK_SECONDS = 0.02


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


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the shared lock of writers, from before a file is staged until its row is committed: nobody tidies up."""
    with _locked(folder / _FILE, portalocker.LockFlags.SHARED, _WRITE_SECONDS, f"{folder} is being repaired"):
        yield


@contextlib.contextmanager
def tidying(folder: Path) -> Iterator[None]:
    """Hold the lock alone, so that nobody writes: a file that no row names now will never have one.

    Raises StoreError if writers leave no gap for 10 seconds.
    """
    with _locked(folder / _FILE, portalocker.LockFlags.EXCLUSIVE, _TIDY_SECONDS, f"{folder} is being written to"):
        yield


@contextlib.contextmanager
def looking(folder: Path) -> Iterator[None]:
    """Hold the lock of `tidying` without leaving anything behind where nothing may be written.

    A store that was never written to by this version, in such a folder, has no lock, and is looked at without.
    """
    path = folder / _FILE
    there = identity(path) is not None
    if os.access(path if there else folder, os.W_OK):
        with tidying(folder):
            yield
    elif there:
        with _locked(path, portalocker.LockFlags.EXCLUSIVE, _TIDY_SECONDS, f"{folder} is being written to", mode="r"):
            yield
    else:
        yield


@contextlib.contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock on a file alone; `what` begins the error if others hold it for more than 120 seconds."""
    with _locked(path, portalocker.LockFlags.EXCLUSIVE, _WRITE_SECONDS, what):
        yield


@contextlib.contextmanager
def _locked(
    path: Path, kind: portalocker.LockFlags, seconds: float, what: str, mode: Literal["a", "r"] = "a"
) -> Iterator[None]:
    make_folder(path.parent)
    flags = kind | portalocker.LockFlags.NON_BLOCKING
    lock = portalocker.Lock(path, mode, timeout=seconds, check_interval=_CHECK_SECONDS, flags=flags)
    try:
        lock.acquire()
    except portalocker.LockException as error:
        raise StoreError(f"{what} for more than {seconds:.0f} s; try again when that is done") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error.strerror}; a store must be writable") from error
    try:
        yield
    finally:
        lock.release()
