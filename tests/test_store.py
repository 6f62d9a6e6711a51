from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_samples import FINGERPRINT, TEXT, finish, memory, same, sample, stack, start
from store_samples import files, put

from beacon_memory.config import COMPRESSIONS
from beacon_memory.errors import DocumentNotFoundError, InputError, StoreError
from beacon_memory.kv import MemoryKV
from beacon_memory.kv_file import WindowSpan
from beacon_memory.store import MemoryStore


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(tmp_path / "store")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_stored_document_is_read_back_bit_for_bit(store: MemoryStore, dtype: torch.dtype) -> None:
    header, kv = sample(dtype=dtype)
    row = store.put(header, kv, TEXT, {"source": "test"})
    store.close()
    found = store.get("doc")
    assert (found.row, found.header) == (row, header)
    assert same(found.kv, kv)
    assert store.text("doc") == TEXT
    assert store.list() == [row]
    assert "doc" in store
    assert (row.tokens, row.slots, row.bytes, row.ratios) == (13, 6, kv.nbytes, (2, 4))
    assert row.compression == "select"
    assert (row.metadata, row.fingerprint) == ({"source": "test"}, FINGERPRINT.digest)
    assert [hit.document for hit in store.search("Where is the boat?")] == ["doc"]
    assert store.verify() == []


@given(
    ids=st.sets(
        st.text(min_size=1) | st.sampled_from(["../../up", "/etc/passwd", "a\0b", "a" * 10_000, "\u202e"]), max_size=4
    )
)
@settings(max_examples=15, deadline=None)
def test_an_id_never_becomes_a_path(tmp_path_factory: pytest.TempPathFactory, ids: set[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    with MemoryStore(folder / "store") as store:
        kept = {id: put(store, id) for id in ids}
        for id in ids:
            assert id in store
            assert same(store.get(id).kv, kept[id])
        assert {row.id for row in store.list()} == ids
        assert store.verify() == []
        for path in files(store):
            assert path.relative_to(store.folder).as_posix().isascii()
            assert len(path.relative_to(store.folder).parts) == 3
        for id in ids:
            store.delete(id)
            assert id not in store
        assert not files(store)
    assert [path.name for path in folder.iterdir()] in ([], ["store"])


def test_reading_a_store_that_is_not_there_leaves_nothing(store: MemoryStore) -> None:
    assert [*store.list(), *store.search("anything"), *store.verify(repair=True)] == []
    assert "doc" not in store
    for use in (store.get, store.text, store.delete):
        with pytest.raises(DocumentNotFoundError, match="'doc'"):
            use("doc")
    assert not store.folder.exists()
    put(store)
    assert "doc" in store


def test_a_store_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; a store needs a folder"):
        MemoryStore(tmp_path / "file")


@pytest.mark.parametrize("id", ["", "\ud800", 3, None])
def test_what_is_no_id_is_in_no_store(store: MemoryStore, id: object) -> None:
    put(store)
    assert id not in store


def test_replacement_leaves_one_file_and_keeps_created_at_and_metadata(store: MemoryStore) -> None:
    put(store, tag="a")
    first = store.get("doc").row
    kv = put(store, text="quite another text")
    second = store.get("doc")
    assert same(second.kv, kv)
    assert (second.row.created_at, second.row.metadata) == (first.created_at, {"tag": "a"})
    assert second.row.file != first.file
    assert files(store) == [store.folder / second.row.file]
    store.put(second.header, second.kv, "quite another text", {})
    assert store.get("doc").row.metadata == {}


def test_documents_of_every_compression_live_side_by_side(store: MemoryStore) -> None:
    kept = {}
    for compression in COMPRESSIONS:
        header, kept[compression] = sample(compression)
        store.put(replace(header, compression=compression), kept[compression], TEXT)
    assert {row.id: row.compression for row in store.list()} == {name: name for name in COMPRESSIONS}
    for name, kv in kept.items():
        found = store.get(name)
        assert found.header.compression == name
        assert same(found.kv, kv)
    assert store.verify() == []


def test_metadata_can_be_set_alone(store: MemoryStore) -> None:
    kv = put(store)
    assert store.set_metadata("doc", {"b": 1}) == store.get("doc").row
    assert same(store.get("doc").kv, kv)
    with pytest.raises(DocumentNotFoundError, match="did you mean 'doc'"):
        store.set_metadata("docs", {})


def test_what_does_not_fit_together_is_refused_and_changes_nothing(store: MemoryStore) -> None:
    kv = put(store)
    before = store.get("doc").row
    header, other = sample()
    beyond = replace(header, windows=(WindowSpan(13, 0, 0, 10_000),), tail_ids=())
    thirteen = MemoryKV.of(stack(13))
    for arguments, message in [
        ((header, other, "another text", None), "made for another text"),
        ((header, memory(13, 35), TEXT, None), "35 entries, but its windows take 6 slots"),
        ((header, other.squeezed(7), TEXT, None), "squeezed"),
        ((header, other, TEXT, {"a": {1}}), "of type set"),
        ((beyond, thirteen, TEXT, None), "ends after the text's 66 characters"),
        ((header, other, "\ud800", None), "surrogate"),
    ]:
        with pytest.raises(InputError, match=message):
            store.put(*arguments)
    assert store.get("doc").row == before
    assert same(store.get("doc").kv, kv)
    assert len(files(store)) == 1


def test_a_put_that_fails_in_the_catalog_leaves_the_old_document(store: MemoryStore) -> None:
    kv = put(store)
    before = store.list()
    with sqlite3.connect(store.folder / "catalog.sqlite3") as catalog:
        catalog.execute("CREATE TRIGGER t BEFORE INSERT ON passages BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    catalog.close()
    for id in ("doc", "new"):
        with pytest.raises(StoreError, match="disk is full"):
            put(store, id, "a text to be split anew")
    assert store.list() == before
    assert same(store.get("doc").kv, kv)
    assert store.text("doc") == TEXT
    assert len(files(store)) == 1
    assert store.verify() == []


def test_a_put_on_a_full_disk_leaves_the_old_document(store: MemoryStore) -> None:
    kv = put(store)
    child = start(
        """
        header, kv = sample(text="a new text")
        kv_store = MemoryStore(folder)
        kv_store.list()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        kv_store.put(header, kv, "a new text")
        """,
        store.folder,
    )
    assert "StoreError" in finish(child)[2]
    assert same(store.get("doc").kv, kv)
    assert store.text("doc") == TEXT
    assert len(files(store)) == 1
    assert store.verify() == []


def test_delete_removes_row_text_and_file(store: MemoryStore) -> None:
    put(store)
    put(store, "other")
    row = store.delete("doc")
    assert row.id == "doc"
    assert [path.name for path in files(store)] == [Path(store.get("other").row.file).name]
    for use in (store.get, store.text, store.delete):
        with pytest.raises(DocumentNotFoundError, match="no document 'doc' is stored"):
            use("doc")
