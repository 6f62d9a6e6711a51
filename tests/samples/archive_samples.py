"""Documents of any kind that go into an archive, and what must come out of it."""

from __future__ import annotations

from dataclasses import replace

from kv_samples import same

from beacon_memory.storage.repair import verify
from beacon_memory.storage.store import MemoryStore

CREATED = "2020-02-20T20:20:20.202+00:00"
IDS = ("../../a", "b\x00\u202e", "ü" * 500)


def assert_same(ours: MemoryStore, theirs: MemoryStore, ids: tuple[str, ...] = IDS) -> None:
    """The documents are there bit for bit, with all that is known of them, and both stores are sound."""
    for id in ids:
        one, other = ours.get(id), theirs.get(id)
        assert same(one.kv, other.kv)
        assert replace(one.header, namespace=theirs.namespace) == other.header
        assert (one.row.root == other.row.root) == (ours.namespace == theirs.namespace)
        told = {"file": "", "updated_at": "", "used_at": 0, "root": ""}
        assert replace(one.row, **told) == replace(other.row, **told)
        assert ours.text(id) == theirs.text(id)
    assert verify(ours) == verify(theirs) == []


def assert_empty(store: MemoryStore) -> None:
    """Nothing was stored, and nothing left behind."""
    assert store.list() == verify(store) == []
    assert not [path for path in store.folder.glob("kv/**/*") if path.is_file()]
