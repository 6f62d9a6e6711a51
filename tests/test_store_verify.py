from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from kv_samples import FINGERPRINT, TEXT, same, sample
from store_samples import files, put

from beacon_memory.errors import CorruptFileError
from beacon_memory.kv_file import WindowSpan, write_kv_file
from beacon_memory.store import MemoryStore


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(tmp_path / "store")


def test_a_missing_file_is_reported_and_its_row_and_text_are_kept(store: MemoryStore) -> None:
    put(store)
    (path,) = files(store)
    path.unlink()
    with pytest.raises(CorruptFileError, match="of 'doc' is missing; add it again"):
        store.get("doc")
    (problem,) = store.verify(repair=True)
    assert (problem.kind, problem.document, problem.path, problem.removed) == ("missing-file", "doc", path, False)
    assert store.text("doc") == TEXT
    kv = put(store)
    assert same(store.get("doc").kv, kv)
    assert store.verify() == []


def test_a_damaged_file_is_reported_and_kept(store: MemoryStore) -> None:
    put(store)
    put(store, "sound")
    path = store.folder / store.get("doc").row.file
    whole = path.read_bytes()
    for position in range(0, len(whole), 97):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        (problem,) = store.verify(repair=True)
        assert (problem.kind, problem.document, problem.path, problem.removed) == ("damaged-file", "doc", path, False)
        assert str(path) in problem.message
    path.write_bytes(whole[:-10])
    with pytest.raises(CorruptFileError, match="not a whole safetensors file"):
        store.get("doc")
    assert store.get("sound").row.id == "sound"
    put(store)
    assert store.verify() == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"id": "another"}, "id"),
        ({"content_hash": "0" * 64}, "content hash"),
        ({"compression": "hybrid"}, "compression"),
        ({"fingerprint": replace(FINGERPRINT, adapter="another")}, "fingerprint"),
        ({"windows": (WindowSpan(16, 4, 0, 1), WindowSpan(5, 4, 1, 2)), "tokens": 21}, "number of tokens"),
    ],
)
def test_a_file_of_another_document_is_refused(store: MemoryStore, change: dict[str, object], named: str) -> None:
    put(store)
    header, kv = sample()
    (path,) = files(store)
    write_kv_file(path, replace(header, **change), kv)  # type: ignore[arg-type]  # by field name
    with pytest.raises(CorruptFileError, match=f"disagrees with its row in the {named}; add 'doc' again"):
        store.get("doc")
    (problem,) = store.verify()
    assert (problem.kind, problem.document) == ("mismatched-file", "doc")
    assert path.exists()


def test_files_of_a_lost_catalog_are_reported_and_kept(store: MemoryStore) -> None:
    put(store)
    store.close()
    (path,) = files(store)
    for catalog in store.folder.glob("catalog.sqlite3*"):
        catalog.unlink()
    os.utime(path, (path.stat().st_mtime - 60,) * 2)
    put(store, "new")
    (problem,) = store.verify(repair=True)
    assert (problem.kind, problem.document, problem.path, problem.removed) == ("orphan-file", "doc", path, False)
    assert "older than the catalog" in problem.message
    assert path.exists()
