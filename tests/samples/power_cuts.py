"""What a power cut may leave of a folder: the real calls of a process are recorded, and replayed with losses.

    disk = Disk(folder)  # all that is there now is on disk
    disk.record(lambda: work(folder))  # in a process whose system calls are followed, those of SQLite among them
    for moment in disk.moments:
        disk.leave(moment, random.Random(1), other)  # as the folder may look if the power fails then

The model is that of POSIX, which promises less than any file system in use:

* The bytes of a file are on disk when it was synced. Of what was written since, each page of 4096 bytes, and now and
  then each sector of 512 in it, is as it was at some moment since; so is the length, and what lies below it and was
  never written is zeros. A file that was cut keeps its old bytes until that is on disk.
* The names in a folder are on disk when the folder was synced. Of names made, moved and removed since, any selection is
  on disk; only changes of the same name keep their order. Syncing a file does not make its name last, nor does syncing
  a folder that of the folder itself.
* A rename is all or nothing, also between folders.

Not in the model: bytes that change on the disk by themselves, a disk that lies about syncs, writes through mmap (SQLite
shares its index of the log so, which is of no use after a cut and is left out), and threads of the recorded process.
"""

from __future__ import annotations

import ctypes
import os
import platform
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from crashing import system_calls

PAGE, SECTOR = 4096, 512
_LEFT_OUT = "-shm"
ENTRY, EXIT = 1, 2  # where a process is stopped
_SYSCALL_INFO = 0x420E  # of Linux' ptrace
_SAID = "/said/"  # begins the path that a process asks for to say a word

# The calls that are followed, by what has to be looked at: names; the bytes of the open file that is their first or
# third argument; which file is synced; what is said.
_CALLS = {
    "x86_64": {
        "names": {2, 82, 83, 84, 85, 86, 87, 88, 257, 258, 263, 264, 265, 266, 316},  # open to renameat2
        "bytes": {1, 18, 20, 40, 77, 285, 296, 328},  # write, pwrite64, writev, sendfile, ftruncate, fallocate, pwritev
        "bytes of third": {326},  # copy_file_range
        "sync": {74, 75},
        "thread": {56, 435},
        "asks": {21, 269, 439},  # access, faccessat, faccessat2
    },
    "aarch64": {
        "names": {33, 34, 35, 36, 37, 38, 56, 276},
        "bytes": {46, 47, 64, 66, 68, 70, 71, 287},
        "bytes of third": {285},
        "sync": {82, 83},
        "thread": {220, 435},
        "asks": {48, 439},
    },
}
_ACCESS = 21 if platform.machine() == "x86_64" else None  # the one whose first argument is the path
_KINDS = {number: kind for kind, numbers in _CALLS.get(platform.machine(), {}).items() for number in numbers}

Place = tuple[int, str]  # a folder, by its number, and a name in it


@dataclass(frozen=True)
class Bytes:
    """A file has become so long, and these sectors of it are new."""

    file: int
    size: int
    sectors: Mapping[int, bytes]
    cut: bool


@dataclass(frozen=True)
class Names:
    """Names were given to files and folders, or taken away: all of these at once."""

    places: Mapping[Place, int | None]


@dataclass(frozen=True)
class Sync:
    """What was done to a file or folder before this is on disk."""

    node: int


@dataclass(frozen=True)
class Said:
    """The process has said something, see `say`."""

    word: str


Event = Bytes | Names | Sync | Said


def say(word: object) -> None:
    """Let whoever records this process know how far it is."""
    os.access(f"{_SAID}{word}", os.F_OK)


class Disk:
    """A folder, and all that was done to it since it was on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[Event] = []
        self._numbers: dict[tuple[int, int], int] = {}
        self._count = 0
        self._folders: set[int] = set()
        self._names: dict[Place, int] = {}
        self._bytes: dict[int, bytes] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._root = self._number_of(folder.stat())
        self._folders.add(self._root)
        self._look_at_names()
        self.events.clear()
        self._first_names, self._first_bytes = dict(self._names), dict(self._bytes)

    @property
    def moments(self) -> range:
        """The moments at which the power may fail: after so many events."""
        return range(len(self.events) + 1)

    def record(self, act: Callable[[], object], *, kill_after: int | None = None) -> bool:
        """Run `act` in another process and note what it does to the folder; False if it was killed before its end.

        kill_after: events after which the process is killed. Raises PermissionError if processes cannot be traced.
        """
        if not _KINDS:
            raise PermissionError(f"the system calls of a {platform.machine()} are not known")
        most = None if kill_after is None else len(self.events) + kill_after
        kind, arguments = "", tuple[int, ...]()
        with closing(system_calls(act)) as stops:
            for pid in stops:
                call = Call.at(pid)
                if call.stop == ENTRY:
                    kind, arguments = _KINDS.get(call.first, ""), call.arguments
                    asked = text_at(pid, arguments[call.first != _ACCESS]) if kind == "asks" else ""
                    if asked.startswith(_SAID):
                        self.events.append(Said(asked.removeprefix(_SAID)))
                elif call.stop == EXIT and kind and call.first < 1 << 63:
                    self._note(pid, kind, arguments)
                if most is not None and len(self.events) >= most:
                    return False
        return True

    def leave(self, moment: int, rng: random.Random, target: Path) -> Path:
        """Write into `target` what a power cut at a moment may leave of the folder; returns it."""
        past = self.events[:moment]
        names = dict(self._first_names)
        for change in _kept_names(past, rng):
            for place, node in change.places.items():
                if node is None:
                    names.pop(place, None)
                else:
                    names[place] = node
        shutil.rmtree(target, ignore_errors=True)
        self._write(self._root, names, past, rng, target)
        return target

    def _write(
        self, folder: int, names: Mapping[Place, int], past: list[Event], rng: random.Random, target: Path
    ) -> None:
        target.mkdir()
        for (above, name), node in sorted(names.items()):
            if above != folder:
                continue
            if node in self._folders:
                self._write(node, names, past, rng, target / name)
            else:
                (target / name).write_bytes(_kept_bytes(self._first_bytes.get(node, b""), node, past, rng))

    def _note(self, pid: int, kind: str, arguments: tuple[int, ...]) -> None:
        if kind == "names":
            self._look_at_names()
        if kind in ("names", "asks"):
            return
        if kind == "thread":
            raise AssertionError("the recorded process starts threads or processes, which nobody follows")
        path = Path(f"/proc/{pid}/fd/{arguments[2 if kind == 'bytes of third' else 0]}")
        number = self._numbers.get(_identity(path.stat()))
        if number is None:  # of no file in the folder
            return
        if kind == "sync":
            self.events.append(Sync(number))
        else:
            self._look_at_bytes(number, path)

    def _number_of(self, status: os.stat_result) -> int:
        known = self._numbers.get(_identity(status))
        if known is None:
            known = self._numbers[_identity(status)] = self._count
            self._count += 1
        return known

    def _look_at_names(self) -> None:
        """Note which names are not as they were, and what is in files that are new or were cut."""
        found = dict(self._found(self.folder, self._root))
        gone = set(self._names.values()) - set(found.values())
        changed = dict.fromkeys(self._names.keys() - found.keys()) | {
            place: node for place, node in found.items() if self._names.get(place) != node
        }
        if changed:
            self.events.append(Names(changed))
        self._names = found
        self._numbers = {one: number for one, number in self._numbers.items() if number not in gone}
        paths = self._paths()
        for node in set(found.values()) - self._folders:
            self._look_at_bytes(node, paths[node])

    def _found(self, path: Path, number: int) -> Iterator[tuple[Place, int]]:
        for entry in os.scandir(path):
            if entry.name.endswith(_LEFT_OUT):
                continue
            node = self._number_of(entry.stat(follow_symlinks=False))
            yield (number, entry.name), node
            if entry.is_dir(follow_symlinks=False):
                self._folders.add(node)
                yield from self._found(Path(entry.path), node)

    def _paths(self) -> dict[int, Path]:
        above = {node: place for place, node in self._names.items()}

        def path(node: int) -> Path:
            return self.folder if node == self._root else path(above[node][0]) / above[node][1]

        return {node: path(node) for node in above}

    def _look_at_bytes(self, file: int, path: Path) -> None:
        old, new = self._bytes.get(file, b""), path.read_bytes()
        if old == new:
            self._bytes.setdefault(file, new)
            return
        sectors = {
            start: new[start : start + SECTOR]
            for start in range(0, len(new), SECTOR)
            if new[start : start + SECTOR] != old[start : start + SECTOR]
        }
        self.events.append(Bytes(file, len(new), sectors, len(new) < len(old)))
        self._bytes[file] = new


@dataclass(frozen=True)
class Call:
    """Where a process was stopped: at the entry of a call with this number, or at its exit with this result."""

    stop: int
    first: int
    arguments: tuple[int, ...]

    @classmethod
    def at(cls, pid: int) -> Call:
        info = (ctypes.c_uint64 * 11)()
        ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        if ptrace(_SYSCALL_INFO, pid, ctypes.sizeof(info), ctypes.addressof(info)) < 0:
            raise PermissionError("this system does not tell of system calls")
        return cls(info[0] & 0xFF, info[3], tuple(info[4:10]))


def memory_at(pid: int, address: int, size: int) -> bytes:
    """The bytes that stand in the memory of a process at an address."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(size)


def text_at(pid: int, address: int) -> str:
    """The text that stands in the memory of a process at an address, a path for instance."""
    found = b""
    while address and b"\0" not in found:  # to the end of a page at a time, behind which there may be nothing
        at = address + len(found)
        found += memory_at(pid, at, min(256, PAGE - at % PAGE))
    return os.fsdecode(found.partition(b"\0")[0])


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _kept_names(past: list[Event], rng: random.Random) -> list[Names]:
    """Choose which changes of names are on disk: those that were synced, and of the others what chance wants."""
    changes = [(at, event) for at, event in enumerate(past) if isinstance(event, Names)]
    synced = {event.node: at for at, event in enumerate(past) if isinstance(event, Sync)}
    forced = {at for at, change in changes if any(at < synced.get(folder, 0) for folder, _ in change.places)}
    match rng.choice(["all", "none", "in order", "some", "some", "few", "most", "no removals", "removals"]):
        case "in order":  # as file systems with a journal do it
            last = max((at for at, event in enumerate(past) if isinstance(event, Sync)), default=0)
            last = rng.randint(last, len(past))
            kept = {at for at, _ in changes if at < last}
        case "no removals":
            kept = {at for at, change in changes if None not in change.places.values()}
        case "removals":
            kept = {at for at, change in changes if set(change.places.values()) == {None}}
        case how:
            share = {"all": 1.0, "none": 0.0, "few": 0.1, "some": 0.5, "most": 0.9}[how]
            kept = {at for at, _ in changes if rng.random() < share}
    kept |= forced
    needed: set[Place] = set()  # whatever changed before a place whose later change is kept
    for at, change in reversed(changes):
        if at in kept or needed & change.places.keys():
            kept.add(at)
            needed |= change.places.keys()
    return [change for at, change in changes if at in kept]


def _kept_bytes(data: bytes, file: int, past: list[Event], rng: random.Random) -> bytes:
    """Choose which bytes of a file are on disk."""
    synced = max((at for at, event in enumerate(past) if event == Sync(file)), default=0)
    since: list[Bytes] = []
    for at, change in enumerate(past):
        if isinstance(change, Bytes) and change.file == file:
            if at < synced:
                data = _changed(data, change)
            else:
                since.append(change)
    length = rng.choice([0, len(since), rng.randint(0, len(since))])  # up to which change the length is on disk
    size = since[length - 1].size if length else len(data)
    # what was written behind a cut that is not on disk is lost
    last = next((at for at, change in enumerate(since) if change.cut and at >= length), len(since))
    unit = SECTOR if rng.random() < 0.2 else PAGE
    how = rng.choice(["none", "all", "some"])
    until: dict[int, int] = {}  # up to which change each page is on disk
    for at, change in enumerate(since[:last]):
        sectors = change.sectors
        if not change.cut:
            for page in {start // unit for start in sectors} - until.keys():
                until[page] = {"none": 0, "all": last}.get(how, rng.randint(0, last))
            sectors = {start: sector for start, sector in sectors.items() if at < until[start // unit]}
        longest = max([start + len(sector) for start, sector in sectors.items()], default=0)
        data = _changed(data, Bytes(file, change.size if change.cut else max(len(data), longest), sectors, change.cut))
    return data[:size].ljust(size, b"\0")


def _changed(data: bytes, change: Bytes) -> bytes:
    new = bytearray(data[: change.size].ljust(change.size, b"\0"))
    for start, sector in change.sectors.items():
        new[start : start + len(sector)] = sector
    return bytes(new)
