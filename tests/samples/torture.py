"""Random work on a store whose process is killed and whose power fails, again and again.

    python tests/samples/torture.py --minutes 10 --seed 1

Each round begins with a seed of its own, counted up from the one given; one that fails is printed, and repeated by
`--seed` alone. A new kind of fault is one more function in ROUNDS, of an empty folder and a seed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from in_memory import folder_in_memory
from power_cuts import Disk, Said, say
from workload import Operation, State, after, look, perform

from beacon_memory.storage.erasing import erase
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

IDS = ("anna", "bela", "cora")
LEFT_BY_CRASHES = {"orphan-file", "stale-temp", "stale-label"}
States = dict[str, State]


def mend(store: MemoryStore) -> None:
    """Repair a store in which there must be nothing but what crashes leave."""
    found = repair(store)
    assert {problem.kind for problem in found} <= LEFT_BY_CRASHES, found
    assert all(problem.mended for problem in found), found


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
        name = rng.choice(["put", "put", "replace", "update", "convert", "rename", "delete", "delete", *_CARE])
        version = str(rng.getrandbits(50))
        more = {"put": [version], "replace": [version], "update": [version], "rename": [rng.choice(IDS)]}
        return [name, rng.choice(IDS), *more.get(name, [])]

    return [one() for _ in range(rng.randint(1, 4))]


def power_cuts(folder: Path, seed: int) -> None:
    """Let a few processes after each other work on a store, some killed, until the power fails; three times."""
    rng = random.Random(seed)
    store_folder, states = folder / "store", {}
    for cut in range(3):
        disk, expected = Disk(store_folder), Expectation(states)
        for _ in range(rng.randint(1, 3)):
            operations = some_operations(rng)
            kill_after = rng.randint(1, 200) if rng.random() < 0.5 else None
            possible = expected.possible
            disk.record(lambda: live(store_folder, operations, possible), kill_after=kill_after)  # noqa: B023
            expected.follow(disk, operations)
        moment = rng.choice(disk.moments)
        store_folder = disk.leave(moment, rng, folder / f"store {cut}")
        with MemoryStore(store_folder) as store:
            states = seen(store)
            assert states in expected.at(moment), f"{states} is none of {expected.at(moment)}"
            if rng.random() < 0.7:
                mend(store)
                assert seen(store) == states, f"{seen(store)} came of a repair, not {states}"
                assert verify(store) == []


ROUNDS: Mapping[str, Callable[[Path, int], None]] = {"power cuts": power_cuts}


def run(name: str, seed: int) -> None:
    """Run one round in a folder of its own, in memory where there is some."""
    folder = folder_in_memory()
    try:
        ROUNDS[name](folder, seed)
    except BaseException as error:
        error.add_note(f"in the round of {name} with seed {seed}")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Run rounds of each kind in turn until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0, help="how long to go on; 0: one round of each kind")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the first round")
    given = parser.parse_args()
    torch.set_num_threads(1)
    end, seed = time.monotonic() + 60 * given.minutes, given.seed
    while True:
        for name in ROUNDS:
            run(name, seed)
        if time.monotonic() > end:
            break
        seed += 1
    sys.stdout.write(f"seeds {given.seed} to {seed}: nothing was lost, and nothing came back\n")


if __name__ == "__main__":
    main()
