from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from catalog_samples import LONG_AGO
from kv_samples import TEXT, same, sample
from store_samples import BYTES, files, labels, put, put_version, version

from beacon_memory.documents import Label
from beacon_memory.errors import QuotaError
from beacon_memory.storage.catalog.rows import DocumentRow, Totals
from beacon_memory.storage.files.stored_kv import stored_bytes, with_precision
from beacon_memory.storage.repair import verify
from beacon_memory.storage.store import MemoryStore

PIN = Label(pinned=True)


@pytest.fixture
def store(open_store: Callable[[], MemoryStore]) -> MemoryStore:
    """A store with room for three documents."""
    store = open_store()
    store.configure(quota=3 * BYTES + 1)
    return store


def ids(store: MemoryStore) -> list[str]:
    return [row.id for row in store.list()]


def put_long_ago(store: MemoryStore, *ids: str) -> None:
    """Store documents, the first of them unused for longest."""
    for n, id in enumerate(ids):
        put(store, id)
        with store.parts.catalog().transaction(), store.parts.catalog().connections.use() as db:
            db.execute("UPDATE documents SET used_at = ? WHERE id = ?", [1000 + n, id])


def test_a_new_document_takes_the_room_of_those_unused_for_longest(store: MemoryStore) -> None:
    put_long_ago(store, "c", "a", "b")
    evicted: list[DocumentRow] = []
    oldest = store.row("c")
    store.put(*sample("new"), TEXT, on_evicted=evicted.append)
    assert evicted == [oldest]
    assert ids(store) == ["a", "b", "new"]
    assert len(files(store)) == len(labels(store)) == 3
    assert store.totals() == Totals(3, 3 * BYTES)
    put(store, "newer")
    assert ids(store) == ["b", "new", "newer"]
    assert verify(store) == []


def test_a_large_document_takes_the_room_of_several(store: MemoryStore) -> None:
    put_long_ago(store, "c", "a", "b")
    header, kv = sample("large")
    evicted: list[DocumentRow] = []
    large = with_precision(kv, "float32")
    assert BYTES < stored_bytes(large) < 2 * BYTES
    store.put(header, large, TEXT, on_evicted=evicted.append)
    assert [row.id for row in evicted] == ["c", "a"]
    assert ids(store) == ["b", "large"]


def test_reading_keeps_a_document(store: MemoryStore) -> None:
    put_long_ago(store, "a", "b", "c")
    store.get("a")
    put(store, "new")
    assert ids(store) == ["a", "c", "new"]


def test_reading_keeps_a_document_after_the_store_was_closed(
    store: MemoryStore, open_store: Callable[[], MemoryStore]
) -> None:
    put_long_ago(store, "a", "b", "c")
    before = int(time.time())
    with open_store() as reader:
        reader.get("a")
        assert reader.row("a").used_at == 1000  # no reading writes
    assert store.row("a").used_at >= before
    assert [store.row(id).used_at for id in "bc"] == [1001, 1002]
    put(store, "new")
    assert ids(store) == ["a", "c", "new"]


def test_use_that_cannot_be_noted_now_is_noted_later(store: MemoryStore, open_store: Callable[[], MemoryStore]) -> None:
    put_long_ago(store, "a", "b", "c")
    reader = open_store()
    reader.get("a")
    with store.parts.catalog().transaction():
        reader.close()
    assert store.row("a").used_at == 1000
    reader.get("c")
    reader.close()
    assert min(store.row(id).used_at for id in "ac") > 10**9


def test_pinned_documents_stay(store: MemoryStore) -> None:
    put_long_ago(store, "a", "b", "c")
    for id in "ab":
        store.update(id, pinned=True)
    put(store, "new")
    assert ids(store) == ["a", "b", "new"]
    store.update("a", pinned=False)
    put(store, "newer")
    assert ids(store) == ["b", "new", "newer"]


def test_no_room_beside_pinned_documents_leaves_everything(store: MemoryStore) -> None:
    for id in "abc":
        store.put(*sample(id), TEXT, PIN)
    before = store.list()
    told: list[DocumentRow] = []
    with pytest.raises(QuotaError, match=r"'new' takes 612 bytes, .* 611 more than the quota of 1,837; unpin"):
        store.put(*sample("new"), TEXT, on_evicted=told.append)
    assert store.list() == before
    assert told == []
    assert len(files(store)) == len(labels(store)) == 3
    assert verify(store) == []


def test_what_is_larger_than_the_quota_evicts_nobody(store: MemoryStore) -> None:
    put_long_ago(store, "a", "b", "c")
    store.configure(quota=BYTES)
    header, kv = sample("large")
    told: list[DocumentRow] = []
    with pytest.raises(QuotaError, match="'large' takes"):
        store.put(header, with_precision(kv, "float32"), TEXT, on_evicted=told.append)
    assert (ids(store), told) == (["a", "b", "c"], [])
    assert store.totals() == Totals(3, 3 * BYTES)
    assert verify(store) == []


def test_a_replaced_document_counts_once_and_is_not_evicted_for_itself(store: MemoryStore) -> None:
    put_long_ago(store, "a", "b", "c")
    put(store, "a", "quite another text")
    assert ids(store) == ["a", "b", "c"]
    header, kv = sample("a")
    store.put(header, with_precision(kv, "float32"), TEXT)
    assert ids(store) == ["a", "c"]
    for id in "ac":
        store.update(id, pinned=True)
    put(store, "a")
    put(store, "b")
    assert ids(store) == ["a", "b", "c"]


def test_expired_documents_make_room_first(store: MemoryStore) -> None:
    put_long_ago(store, "a", "b", "c")
    store.update("c", expires_at=LONG_AGO, pinned=True)
    told: list[DocumentRow] = []
    store.put(*sample("new"), TEXT, on_evicted=told.append)
    assert (ids(store), told) == (["a", "b", "new"], [])


def test_a_quota_that_shrinks_is_kept_by_the_next_put(store: MemoryStore) -> None:
    put_long_ago(store, "a", "b", "c")
    store.configure(quota=BYTES)
    assert ids(store) == ["a", "b", "c"]
    kv = put(store, "new")
    assert ids(store) == ["new"]
    assert same(store.get("new").kv, kv)
    store.configure(quota=None)
    for id in "abcdef":
        put(store, id)
    assert len(ids(store)) == 7


def test_kept_versions_count_and_go_with_their_document(store: MemoryStore) -> None:
    put_version(store, "old", "a")
    put_version(store, "new", "a")
    put_long_ago(store, "b")
    assert store.row("a", version("old")).fingerprint == version("old")
    assert store.totals() == Totals(2, 3 * BYTES)
    with store.parts.catalog().transaction(), store.parts.catalog().connections.use() as db:
        db.execute("UPDATE documents SET used_at = 1 WHERE id = 'a'")
    put(store, "c")
    assert ids(store) == ["b", "c"]
    assert store.totals() == Totals(2, 2 * BYTES)
    assert len(files(store)) == len(labels(store)) == 2
    assert verify(store) == []


def test_a_version_is_not_kept_where_there_is_no_room_for_it(store: MemoryStore) -> None:
    for id in "ab":
        store.put(*sample(id), TEXT, PIN)
    put_version(store, "old")
    with pytest.raises(QuotaError, match="'doc' takes"):
        put_version(store, "new")
    assert store.row("doc").fingerprint == version("old")
    put_version(store, "new", keep_version=False)
    assert store.row("doc", version("old")).fingerprint == version("new")
    assert store.totals() == Totals(3, 3 * BYTES)
    assert verify(store) == []


def test_each_namespace_has_a_quota_of_its_own(store: MemoryStore) -> None:
    inner = store.within("inner")
    for id in "abc":
        put(store, id)
        put(inner, id)
    assert ids(store) == ids(inner) == ["a", "b", "c"]
    inner.configure(quota=BYTES)
    put(inner, "new")
    assert (ids(store), ids(inner)) == (["a", "b", "c"], ["new"])
