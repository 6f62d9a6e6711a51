"""Every call of the operating system fails once, whatever a store is doing."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import count
from pathlib import Path

from changes import CRASHING, Act, Change, append, appended, put, recompressed, two
from crashing import LEFT_BY_CRASHES, copied, everything, mend, seen
from failing_calls import with_failing_call
from upkeep_samples import unfinished_put

from beacon_memory.errors import CorruptFileError, StoreError
from beacon_memory.storage.archive import copy_documents, export_documents, import_documents
from beacon_memory.storage.erasing import erase
from beacon_memory.storage.files.label_file import label_name
from beacon_memory.storage.repair import PUT_ASIDE, repair, verify
from beacon_memory.storage.store import MemoryStore

EVERY = 16  # of the calls of an operation, so many lie between two that fail in one round


def beside(store: MemoryStore, name: str) -> Path:
    """A file or folder beside a store's folder."""
    return store.root.with_name(name)


def remote(prepare: Act) -> Act:
    """The same in a store whose files lie in another folder."""

    def act(store: MemoryStore) -> None:
        store.configure(files=beside(store, "files").as_uri())
        prepare(store)

    return act


def uncached(prepare: Act) -> Act:
    def act(store: MemoryStore) -> None:
        remote(prepare)(store)
        shutil.rmtree(store.folder / "cache")

    return act


def export(store: MemoryStore) -> None:
    export_documents(store, beside(store, "archive"))


def exported(store: MemoryStore) -> None:
    two(store)
    export(store)
    store.delete("doc")
    put("kept", "9")(store)


def import_(store: MemoryStore) -> None:
    import_documents(store, beside(store, "archive"), replace=True)


def copy(store: MemoryStore) -> None:
    copy_documents(store, store.within("other"), replace=True)


def crashed(store: MemoryStore) -> None:
    """Leave what crashes leave."""
    recompressed(store)
    unfinished_put(store, "new")
    (store.folder / label_name(store.row("kept").file)).unlink()


def lost(store: MemoryStore) -> None:
    appended(1)(store)
    store.configure(quota=10**9)
    store.close()
    (store.folder / "catalog.sqlite3").write_bytes(b"no database" * 1000)


def check_sound(store: MemoryStore) -> None:
    assert verify(store) == []


def repair_sound(store: MemoryStore) -> None:
    assert repair(store) == []


def repair_crashed(store: MemoryStore) -> None:
    assert {problem.kind for problem in repair(store)} <= LEFT_BY_CRASHES


def erase_doc(store: MemoryStore) -> None:
    """Erase a document, or go on with what is left of it."""
    erase(store, ["doc"] if "doc" in store else [])


def read(store: MemoryStore) -> None:
    assert seen(store, "kept")
    assert seen(store, "doc")
    assert [row.id for row in store.list()] == ["doc", "kept"]
    assert (store.totals().documents, store.namespaces()) == (2, [""])


OPERATIONS: Mapping[str, Change] = {
    **CRASHING,
    "erase": Change(recompressed, erase_doc),
    "configure": Change(two, lambda store: store.configure(quota=10**9)),
    "read": Change(two, read),
    "export": Change(two, export),
    "import": Change(exported, import_),
    "copy": Change(two, copy),
    "verify": Change(recompressed, check_sound),
    "repair of a sound store": Change(recompressed, repair_sound),
    "repair after a crash": Change(crashed, repair_crashed),
    "repair of a lost catalog": Change(lost, repair),
    "erasing what was removed": Change(crashed, erase),
    "remote put": Change(remote(two), put("doc", "2")),
    "remote append": Change(remote(appended(1)), append),
    "remote update": Change(remote(two), lambda store: store.update("doc", tags=["new"])),
    "remote delete": Change(remote(two), lambda store: store.delete("doc")),
    "remote read": Change(uncached(appended(1)), read),
    "remote repair": Change(uncached(two), repair_sound),
    "remote erase": Change(remote(recompressed), erase_doc),
}
PIECEMEAL = {"erase", "remote erase", "import", "copy"}  # each document by itself


def faults(folder: Path, seed: int) -> int:
    """Let calls of one operation fail, each in a process of its own; returns how many failed.

    Seeds that follow each other make every call of every operation fail in every way.
    """
    turn, operation = divmod(seed, len(OPERATIONS))
    how, first = divmod(turn, EVERY)
    return let_fail(folder, list(OPERATIONS)[operation], count(first + 1, EVERY), how)


def let_fail(folder: Path, operation: str, numbers: Iterable[int], how: int, only: tuple[str, str] = ("", "")) -> int:
    """Let the calls of an operation that have these numbers fail; returns how many.

    only: see `with_failing_call`.
    """
    change = OPERATIONS[operation]
    world, outcome = folder / "world", folder / "outcome"
    with MemoryStore(world / "store") as store:
        change.prepare(store)
    template = copied(world, folder / "template")
    before = None if change.prepare is lost else everything(store.folder)
    change.act(store)
    store.close()
    after = everything(store.folder)
    before = after if before is None else before
    for done, number in enumerate(numbers):
        copied(template, world)
        ending = ("killed", "closed", "repeated")[(number + how) % 3]
        act = partial(attempt, store.root, change.act, ending, outcome)
        failed = with_failing_call(act, world, number, how, only)
        if failed is None:
            return done
        try:
            check(store.root, change, before, after, outcome.read_text(), piecemeal=operation in PIECEMEAL)
        except BaseException as error:
            error.add_note(f"after call {number} of {operation} failed ({failed}), {ending}: {outcome.read_text()}")
            raise
    raise AssertionError


def attempt(folder: Path, act: Act, ending: str, outcome: Path) -> None:
    """Do something to a store, which may be refused, but not because anything is damaged; note how it ended."""
    outcome.write_text("begun")
    try:
        store = MemoryStore(folder)
        act(store)
    except CorruptFileError:
        raise
    except StoreError as error:
        outcome.write_text(f"refused: {error}")
        if ending == "killed":
            return
        store = MemoryStore(folder)
        if ending == "repeated":
            act(store)
            outcome.write_text("done at last")
    else:
        outcome.write_text("done")
    if ending != "killed":
        store.close()


def check(folder: Path, change: Change, before: object, after: object, outcome: str, *, piecemeal: bool) -> None:
    """What was done is there, what was refused has not happened, and can be done now."""
    with MemoryStore(folder) as store:
        damaged = change.prepare is lost and repair(store)
    found = everything(folder)
    if damaged or (piecemeal and not outcome.startswith("done")):
        assert all(found.get(key) in (before.get(key), after.get(key)) for key in {*before, *after, *found})
    else:
        assert found == (after if outcome.startswith("done") else before)
    with MemoryStore(folder) as store:
        if found != after:
            change.act(store)
            assert everything(folder) == after
        for name in store.namespaces():
            with store.within(name) as one:
                mend(one)
                assert verify(one) == []
    assert everything(folder) == after
    assert change.prepare is lost or not list(folder.glob(f"{PUT_ASIDE}*"))
