"""A call of the operating system fails, as if the disk were full or broken, or a file out of reach.

    failed = with_failing_call(lambda: work(folder), folder, number=7, seed=1)

Calls are followed as in `power_cuts`, so those of SQLite and safetensors fail like those of Python. A call counts if it
is of a file or folder in the given one. It fails with an error that the system may give for it, and has not happened;
only a file that was written to is closed, though an error says that it could not be.

Not made to fail: what a process does to memory, and writes through mmap.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crashing import system_calls
from power_cuts import ENTRY, EXIT, Call, memory_at, text_at

_GET_REGISTERS, _SET_REGISTERS = 12, 13  # of Linux' ptrace
_NUMBER, _RESULT = 15, 10  # where in the registers of x86_64 the number of a call stands, and its result
_FCNTL, _FLOCK = 72, 73
_LOCKS = {6, 7, 37, 38}  # what fcntl is asked for to set a lock
_UNLOCK_RECORD, _UNLOCK = b"\2\0", 8  # which does not fail
_CREATE = 0o100  # of open
_HERE = -100  # in place of an open folder: the current one


@dataclass(frozen=True)
class _Kind:
    """Calls of a kind: how they may fail, and where among what is given are paths, or the open file."""

    errors: Sequence[int]
    paths: Sequence[tuple[int | None, int]] = ()  # the open folder that it may be relative to, and the path
    file: int | None = None


_READ, _LOOK, _WRITE = (errno.EIO,), (errno.EACCES, errno.EIO), (errno.ENOSPC, errno.EIO)
_CHANGE = (errno.ENOSPC, errno.EACCES, errno.EIO)
_OPEN = (errno.EMFILE, errno.EACCES, errno.EIO)
_CALLS = {
    "open": ({2}, _Kind(_OPEN, [(None, 0)])),
    "openat": ({257}, _Kind(_OPEN, [(0, 1)])),
    "stat": ({4, 6, 21, 89}, _Kind(_LOOK, [(None, 0)])),  # stat, lstat, access, readlink
    "statat": ({262, 267, 269, 332, 439}, _Kind(_LOOK, [(0, 1)])),
    "name": ({76, 83, 84, 87, 90, 92}, _Kind(_CHANGE, [(None, 0)])),  # truncate, mkdir, rmdir, unlink, chmod, chown
    "nameat": ({258, 260, 263, 268, 280, 452}, _Kind(_CHANGE, [(0, 1)])),  # and utimensat
    "names": ({82, 86}, _Kind(_CHANGE, [(None, 0), (None, 1)])),  # rename, link
    "namesat": ({264, 265, 316}, _Kind(_CHANGE, [(0, 1), (2, 3)])),
    "read": ({0, 5, 17, 19, 217, 295}, _Kind(_READ, file=0)),  # and fstat, getdents64
    "write": ({1, 18, 20, 77, 285, 296}, _Kind(_WRITE, file=0)),  # and ftruncate, fallocate
    "rights": ({91, 93}, _Kind(_LOOK, file=0)),
    "sync": ({74, 75}, _Kind(_WRITE, file=0)),
    "copy": ({40, 326}, _Kind(_WRITE, file=0)),
    "map": ({9}, _Kind((errno.EACCES, errno.ENOMEM), file=4)),
    "lock": ({_FCNTL, _FLOCK}, _Kind((errno.ENOLCK, errno.EIO), file=0)),
    "close": ({3}, _Kind(_READ, file=0)),
}
_KINDS = {number: (name, kind) for name, (numbers, kind) in _CALLS.items() for number in numbers}


def with_failing_call(
    act: Callable[[], object], folder: Path, number: int, seed: int, only: tuple[str, str] = ("", "")
) -> str | None:
    """Run `act` in another process, in which the call of this number on files in `folder` fails; 1 is the first.

    only: count calls of this name on paths that end so.

    Returns which call failed, and how; None if it made fewer. Raises PermissionError if processes cannot be traced, and
    AssertionError if `act` raises.
    """
    if platform.machine() != "x86_64":
        raise PermissionError(f"the registers of a {platform.machine()} are not known")
    left, failed, error = number, None, 0
    try:
        for pid in system_calls(act):
            if failed and not error:
                continue
            call = Call.at(pid)
            if call.stop == ENTRY and (found := _described(pid, call, folder)):
                name, path, errors = found
                left -= name.startswith(only[0]) and path.endswith(only[1])
                if not left:
                    error = errors[seed % len(errors)]
                    failed = f"{name} of {path}: {os.strerror(error)}"
                    if name != "close":
                        _set(pid, _NUMBER, -1)
            elif call.stop == EXIT and error:
                _set(pid, _RESULT, -error)
                error = 0
    except AssertionError as ended:
        ended.add_note(f"after call {number} failed: {failed}")
        raise
    return failed


def _described(pid: int, call: Call, folder: Path) -> tuple[str, str, Sequence[int]] | None:
    """What a call is, on which file, and how it may fail; None if it is of no file in the folder."""
    if call.first not in _KINDS:
        return None
    name, kind = _KINDS[call.first]
    given = call.arguments
    if (name == "lock" and not _locks(pid, call)) or (name == "close" and not _writes(pid, given[0])):
        return None
    paths = [_path(pid, None if base is None else given[base], given[path]) for base, path in kind.paths]
    if kind.file is not None:
        paths.append(_open_file(pid, given[kind.file]))
    inside = [path for path in paths if path == str(folder) or path.startswith(f"{folder}/")]
    if not inside:
        return None
    creates = name.startswith("open") and given[2 if name == "openat" else 1] & _CREATE
    return name, inside[0], (*kind.errors, errno.ENOSPC) if creates else kind.errors


def _locks(pid: int, call: Call) -> bool:
    """Whether a call is for a lock to be taken."""
    if call.first == _FLOCK:
        return not call.arguments[1] & _UNLOCK
    return call.arguments[1] in _LOCKS and memory_at(pid, call.arguments[2], 2) != _UNLOCK_RECORD


def _writes(pid: int, number: int) -> bool:
    """Whether an open file is written to: closing it may tell that it could not be."""
    try:
        flags = int(Path(f"/proc/{pid}/fdinfo/{number}").read_text().split()[3], 8)
    except OSError:
        return False
    return bool(flags & os.O_ACCMODE)


def _path(pid: int, base: int | None, address: int) -> str:
    path = text_at(pid, address)
    if base is None or path.startswith("/"):
        return path
    number = ctypes.c_int32(base).value
    return "" if number == _HERE else f"{_open_file(pid, number)}/{path}".rstrip("/")


def _open_file(pid: int, number: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/fd/{ctypes.c_int32(number).value}").readlink())
    except OSError:
        return ""


def _set(pid: int, register: int, value: int) -> None:
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    registers = (ctypes.c_uint64 * 27)()
    if ptrace(_GET_REGISTERS, pid, None, ctypes.addressof(registers)):
        raise PermissionError("this system does not tell of registers")
    registers[register] = value & (1 << 64) - 1
    if ptrace(_SET_REGISTERS, pid, None, ctypes.addressof(registers)):
        raise PermissionError("this system does not let registers be changed")
