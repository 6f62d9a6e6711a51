"""Files that others write, and rows that one writer lets follow."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
from kv_samples import same, sample

from beacon_memory.documents import Label, Text
from beacon_memory.errors import ConflictError, QuotaError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.storage.deliveries import Deliveries, Delivery, Taken, deliver
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

Open = Callable[[], MemoryStore]


@pytest.fixture
def store(open_store: Open) -> MemoryStore:
    return open_store()


@pytest.fixture
def deliveries(store: MemoryStore) -> Deliveries:
    return Deliveries(store)


def delivered(
    store: MemoryStore, deliveries: Deliveries, id: str, text: str = "", label: Label | None = None
) -> tuple[Delivery, MemoryKV]:
    """A document as a worker delivers it, from another process."""
    header, kv = sample(id, text or f"The text of {id}.")
    whole = Text(text or f"The text of {id}.")
    (name,) = deliveries.reserve([id])
    fit, kept = store.fitting(header, kv, whole)
    return pickle.loads(pickle.dumps(deliver(store.files, name, fit, kept, whole, label))), kv  # noqa: S301  # our own


def test_documents_of_many_are_stored_together(store: MemoryStore, deliveries: Deliveries) -> None:
    made = {id: delivered(store, deliveries, id, label=Label(tags=[id])) for id in ("a", "b", "c")}
    taken = deliveries.take([one for one, _ in made.values()])
    assert [one.row.id for one in taken if isinstance(one, Taken)] == ["a", "b", "c"]
    for id, (_, kv) in made.items():
        assert same(store.get(id).kv, kv)
        assert store.text(id) == f"The text of {id}."
        assert store.row(id).tags == (id,)
    assert store.totals().documents == 3
    assert verify(store) == []


def test_a_document_that_is_delivered_twice_is_stored_once(store: MemoryStore, deliveries: Deliveries) -> None:
    one, _ = delivered(store, deliveries, "a")
    (first,), (second,) = deliveries.take([one]), deliveries.take([one])
    assert isinstance(first, Taken)
    assert isinstance(second, Taken)
    assert first.row == second.row
    assert verify(store) == []


def test_the_document_of_that_id_is_replaced_and_keeps_its_label(store: MemoryStore, deliveries: Deliveries) -> None:
    old, _ = delivered(store, deliveries, "a", "An old text.", Label(tags=["kept"], pinned=True))
    new, kv = delivered(store, deliveries, "a", "A new text.")
    deliveries.take([old])
    deliveries.take([new])
    assert store.text("a") == "A new text."
    assert (store.row("a").tags, store.row("a").pinned) == (("kept",), True)
    assert same(store.get("a").kv, kv)
    assert verify(store) == []


def test_what_repair_took_for_a_leftover_is_refused(store: MemoryStore, deliveries: Deliveries) -> None:
    gone, _ = delivered(store, deliveries, "gone")
    assert {problem.kind for problem in repair(store)} == {"orphan-file", "stale-temp"}
    later, _ = delivered(store, deliveries, "later")
    refused, taken = deliveries.take([gone, later])
    assert isinstance(refused, ConflictError)
    assert isinstance(taken, Taken)
    assert [row.id for row in store.list()] == ["later"]
    assert verify(store) == []


def test_one_that_cannot_be_stored_leaves_the_others_and_no_file(store: MemoryStore, deliveries: Deliveries) -> None:
    first, _ = delivered(store, deliveries, "a", label=Label(pinned=True))
    deliveries.take([first])
    store.configure(quota=store.totals().bytes * 2)
    second, third = (delivered(store, deliveries, id, label=Label(pinned=True))[0] for id in ("b", "c"))
    taken, refused = deliveries.take([second, third])
    assert isinstance(taken, Taken)
    assert isinstance(refused, QuotaError)
    assert [row.id for row in store.list()] == ["a", "b"]
    assert verify(store) == []


def test_what_is_never_delivered_is_released(store: MemoryStore, deliveries: Deliveries) -> None:
    names = deliveries.reserve(["a", "b"])
    one, _ = delivered(store, deliveries, "c")
    assert {problem.kind for problem in verify(store)} == {"orphan-file", "stale-temp"}
    deliveries.release([*names, one.name])
    assert verify(store) == []
    assert store.list() == []


def test_a_row_goes_where_the_quota_needs_room(store: MemoryStore, deliveries: Deliveries) -> None:
    first, _ = delivered(store, deliveries, "a")
    deliveries.take([first])
    store.configure(quota=store.totals().bytes)
    second, _ = delivered(store, deliveries, "b")
    (taken,) = deliveries.take([second])
    assert isinstance(taken, Taken)
    assert taken.evicted == ("a",)
    assert [row.id for row in store.list()] == ["b"]
    assert verify(store) == []
