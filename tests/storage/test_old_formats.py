"""A store whose files are of an older format: listed and searched as ever, and made anew from its texts."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from kv_samples import TEXT, same, sample
from old_formats import write_old_store
from store_samples import files
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory.config import BeaconConfig
from beacon_memory.documents import Label
from beacon_memory.errors import CorruptFileError
from beacon_memory.memory import BeaconMemory
from beacon_memory.storage.catalog.rows import Totals
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

OLD = {"doc": TEXT, "other": "Another text, about pears."}
ADVICE = "has format 4 of an older beacon_memory, which this one does not read: `beacon-memory recompress` makes"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    write_old_store(tmp_path / "store", OLD)
    return tmp_path / "store"


def test_rows_and_texts_are_there_and_kv_are_refused_with_advice(old: Path) -> None:
    with MemoryStore(old) as store:
        assert [row.id for row in store.list()] == ["doc", "other"]
        assert [row.id for row in store.list(metadata={"n": 1})] == ["other"]
        assert {id: store.text(id) for id in OLD} == OLD
        assert [hit.document for hit in store.search("pears")] == ["other"]
        assert store.totals() == Totals(2, 2048)
        for use in (store.get, store.read, lambda id: store.rename(id, "new"), lambda id: store.convert(id, "int8")):
            with pytest.raises(CorruptFileError, match=ADVICE):
                use("doc")
        assert store.update("doc", tags=["a"]).label == Label({"n": 0}, ["a"])


def test_repair_without_a_model_reports_files_and_renews_labels(old: Path) -> None:
    before = {path: path.read_bytes() for path in old.rglob("*.safetensors")}
    with MemoryStore(old) as store:
        for problems in (verify(store), repair(store)):
            assert {(problem.kind, problem.document) for problem in problems} == {
                (kind, id) for kind in ("damaged-file", "stale-label") for id in OLD
            }
            assert all(ADVICE in problem.message for problem in problems if problem.kind == "damaged-file")
        assert [(problem.kind, problem.mended) for problem in repair(store)] == [("damaged-file", False)] * 2
        assert {path: path.read_bytes() for path in files(store)} == before
        assert store.text("doc") == TEXT


def test_without_a_catalog_files_are_kept_and_reported(old: Path) -> None:
    (old / "catalog.sqlite3").unlink()
    with MemoryStore(old) as store:
        for look in (verify, repair, repair):
            assert [(problem.kind, problem.mended) for problem in look(store)] == [("lost-row", False)] * 2
        assert len(files(store)) == 2
        assert store.list() == []


def test_a_damaged_row_takes_its_text_from_the_catalog(old: Path) -> None:
    with MemoryStore(old) as store:
        store.update("doc", tags=["a"])
        with closing(sqlite3.connect(old / "catalog.sqlite3")) as db:
            db.execute("UPDATE documents SET compression = 'sele\x01t' WHERE id = 'doc'")
            db.commit()
        assert ("damaged-row", True) in [(problem.kind, problem.mended) for problem in repair(store)]
        assert store.text("doc") == TEXT
        assert store.row("doc").label == Label({"n": 0}, ["a"])


def test_a_document_is_replaced_and_the_others_stay(old: Path) -> None:
    with MemoryStore(old) as store:
        header, kv = sample()
        created = store.row("doc").created_at
        store.put(header, kv, TEXT)
        assert same(store.get("doc").kv, kv)
        assert (store.row("doc").created_at, store.row("doc").metadata) == (created, {"n": 0})
        assert len(files(store)) == 2
        repair(store)
        assert [(problem.kind, problem.document) for problem in verify(store)] == [("damaged-file", "other")]


def test_recompressing_makes_all_documents_anew(old: Path) -> None:
    model = tiny_model("llama", BeaconConfig(beacon_window=32), tokenizer=tiny_tokenizer())
    memory = BeaconMemory(old, model, reserve=100)
    with pytest.raises(CorruptFileError, match=ADVICE):
        memory.ask("Who?", "doc", max_new_tokens=2)
    rows = {row.id: row for row in memory.list()}
    assert [(one.id, one.status) for one in memory.recompress()] == [(id, "recompressed") for id in OLD]
    assert memory.verify() == []
    for id, text in OLD.items():
        row, file = memory.store.read(id)
        assert (file.text, memory.store.text(id)) == (text, text)
        assert (row.fingerprint, row.ratios, row.compression) == (model.fingerprint.digest, (2,), "select")
        assert (row.created_at, row.label) == (rows[id].created_at, rows[id].label)
    assert len(files(memory.store)) == 2
    assert memory.recompress() == []


def test_documents_of_the_same_model_are_made_anew_too(old: Path) -> None:
    """What a document was made with is what this model makes: only the format differs."""
    model = tiny_model("llama", BeaconConfig(beacon_window=32), tokenizer=tiny_tokenizer())
    with closing(sqlite3.connect(old / "catalog.sqlite3")) as db:
        db.execute("UPDATE documents SET fingerprint = ?", [model.fingerprint.digest])
        db.commit()
    memory = BeaconMemory(old, model, reserve=100)
    assert memory.add("doc", TEXT, ratio=4, compression="select").status == "replaced"
    assert [one.id for one in memory.recompress()] == ["other"]
    assert memory.verify() == []
