"""What becomes of a stored document without a model: another id, another precision, versions for several models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from catalog_samples import LATER, LONG_AGO
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_samples import FINGERPRINT, TEXT, same, sample
from store_samples import BYTES, IN_A_FOLDER, change, files, labels, put, put_version, version

from beacon_memory.documents import Label, Precision
from beacon_memory.errors import ConflictError, CorruptFileError, DocumentNotFoundError, InputError
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.storage.catalog.rows import DocumentRow, Totals
from beacon_memory.storage.files.kv_file import StoredFile, read_kv_file
from beacon_memory.storage.files.stored_kv import with_precision
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore


@pytest.fixture
def store(open_store: Callable[[], MemoryStore]) -> MemoryStore:
    return open_store()


LABEL = Label({"a": 1}, ["x"], True, LATER)


@IN_A_FOLDER
@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_a_renamed_document_is_the_same_but_for_its_id(store: MemoryStore, precision: str) -> None:
    header, kv = sample()
    before = store.put(header, kv, TEXT, LABEL, precision=precision, created_at=LONG_AGO)
    stored = store.read("doc")[1]
    store.parts.catalog().documents.touch({"doc": 2 * 10**9})
    row = store.rename("doc", "new")
    assert row == store.row("new")
    assert row == replace(before, id="new", file=row.file, updated_at=row.updated_at, used_at=2 * 10**9, root=row.root)
    assert row.root == store.read("new")[1].root != before.root
    found = store.read("new")[1]
    assert same(found.kv, stored.kv)
    assert found.header == replace(stored.header, id="new")
    assert store.text("new") == found.text == TEXT
    assert [hit.document for hit in store.search("boat")] == ["new"]
    assert store.list() == store.list(tags=["x"]) == store.list(metadata={"a": 1}) == [row]
    assert "doc" not in store
    for use in (store.get, store.text, store.delete):
        with pytest.raises(DocumentNotFoundError):
            use("doc")
    assert files(store) == [store.folder / row.file]
    assert len(labels(store)) == 1
    assert verify(store) == []


@given(ids=st.lists(st.text(min_size=1, max_size=9), min_size=2, max_size=4, unique=True))
@settings(max_examples=15, deadline=None)
def test_any_id_can_be_given(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    with MemoryStore(tmp_path_factory.mktemp("any") / "store") as store:
        kv = put(store, ids[0])
        for old, new in itertools.pairwise(ids):
            store.rename(old, new)
        assert [row.id for row in store.list()] == ids[-1:]
        assert same(store.get(ids[-1]).kv, kv)
        assert store.text(ids[-1]) == TEXT
        assert len(files(store)) == 1
        assert verify(store) == []


@pytest.mark.parametrize("id", ["", "\ud800", 3, None])
def test_what_is_no_id_cannot_be_given(store: MemoryStore, id: str) -> None:
    put(store)
    with pytest.raises(InputError, match="document id"):
        store.rename("doc", id)
    assert "doc" in store
    assert verify(store) == []


def test_a_taken_id_cannot_be_given(store: MemoryStore) -> None:
    kept = {id: put(store, id) for id in ("doc", "other")}
    for id in kept:
        with pytest.raises(InputError, match=f"'{id}' is the id of another document; remove that first"):
            store.rename("doc", id)
    for id, kv in kept.items():
        assert same(store.get(id).kv, kv)
    assert len(files(store)) == len(labels(store)) == 2
    assert verify(store) == []


@IN_A_FOLDER
def test_a_renamed_document_survives_the_loss_of_the_catalog(store: MemoryStore) -> None:
    kv = put(store, a=1)
    created_at = store.row("doc").created_at
    store.rename("doc", "new")
    store.close()
    (store.folder / "catalog.sqlite3").unlink()
    repair(store)
    assert same(store.get("new").kv, kv)
    assert (store.row("new").metadata, store.row("new").created_at) == ({"a": 1}, created_at)
    assert "doc" not in store


@IN_A_FOLDER
def test_a_document_that_was_replaced_meanwhile_is_not_renamed(store: MemoryStore) -> None:
    put(store)

    class Interrupted(MemoryStore):
        def read(self, document: str | DocumentRow, fingerprint: str | None = None) -> tuple[DocumentRow, StoredFile]:
            found = super().read(document, fingerprint)
            put(store, text="quite another text")
            return found

    with pytest.raises(ConflictError, match="'doc' was changed or removed meanwhile; read it again"):
        Interrupted(store.folder).rename("doc", "new")
    assert [row.id for row in store.list()] == ["doc"]
    assert len(files(store)) == 1
    assert verify(store) == []


@IN_A_FOLDER
@pytest.mark.parametrize(("now", "wanted"), [(a, b) for a in Precision for b in Precision if a != b])
def test_a_document_is_converted_unless_the_wanted_bits_are_gone(store: MemoryStore, now: str, wanted: str) -> None:
    header, kv = sample(dtype=torch.float32)
    before = store.put(header, kv, TEXT, LABEL, precision=now, created_at=LONG_AGO)
    stored = store.read("doc")[1].kv
    if isinstance(stored, QuantizedKV) and not (now == "int8" and wanted == "int4"):
        with pytest.raises(InputError, match=f"{now} K/V hold no more than that: to keep them as {wanted}, compress"):
            store.convert("doc", wanted)
        assert store.row("doc") == before
    else:
        row = store.convert("doc", wanted)
        assert row == store.row("doc")
        assert row.precision == wanted
        assert (row.label, row.created_at, row.content_hash) == (LABEL, LONG_AGO, before.content_hash)
        assert same(store.read("doc")[1].kv, with_precision(stored, wanted, header.window_starts))
    assert store.text("doc") == read_kv_file(store.folder / store.row("doc").file).text == TEXT
    assert len(files(store)) == len(labels(store)) == 1
    assert store.totals() == Totals(1, store.row("doc").bytes)
    assert verify(store) == []


def test_converting_to_what_it_is_does_nothing(store: MemoryStore) -> None:
    put(store)
    before = store.row("doc")
    assert store.convert("doc", "bfloat16") == before == store.row("doc")
    with pytest.raises(InputError, match="precision='int2'"):
        store.convert("doc", "int2")
    with pytest.raises(InputError, match="precision='auto'"):
        store.convert("doc", "auto")


def test_conversion_ignores_what_the_settings_say(store: MemoryStore) -> None:
    store.configure(precision="float32")
    put(store)
    assert store.convert("doc", "int4").precision == "int4"


def test_smaller_precisions_take_less_room(store: MemoryStore) -> None:
    header, kv = sample(dtype=torch.float32)
    kv = replace(kv, keys=torch.randn(36, 64), values=torch.randn(36, 64))  # wide enough to be worth a scale each
    sizes = [store.put(header, kv, TEXT, precision=precision).bytes for precision in Precision]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] == sizes[2] == 36 * (2 * 64 * 2 + 1)


def test_a_version_is_kept_for_readers_of_the_other_model(store: MemoryStore) -> None:
    kept = {adapter: put_version(store, adapter) for adapter in ("a", "b", "c")}
    for adapter, kv in kept.items():
        found = store.get("doc", fingerprint=version(adapter))
        assert same(found.kv, kv)
        assert found.header.fingerprint.adapter == adapter
        assert found.row.fingerprint == version(adapter)
        assert store.read("doc", version(adapter))[0] == found.row == store.row("doc", version(adapter))
    assert same(store.get("doc").kv, kept["c"])
    assert same(store.get("doc", fingerprint="unknown").kv, kept["c"])
    assert [row.fingerprint for row in store.list()] == [version("c")]
    assert store.totals() == Totals(1, 3 * BYTES)
    assert len(files(store)) == 3
    assert verify(store) == []


def test_a_version_has_the_label_that_its_document_has_now(store: MemoryStore) -> None:
    put_version(store, "a")
    put_version(store, "b")
    store.update("doc", tags=["x"], metadata={"n": 1}, expires_at=LATER)
    assert store.row("doc", version("a")).label == Label({"n": 1}, ["x"], False, LATER)
    store.update("doc", expires_at=LONG_AGO)
    with pytest.raises(DocumentNotFoundError):
        store.get("doc", fingerprint=version("a"))


def test_versions_are_dropped_together(store: MemoryStore) -> None:
    for id in ("one", "other"):
        put_version(store, "a", id)
        put_version(store, "b", id)
    put(store, "third")
    assert store.drop_versions() == 2
    assert store.drop_versions() == 0
    assert store.row("one", version("a")).fingerprint == version("b")
    assert store.totals() == Totals(3, 3 * BYTES)
    assert len(files(store)) == len(labels(store)) == 3
    assert verify(store) == []


def test_a_version_of_the_same_model_is_replaced(store: MemoryStore) -> None:
    put_version(store, "a")
    put_version(store, "b")
    again = put_version(store, "b")
    assert len(files(store)) == 2
    back = put_version(store, "a")  # its old version gives way, and b is kept
    assert same(store.get("doc").kv, back)
    assert same(store.get("doc", fingerprint=version("b")).kv, again)
    assert len(files(store)) == len(labels(store)) == 2
    assert verify(store) == []


@pytest.mark.parametrize("how", ["text", "no keep", "delete", "rename", "expire"])
def test_versions_go_with_what_they_are_of(store: MemoryStore, how: str) -> None:
    put_version(store, "a")
    put_version(store, "b")
    match how:
        case "text":
            put_version(store, "c", text="quite another text")
        case "no keep":
            put_version(store, "c", keep_version=False)
        case "delete":
            store.delete("doc")
        case "rename":
            store.rename("doc", "new")
        case "expire":
            store.update("doc", expires_at=LONG_AGO)
            store.expire()
    left = store.totals().documents
    assert left == (how in ("text", "no keep", "rename"))
    assert len(files(store)) == len(labels(store)) == left
    assert store.totals().bytes == left * BYTES
    assert [*store.parts.catalog().versions.scan()] == []
    assert verify(store) == []


def test_conversion_keeps_the_versions_of_other_models(store: MemoryStore) -> None:
    kv = put_version(store, "a")
    put_version(store, "b")
    store.convert("doc", "int8")
    assert store.row("doc").precision == "int8"
    assert same(store.get("doc", fingerprint=version("a")).kv, kv)
    assert len(files(store)) == 2
    assert verify(store) == []


@IN_A_FOLDER
def test_a_damaged_version_is_an_error_only_to_those_who_want_it(store: MemoryStore) -> None:
    put_version(store, "a")
    kv = put_version(store, "b")
    change(store, "UPDATE versions SET record = replace(record, 'select', 'selekt')")
    assert same(store.get("doc").kv, kv)
    assert same(store.get("doc", fingerprint=version("b")).kv, kv)
    assert same(store.get("doc", fingerprint="unknown").kv, kv)
    with pytest.raises(CorruptFileError, match="a kept version of 'doc' is damaged"):
        store.get("doc", fingerprint=version("a"))


def test_the_fingerprint_of_a_sample_is_that_of_its_ingredients() -> None:
    assert version(FINGERPRINT.adapter) == FINGERPRINT.digest != version("a")
