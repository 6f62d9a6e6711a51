from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from catalog_samples import LATER, LONG_AGO
from kv_samples import TEXT, same, sample
from store_samples import BYTES, IN_A_FOLDER, change, files, labels, put

from beacon_memory.documents import Label, utc_now
from beacon_memory.errors import DocumentNotFoundError, InputError, StoreError
from beacon_memory.storage.catalog.rows import Totals
from beacon_memory.storage.files.label_file import label_name, read_label
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore


@pytest.fixture
def store(open_store: Callable[[], MemoryStore]) -> MemoryStore:
    return open_store()


WHOLE = Label({"a": [1, None]}, ["x", "y"], True, LATER)


@IN_A_FOLDER
@pytest.mark.parametrize(
    ("changes", "after"),
    [
        ({"metadata": {"b": 2}}, Label({"b": 2}, ["x", "y"], True, LATER)),
        ({"metadata": {}}, Label({}, ["x", "y"], True, LATER)),
        ({"tags": ["z", "y", "z"]}, Label(WHOLE.metadata, ["y", "z"], True, LATER)),
        ({"tags": ()}, Label(WHOLE.metadata, (), True, LATER)),
        ({"pinned": False}, Label(WHOLE.metadata, ["x", "y"], False, LATER)),
        ({"expires_at": None}, Label(WHOLE.metadata, ["x", "y"], True, None)),
        ({"tags": ["z"], "pinned": False}, Label(WHOLE.metadata, ["z"], False, LATER)),
        ({}, WHOLE),
    ],
)
def test_each_part_of_a_label_is_changed_and_the_others_stay(
    store: MemoryStore, changes: dict[str, Any], after: Label
) -> None:
    header, kv = sample()
    before = store.put(header, kv, TEXT, WHOLE, created_at=LONG_AGO)
    time.sleep(0.002)
    row = store.update("doc", **changes)
    assert row == store.row("doc") == replace(before.labelled(after), updated_at=row.updated_at)
    assert row.updated_at > before.updated_at
    assert row.label == after == read_label(store.folder / label_name(row.file)).label
    assert same(store.get("doc").kv, kv)
    assert store.text("doc") == TEXT
    assert verify(store) == []


@IN_A_FOLDER
def test_changes_of_a_label_survive_the_loss_of_the_catalog(store: MemoryStore) -> None:
    store.put(*sample(), TEXT, Label({"a": 1}), created_at=LONG_AGO)
    store.update("doc", tags=["x"], pinned=True, expires_at=LATER)
    store.close()
    (store.folder / "catalog.sqlite3").unlink()
    repair(store)
    row = store.row("doc")
    assert (row.label, row.created_at) == (Label({"a": 1}, ["x"], True, LATER), LONG_AGO)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"a": {1}}}, "of type set"),
        ({"tags": "abc"}, "the one text 'abc'"),
        ({"pinned": 1}, "true or false"),
        ({"expires_at": "tomorrow"}, "ISO 8601"),
    ],
)
def test_what_no_label_can_be_is_refused_and_changes_nothing(
    store: MemoryStore, changes: dict[str, Any], message: str
) -> None:
    before = store.put(*sample(), TEXT, WHOLE)
    with pytest.raises(InputError, match=message):
        store.update("doc", **{"metadata": {"new": 1}, **changes})
    with pytest.raises(TypeError, match="colour"):
        store.update("doc", colour="red")
    assert store.row("doc") == before
    assert verify(store) == []


@IN_A_FOLDER
def test_a_label_that_cannot_be_committed_is_taken_back(store: MemoryStore) -> None:
    before = store.put(*sample(), TEXT, WHOLE)
    change(store, "CREATE TRIGGER t BEFORE INSERT ON labels BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(StoreError, match="no"):
        store.update("doc", tags=["z"])
    change(store, "DROP TRIGGER t")
    assert store.row("doc") == before
    assert verify(store) == []


def test_a_missing_document_has_no_label_to_change(store: MemoryStore) -> None:
    put(store)
    with pytest.raises(DocumentNotFoundError, match="did you mean 'doc'"):
        store.update("docs", metadata={})


def test_documents_are_listed_by_their_labels(store: MemoryStore) -> None:
    for n in range(6):
        put(store, f"{'ab'[n % 2]}/{n}", n=n, even=n % 2 == 0)
        store.update(f"{'ab'[n % 2]}/{n}", tags=["third"] * (n % 3 == 0))

    def found(**filters: Any) -> list[str]:
        return [row.id for row in store.list(**filters)]

    assert found(prefix="a/") == ["a/0", "a/2", "a/4"] == found(metadata={"even": True})
    assert found(tags=["third"]) == ["a/0", "b/3"]
    assert found(tags=["third"], prefix="b", metadata={"n": 3}) == ["b/3"]
    assert found(after="a/2", limit=2) == ["a/4", "b/1"]
    store.update("b/3", tags=[], metadata={})
    assert found(tags=["third"]) == ["a/0"]
    assert found(metadata={"n": 3}) == []
    store.rename("a/0", "c/0")
    assert found(tags=["third"]) == ["c/0"]
    store.delete("c/0")
    assert found(tags=["third"]) == []


def soon(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def assert_gone(store: MemoryStore, id: str) -> None:
    assert id not in store
    assert id not in [row.id for row in [*store.list(), *store.list(tags=["x"]), *store.list(prefix=id)]]
    assert id not in [hit.document for hit in store.search("boat")]
    for use in (store.get, store.row, store.read, store.text, store.update, store.delete):
        with pytest.raises(DocumentNotFoundError, match=f"no document '{id}' is stored"):
            use(id)
    for act in (store.rename, store.convert):
        with pytest.raises(DocumentNotFoundError, match=f"no document '{id}' is stored"):
            act(id, "float16")


def test_a_document_is_gone_at_the_moment_when_it_expires(store: MemoryStore) -> None:
    put(store, "kept")
    at = store.put(*sample(), TEXT, Label(tags=["x"], expires_at=soon(0.5))).expires_at
    assert at is not None
    looks, late = 0, time.monotonic() + 60
    while "doc" in store:
        looks += 1
        assert time.monotonic() < late
    assert looks
    assert utc_now() >= at
    assert_gone(store, "doc")
    assert [row.id for row in store.list()] == ["kept"]


def test_a_past_time_removes_a_document_from_sight_at_once(store: MemoryStore) -> None:
    put(store)
    store.update("doc", expires_at=LONG_AGO, tags=["x"])
    assert_gone(store, "doc")
    assert len(files(store)) == 1
    assert verify(store) == []


def test_expired_documents_are_removed_when_that_is_asked_for(store: MemoryStore) -> None:
    for id in ("a", "b", "kept"):
        put(store, id)
    assert store.expire() == []
    for id in "ba":
        store.update(id, expires_at=LONG_AGO)
    store.update("kept", expires_at=LATER)
    assert store.expire() == ["a", "b"]
    assert store.expire() == []
    assert len(files(store)) == len(labels(store)) == 1
    assert store.totals() == Totals(1, BYTES)
    assert verify(store) == []


@IN_A_FOLDER
def test_any_put_sweeps_what_has_expired(store: MemoryStore) -> None:
    put(store)
    store.update("doc", expires_at=LONG_AGO)
    put(store, "other")
    assert files(store) == [store.folder / store.row("other").file]
    assert store.expire() == []


def test_the_id_of_an_expired_document_is_free(store: MemoryStore) -> None:
    put(store, a=1)
    store.update("doc", expires_at=LONG_AGO)
    kv = put(store, text="quite another text")
    row = store.row("doc")
    assert row.label == Label()
    assert row.created_at == row.updated_at
    assert same(store.get("doc").kv, kv)
    store.update("doc", expires_at=LONG_AGO)
    put(store, "other")
    store.rename("other", "doc")
    assert store.text("doc") == TEXT
    assert len(files(store)) == 1
    assert verify(store) == []


def test_a_lifetime_can_be_taken_off(store: MemoryStore) -> None:
    put(store)
    store.update("doc", expires_at=soon(0.3))
    store.update("doc", expires_at=None)
    time.sleep(0.3)
    assert "doc" in store
    assert store.expire() == []
