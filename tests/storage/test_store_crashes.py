"""Processes are killed at every step of whatever changes a store; at random moments under load, see `torture`.

Whenever that happens, what was acknowledged is there byte for byte, what was being done has happened or not, and the
store goes on, with `repair` or without.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from changes import CRASHING, Prepared, prepare, put, two
from crashing import changing_steps, copied, copies_between, everything, killed_at, mend
from workload import State, look

from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore


@pytest.fixture
def prepared(folder: Path, request: pytest.FixtureRequest) -> Prepared:
    return prepare(folder, request.param)


def mend_all(folder: Path) -> None:
    with MemoryStore(folder) as whole:
        for name in whole.namespaces():
            with MemoryStore(folder, name) as store:
                mend(store)
                assert verify(store) == []


def check(folder: Path, prepared: Prepared, *, repaired: bool) -> None:
    """What a crash left is the old or the new, and it can be worked with, repaired or not."""
    found = everything(folder)
    assert found in (prepared.before, prepared.after)
    if repaired:
        mend_all(folder)
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
        mend_all(folder)


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
