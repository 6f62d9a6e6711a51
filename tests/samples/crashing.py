"""Processes that are killed in the middle of what they do, and all that can be seen of a store afterwards.

Processes are forked: whatever a test has imported and made is there, and a kill costs milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import xxhash

import beacon_memory
from beacon_memory.errors import DocumentNotFoundError
from beacon_memory.storage.repair import repair
from beacon_memory.storage.store import MemoryStore

Act = Callable[[MemoryStore], object]

LEFT_BY_CRASHES = {"orphan-file", "stale-temp", "stale-label"}  # kinds of problems

_PACKAGE = str(Path(beacon_memory.__file__).parent)
_SECONDS = 120  # after which a process that should have ended hangs
_TRACE_ME, _TO_SYSTEM_CALL, _SET_OPTIONS = 0, 24, 0x4200  # of Linux' ptrace
_TELL_APART, _DIE_WITH_US = 1, 0x100000  # its options
_SYSTEM_CALL = signal.SIGTRAP | 0x80  # told apart from other signals
_UNTRACED = 77


def fork(act: Callable[[], object]) -> int:
    """Start a process that runs `act` and ends, with status 1 and a traceback if it raises; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        act()
        status = 0
    except BaseException:  # noqa: BLE001  # whatever it is, this process ends here
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def wait(pid: int, seconds: float = _SECONDS) -> int:
    """How a forked process ended: its exit status, or minus the signal that killed it."""
    deadline = time.monotonic() + seconds
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"process {pid} hangs")
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(found[1])


def on_each_line(act: Callable[[], object], see: Callable[[int], object]) -> int:
    """Run `act`, calling `see` with 1, 2, ... before each line of the package that it runs; returns how many."""
    step = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal step
        if event == "call" and not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        if event == "line":
            step += 1
            see(step)
        return trace

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
    return step


def killed_at(step: int, folder: Path, act: Act) -> bool:
    """Whether a process that runs `act` on a store was killed right before a step; otherwise it finished before."""

    def see(now: int) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)

    status = wait(fork(lambda: on_each_line(lambda: act(MemoryStore(folder)), see)))
    assert status in (0, -signal.SIGKILL), f"step {step}: status {status}"
    return status != 0


def changing_steps(folder: Path, act: Act) -> tuple[list[int], int]:
    """Run `act` on a store: before which steps its files are not as before the step ahead, and how many steps it has.

    All that a killed process leaves are files. So whoever kills at these steps has seen what a kill at any step does.
    """
    steps: list[int] = []
    last = _digest(folder)

    def see(step: int) -> None:
        nonlocal last
        if (now := _digest(folder)) != last:
            steps.append(step)
            last = now

    store = MemoryStore(folder)
    count = on_each_line(lambda: act(store), see)
    store.close()
    return steps, count


def copies_between(folder: Path, act: Act, copy: Path) -> Iterator[Path]:
    """Run `act` on a store in another process; yields a copy of its folder whenever a system call has changed a file.

    So it would look if the process were killed then. Linux only; raises PermissionError if processes cannot be traced.
    """
    last = _digest(folder)
    for _ in system_calls(lambda: act(MemoryStore(folder))):
        if (now := _digest(folder)) != last:
            yield copied(folder, copy)
            last = now


def system_calls(act: Callable[[], object]) -> Iterator[int]:
    """Run `act` in another process, which is stopped whenever it enters or leaves the operating system; yields its id.

    Whoever ends the iteration early kills it. Linux only; raises PermissionError if processes cannot be traced.
    """
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

    def traced() -> None:
        if ptrace(_TRACE_ME, 0, None, None):
            os._exit(_UNTRACED)
        os.kill(os.getpid(), signal.SIGSTOP)
        act()

    pid = fork(traced)
    status = 0
    try:
        while os.WIFSTOPPED(status := os.waitpid(pid, 0)[1]):
            number = os.WSTOPSIG(status)
            if number == _SYSTEM_CALL:
                yield pid
            elif number == signal.SIGSTOP:
                ptrace(_SET_OPTIONS, pid, None, _TELL_APART | _DIE_WITH_US)
            ptrace(_TO_SYSTEM_CALL, pid, None, 0 if number in (_SYSTEM_CALL, signal.SIGSTOP) else number)
    finally:
        if os.WIFSTOPPED(status):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if (code := os.waitstatus_to_exitcode(status)) == _UNTRACED:
        raise PermissionError("processes cannot be traced here")
    assert code == 0, f"the traced process ended with {code}"


def copied(template: Path, folder: Path) -> Path:
    """A copy of a store's folder, or none if there is none, in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    if template.exists():
        shutil.copytree(template, folder)
    return folder


def everything(folder: Path) -> dict[tuple[str, str], object]:
    """All documents and conversations of all namespaces: under namespace and id, what must survive, to compare.

    Row, header, K/V, text and full-text index are of one version, or this fails.
    """
    with MemoryStore(folder) as store:
        return {(name, id): seen for name in store.namespaces() for id, seen in _documents(store, name)}


def mend(store: MemoryStore) -> None:
    """Repair a store in which there must be nothing but what crashes leave."""
    found = repair(store)
    assert {problem.kind for problem in found} <= LEFT_BY_CRASHES, found
    assert all(problem.mended for problem in found), found


def seen(store: MemoryStore, id: str) -> object:
    """What must survive of a document, to compare; None if it is not there."""
    try:
        found = store.get(id)
        text = store.text(id)
    except DocumentNotFoundError:
        assert id not in store
        return None
    row, header = found.row, found.header
    assert (row.id, row.content_hash, row.fingerprint) == (id, header.content_hash, header.fingerprint.digest)
    found_by_words = {hit.document for hit in store.search(text.split()[0], 1000)}
    assert id in found_by_words
    row = replace(row, file="", segments=(), updated_at="", used_at=0)
    kv = [getattr(found.kv, name) for name in ("keys", "values", "positions", "counts")]
    tensors = [(str(one.dtype), tuple(one.shape), xxhash.xxh3_128_hexdigest(one.float().numpy())) for one in kv]
    return asdict(row), asdict(header), text, tensors


def _documents(whole: MemoryStore, namespace: str) -> Iterator[tuple[str, object]]:
    with MemoryStore(whole.root, namespace) as store:
        for row in store.list():
            yield row.id, seen(store, row.id)
        for id in store.conversations.ids():
            conversation = store.conversations.get(id)
            assert conversation is not None
            yield f"conversation {id}", replace(conversation, updated_at="")
        listed = {row.id for row in store.list()}
        assert {hit.document for hit in store.search(" ".join(f"word{n}" for n in range(40)), 1000)} == listed


def _digest(folder: Path) -> str:
    """Of the names and contents of all files that outlive a process."""
    hasher = xxhash.xxh3_128()
    for path in sorted(folder.rglob("*")):
        if not path.name.endswith("-shm"):  # of no use without the processes that share it
            hasher.update(str(path).encode())
            if path.is_file():
                hasher.update(path.read_bytes())
    return hasher.hexdigest()
