"""Processes are killed at every step of whatever changes a store, and at random moments under load.

Whenever that happens, what was acknowledged is there byte for byte, what was being done has happened or not, and the
store goes on, with `repair` or without.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from changes import CRASHING, Prepared, prepare, put, two
from crashing import changing_steps, copied, copies_between, everything, fork, killed_at, wait
from workload import Entry, State, after, history, look, outcomes, work

from beacon_memory.errors import StoreError
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

LEFT_BY_CRASHES = {"orphan-file", "stale-temp", "stale-label"}


@pytest.fixture
def prepared(folder: Path, request: pytest.FixtureRequest) -> Prepared:
    return prepare(folder, request.param)


def mend(folder: Path) -> None:
    with MemoryStore(folder) as whole:
        for name in whole.namespaces():
            with MemoryStore(folder, name) as store:
                found = repair(store)
                assert {problem.kind for problem in found} <= LEFT_BY_CRASHES
                assert all(problem.mended for problem in found)
                assert verify(store) == []


def check(folder: Path, prepared: Prepared, *, repaired: bool) -> None:
    """What a crash left is the old or the new, and it can be worked with, repaired or not."""
    found = everything(folder)
    assert found in (prepared.before, prepared.after)
    if repaired:
        mend(folder)
        assert everything(folder) == found
    with MemoryStore(folder) as store:
        if found == prepared.before:
            prepared.act(store)
            assert everything(folder) == prepared.after
        else:
            put("kept", "9")(store)
            assert look(store, "kept") == State("9", "9")
        if repaired:
            assert verify(store) == []
    if not repaired:
        mend(folder)


@pytest.mark.parametrize("prepared", CRASHING, indirect=True)
def test_a_process_killed_at_any_step_leaves_the_old_or_the_new(folder: Path, prepared: Prepared) -> None:
    steps, count = changing_steps(copied(prepared.template, folder / "scanned"), prepared.act)
    assert steps
    between = random.sample(range(1, count + 1), 5)
    for n, step in enumerate(sorted({*steps, *between})):
        store = copied(prepared.template, folder / "killed")
        assert killed_at(step, store, prepared.act), f"step {step} was not reached"
        check(store, prepared, repaired=bool(n % 2))


@pytest.mark.skipif(sys.platform != "linux", reason="traces a process as Linux lets it")
@pytest.mark.parametrize("prepared", CRASHING, indirect=True)
def test_after_any_system_call_the_files_are_those_of_the_old_or_the_new(folder: Path, prepared: Prepared) -> None:
    traced = copied(prepared.template, folder / "traced")
    seen = 0
    try:
        for copy in copies_between(traced, prepared.act, folder / "copy"):
            seen += 1
            if seen % 3:
                assert everything(copy) in (prepared.before, prepared.after)
            elif seen < 60 or seen % 2:  # a catalog is born in more than a hundred
                check(copy, prepared, repaired=bool(seen % 2))
    except PermissionError as error:
        pytest.skip(str(error))
    assert seen
    assert everything(traced) == prepared.after


def lose_catalog(folder: Path) -> None:
    (folder / "catalog.sqlite3").unlink()


def damage_catalog(folder: Path) -> None:
    (folder / "catalog.sqlite3").write_bytes(b"no database" * 1000)


def go_back_to_an_older_catalog(folder: Path) -> None:
    now = (folder / "catalog.sqlite3").read_bytes()
    with MemoryStore(folder) as store:
        put("later", "3")(store)
        put("doc", "4")(store)
    (folder / "catalog.sqlite3").write_bytes(now)


@pytest.mark.parametrize("damage", [lose_catalog, damage_catalog, go_back_to_an_older_catalog])
def test_a_repair_that_is_killed_at_any_step_can_be_repeated(folder: Path, damage: Callable[[Path], None]) -> None:
    template = folder / "template"
    with MemoryStore(template) as store:
        two(store)
    damage(template)
    steps, count = changing_steps(copied(template, folder / "repaired"), repair)
    with MemoryStore(folder / "repaired") as store:
        states = {row.id: look(store, row.id) for row in store.list()}
        assert verify(store) == []
    if damage is go_back_to_an_older_catalog:
        assert states == {"kept": State("0", "0"), "doc": State("4", "4"), "later": State("3", "3")}
    else:
        assert states == {"kept": State("0", "0"), "doc": State("1", "1")}
    expected = everything(folder / "repaired")
    for step in sorted({*steps, *random.sample(range(1, count + 1), 5)}):
        killed = copied(template, folder / "killed")
        assert killed_at(step, killed, repair), f"step {step} was not reached"
        with MemoryStore(killed) as store:
            assert [problem for problem in repair(store) if not problem.mended] == []
            assert verify(store) == []
        assert everything(killed) == expected


KILLS = 100
SHARED = ("shared-0", "shared-1")


@dataclass
class Writer:
    """A process that works on a store until it is killed; also on documents that nobody else changes."""

    folder: Path
    own: tuple[str, ...]
    states: dict[str, State] = field(default_factory=dict)
    shared: list[Entry] = field(default_factory=list)
    lives: int = 0
    pid: int = 0

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.own[0]}.{self.lives}.log")

    def live(self) -> None:
        self.lives += 1
        seed = random.randrange(2**32)
        self.pid = fork(lambda: work(MemoryStore(self.folder), self.log, self.own, SHARED, seed))

    def die(self) -> None:
        """Be killed; what nobody else changes must be what the log says."""
        self.pid = killed(self.pid)
        possible = [self.states]
        for entry in history(self.log, time.monotonic()):
            if entry.operation[1] not in self.own:
                self.shared.append(entry)
                continue
            changed = after(possible[0], entry.operation)
            assert entry.done is not False or changed == possible[0], f"{entry} was refused"
            possible = [possible[0], changed] if entry.done is None else [changed]
        with MemoryStore(self.folder) as store:
            self.states = {id: state for id in self.own if (state := look(store, id))}
        assert self.states in possible


class Repairer:
    """A process that repairs a store again and again, and fails if it finds more than crashes leave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder.with_name("repairs.log")
        self.pid = 0

    def live(self) -> None:
        self.pid = fork(self._repair)

    def die(self) -> None:
        self.pid = killed(self.pid)

    def _repair(self) -> None:
        with self.log.open("a", buffering=1) as log:
            while True:
                try:
                    with MemoryStore(self.folder) as store:
                        found = [*repair(store), *verify(store)]
                except StoreError as error:
                    if "is being written to" not in str(error):
                        raise
                else:
                    assert {problem.kind for problem in found} <= LEFT_BY_CRASHES, found
                    log.write("repaired\n")


def killed(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL, "it had ended by itself"
    return 0


@pytest.mark.parametrize("repairing", [False, True], ids=["alone", "beside repairs"])
def test_what_writers_acknowledged_survives_their_kills(folder: Path, repairing: bool) -> None:
    store_folder = folder / "store"
    writers = [Writer(store_folder, (f"{name}-0", f"{name}-1")) for name in ("anna", "bela", "cora")]
    repairer = Repairer(store_folder)
    processes = [*writers, *([repairer] if repairing else [])]
    try:
        for _ in range(KILLS):
            for process in processes:
                if not process.pid:
                    process.live()
            time.sleep(random.uniform(0, 0.1))
            random.choice(processes if random.random() < 0.3 else writers).die()
        for process in processes:
            if process.pid:
                process.die()
    finally:
        for process in processes:
            if process.pid:
                os.kill(process.pid, signal.SIGKILL)
    assert not repairing or repairer.log.read_text().count("repaired") > 3
    for _ in range(2):
        with MemoryStore(store_folder) as store:
            found = {row.id: look(store, row.id) for row in store.list()}
        check_work(found, writers)
        mend(store_folder)


def check_work(found: Mapping[str, State | None], writers: Sequence[Writer]) -> None:
    own = {id: state for writer in writers for id, state in writer.states.items()}
    assert {id: state for id, state in found.items() if id not in SHARED} == own
    shared = [entry for writer in writers for entry in writer.shared]
    assert len(shared) > KILLS / 4
    for id in SHARED:
        possible = outcomes(shared, id)
        if (state := found.get(id)) is None:
            assert None in possible["content"]
        else:
            assert all(getattr(state, name) in values for name, values in possible.items()), (state, possible)
