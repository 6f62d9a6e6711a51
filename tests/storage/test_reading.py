"""Reading a document by its id, or by a row that was read before, while others change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kv_samples import same
from store_samples import put, put_version, version

from beacon_memory.errors import DocumentNotFoundError, MissingFileError
from beacon_memory.storage.store import MemoryStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store") as store:
        yield store


def row_reads(store: MemoryStore, act: Callable[[], object]) -> int:
    """How often rows of documents are read while `act` runs, counted by SQLite."""
    statements: list[str] = []
    with store.parts.catalog().connections.use() as db:
        db.conn.set_trace_callback(statements.append)
        act()
        db.conn.set_trace_callback(None)
    return sum("content_hash" in statement and "FROM documents" in statement for statement in statements)


def test_a_row_at_hand_is_not_read_again(store: MemoryStore) -> None:
    kv = put(store)
    row = store.row("doc")
    assert row_reads(store, lambda: store.get("doc")) == 1
    assert row_reads(store, lambda: store.get(row)) == 0
    assert same(store.get(row).kv, kv)
    assert store.read(row)[0] == row


def test_a_row_of_a_document_that_was_replaced_is_read_anew(store: MemoryStore) -> None:
    put(store)
    row = store.row("doc")
    put(store, text="quite another text")
    found = store.get(row)
    assert found.row == store.row("doc") != row
    assert found.header.content_hash == found.row.content_hash


def test_a_row_of_a_document_that_is_gone_finds_nothing(store: MemoryStore) -> None:
    put(store)
    row = store.row("doc")
    store.delete("doc")
    with pytest.raises(DocumentNotFoundError, match="'doc'"):
        store.get(row)


def test_a_row_whose_file_is_missing_says_so(store: MemoryStore) -> None:
    put(store)
    row = store.row("doc")
    (store.folder / row.file).unlink()
    for document in ("doc", row):
        with pytest.raises(MissingFileError, match=f"{row.file} of 'doc' is missing; `beacon-memory repair` mends it"):
            store.get(document)


def test_a_version_whose_place_is_taken_is_read_anew_for_the_same_model(store: MemoryStore) -> None:
    put_version(store, "old")
    put_version(store, "new")
    kept = store.row("doc", version("old"))
    assert kept.fingerprint == version("old")
    assert store.get(kept, fingerprint=version("old")).row == kept
    store.drop_versions()
    found = store.get(kept, fingerprint=version("old"))
    assert found.row == store.row("doc")
    assert found.row.fingerprint == version("new")
