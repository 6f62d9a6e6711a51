"""The power is cut again and again while processes, some of them killed, work on a store.

What is acknowledged is there afterwards, and what was removed is not.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from crashing import mend
from power_cuts import Disk, Said, say
from workload import Operation, State, after, look, perform

from beacon_memory.storage.erasing import erase
from beacon_memory.storage.repair import verify
from beacon_memory.storage.store import MemoryStore

IDS = ("anna", "bela", "cora")
MORE_CUTS = 4
States = dict[str, State]


_CARE: Mapping[str, Callable[[MemoryStore], object]] = {
    "repair": mend,
    "erase": erase,
    "close": MemoryStore.close,
}


def seen(store: MemoryStore) -> States:
    """All documents of a store."""
    found = {row.id: look(store, row.id) for row in store.list()}
    return {id: state for id, state in found.items() if state}


def live(folder: Path, operations: Sequence[Operation], possible: Sequence[States]) -> None:
    """Do operations on a store, and say before and after each; first say in which of the possible states it is."""
    store = MemoryStore(folder)
    say(f"is {possible.index(seen(store))}")
    for number, operation in enumerate(operations):
        say(f"begin {number}")
        if operation[0] in _CARE:
            _CARE[operation[0]](store)
            say(f"kept {number}")
        else:
            say(f"done {number}" if perform(store, operation) else f"kept {number}")


class Expectation:
    """What may be in a store after each event that was recorded of it.

    What is acknowledged is on disk. What was begun may be, and may also be seen by the next process without being on
    disk, if the one before was killed.
    """

    def __init__(self, states: States) -> None:
        self.now = states
        self.possible = [states]
        self._since = [(0, [states])]
        self._read = 0

    def at(self, moment: int) -> list[States]:
        return self._since[bisect_right([since for since, _ in self._since], moment) - 1][1]

    def follow(self, disk: Disk, operations: Sequence[Operation]) -> None:
        """Read what a process has said since the last one."""
        for at, event in enumerate(disk.events[self._read :], self._read):
            if not isinstance(event, Said):
                continue
            word, number = event.word.split()
            if word == "is":
                self.now = self.possible[int(number)]
                continue
            then = after(self.now, operations[int(number)])
            if word == "begin" and then not in self.possible:
                self.possible = [*self.possible, then]
            elif word == "kept":
                assert then == self.now, f"{operations[int(number)]} was refused"
            elif word == "done" and then != self.now:
                self.now, self.possible = then, [then]
            # the event before is the last at which this had not been said
            self._since.append((at + (word != "begin"), self.possible))
        self._read = len(disk.events)


def some_operations(rng: random.Random) -> list[Operation]:
    def one() -> Operation:
        changes = ["put", "put", "replace", "append", "append", "update", "convert", "rename", "delete", "delete"]
        name = rng.choice([*changes, *_CARE])
        version = str(rng.getrandbits(50))
        more = {key: [version] for key in ("put", "replace", "append", "update")} | {"rename": [rng.choice(IDS)]}
        return [name, rng.choice(IDS), *more.get(name, [])]

    return [one() for _ in range(rng.randint(1, 4))]


def power_cuts(folder: Path, seed: int) -> int:
    """Let a few processes after each other work on a store, some killed, until the power fails; three times.

    Each time the power fails at several moments, of which one is what the next processes find. Returns how often.
    """
    rng, more = random.Random(seed), random.Random(f"more of {seed}")
    store_folder, states = folder / "store", {}
    for cut in range(3):
        disk, expected = Disk(store_folder), Expectation(states)
        for _ in range(rng.randint(1, 3)):
            operations = some_operations(rng)
            kill_after = rng.randint(1, 200) if rng.random() < 0.5 else None
            possible = expected.possible
            disk.record(lambda: live(store_folder, operations, possible), kill_after=kill_after)  # noqa: B023
            expected.follow(disk, operations)
        for _ in range(MORE_CUTS):
            cut_power(disk, expected, more, folder / "aside")
        store_folder, states = cut_power(disk, expected, rng, folder / f"store {cut}")
    return 3 * (1 + MORE_CUTS)


def cut_power(disk: Disk, expected: Expectation, rng: random.Random, folder: Path) -> tuple[Path, States]:
    """Leave in a folder what a power cut may leave at any moment, which must be a store; returns what it holds."""
    moment = rng.choice(disk.moments)
    with MemoryStore(disk.leave(moment, rng, folder)) as store:
        states = seen(store)
        assert states in expected.at(moment), f"{states} is none of {expected.at(moment)}"
        if rng.random() < 0.7:
            mend(store)
            assert seen(store) == states, f"{seen(store)} came of a repair, not {states}"
            assert verify(store) == []
    return folder, states
