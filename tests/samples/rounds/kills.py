"""Processes that work on one store are killed at any moment, some while they repair, erase or export it.

What they acknowledged is there afterwards, and of what each was doing when it died, all or nothing.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from crashing import LEFT_BY_CRASHES, fork, mend, wait
from workload import Entry, State, after, care, history, look, outcomes, work

from beacon_memory.storage.repair import verify
from beacon_memory.storage.store import MemoryStore

KILLS = 30  # of a round
SHARED = ("shared-0", "shared-1")


@dataclass
class Writer:
    """A process that works on a store until it is killed; also on documents that nobody else changes."""

    folder: Path
    own: tuple[str, ...]
    rng: random.Random
    namespace: str = ""
    states: dict[str, State] = field(default_factory=dict)
    shared: list[Entry] = field(default_factory=list)
    lives: int = 0
    pid: int = 0

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.own[0]}.{self.lives}.log")

    def live(self, until: float = float("inf")) -> None:
        self.lives += 1
        store = MemoryStore(self.folder, self.namespace)
        seed = self.rng.getrandbits(32)
        self.pid = fork(partial(work, store, self.log, self.own, SHARED, seed, until))

    def die(self) -> None:
        self.pid = killed(self.pid)
        self.settle()

    def settle(self) -> None:
        """Compare what nobody else changes with what the log says, after the process has ended."""
        possible = [self.states]
        for entry in history(self.log, time.monotonic()):
            if entry.operation[1] not in self.own:
                self.shared.append(entry)
                continue
            changed = after(possible[0], entry.operation)
            assert entry.done is not False or changed == possible[0], f"{entry} was refused"
            possible = [possible[0], changed] if entry.done is None else [changed]
        with MemoryStore(self.folder, self.namespace) as store:
            self.states = {id: state for id in self.own if (state := look(store, id))}
        assert self.states in possible


@dataclass
class Keeper:
    """A process that looks after a store again and again, and fails if it finds more than crashes leave."""

    folder: Path
    rng: random.Random
    pid: int = 0

    @property
    def log(self) -> Path:
        return self.folder.with_name("care.log")

    def live(self) -> None:
        seed = self.rng.getrandbits(32)
        self.pid = fork(partial(care, MemoryStore(self.folder), self.log, LEFT_BY_CRASHES, seed))

    def die(self) -> None:
        self.pid = killed(self.pid)


def killed(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL, "it had ended by itself"
    return 0


def kills(folder: Path, seed: int) -> int:
    """Kill writers, and with every other seed who looks after the store, again and again; returns how many."""
    rng = random.Random(seed)
    store_folder = folder / "store"
    writers = [Writer(store_folder, (f"{name}-0", f"{name}-1"), rng) for name in ("anna", "bela", "cora")]
    keeper = Keeper(store_folder, rng)
    processes = [*writers, *([keeper] if seed % 2 else [])]
    try:
        for _ in range(KILLS):
            for process in processes:
                if not process.pid:
                    process.live()
            time.sleep(rng.uniform(0, 0.1))
            rng.choice(processes if rng.random() < 0.3 else writers).die()
        count = KILLS
        for process in processes:
            if process.pid:
                process.die()
                count += 1
    finally:
        for process in processes:
            if process.pid:
                os.kill(process.pid, signal.SIGKILL)
    assert not seed % 2 or keeper.log.read_text()
    assert any(writer.shared for writer in writers)
    for _ in range(2):
        with MemoryStore(store_folder) as store:
            check_work(store, writers)
            mend(store)
            assert verify(store) == []
    return count


def check_work(store: MemoryStore, writers: Sequence[Writer]) -> None:
    """In a namespace is what its writers have acknowledged, and of what they shared what one of them wrote last."""
    found: Mapping[str, State | None] = {row.id: look(store, row.id) for row in store.list()}
    own = {id: state for writer in writers for id, state in writer.states.items()}
    assert {id: state for id, state in found.items() if id not in SHARED} == own
    shared = [entry for writer in writers for entry in writer.shared]
    for id in SHARED:
        possible = outcomes(shared, id)
        if (state := found.get(id)) is None:
            assert None in possible["content"]
        else:
            assert all(getattr(state, name) in values for name, values in possible.items()), (state, possible)
