from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from catalog_samples import LATER, LONG_AGO
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_samples import FINGERPRINT, TEXT, finish, memory, same, sample, stack, start
from store_samples import BYTES, IN_A_FOLDER, change, files, labels, put

from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.documents import Label, Precision
from beacon_memory.errors import ConflictError, DocumentNotFoundError, InputError, StoreError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.storage.catalog.rows import Totals
from beacon_memory.storage.files.header import WindowSpan
from beacon_memory.storage.files.kv_file import read_kv_file
from beacon_memory.storage.files.label_file import StoredLabel, label_name, read_label
from beacon_memory.storage.files.stored_kv import with_precision
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.settings import Settings
from beacon_memory.storage.store import MemoryStore


@pytest.fixture
def store(open_store: Callable[[], MemoryStore]) -> MemoryStore:
    return open_store()


def test_a_store_is_the_folder_that_was_named_when_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store = MemoryStore("store")
    put(store, "one")
    monkeypatch.chdir(tmp_path / "there")
    put(store, "two")
    put(store.within("alice"), "three")
    store.close()
    assert [row.id for row in store.list()] == ["one", "two"]
    assert store.namespaces() == ["", "alice"]
    assert store.root == tmp_path / "here" / "store"
    assert [path.name for path in tmp_path.glob("*/*")] == ["store"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_stored_document_is_read_back_bit_for_bit(store: MemoryStore, dtype: torch.dtype) -> None:
    header, kv = sample(dtype=dtype)
    label = Label({"source": "test"}, ["b", "a"], pinned=True, expires_at=LATER)
    row = store.put(header, kv, TEXT, label)
    store.close()
    found = store.get("doc")
    assert (found.row, found.header) == (row, header)
    assert same(found.kv, kv)
    assert store.text("doc") == TEXT
    assert store.list() == [store.row("doc")] == [row]
    assert "doc" in store
    assert (row.tokens, row.slots, row.ratios) == (13, 6, (2, 4))
    assert row.bytes == kv.nbytes - 3 * len(kv.positions)  # places take one byte in the file
    assert store.totals() == Totals(1, row.bytes)
    assert (row.compression, f"torch.{row.precision}") == ("select", str(dtype))
    assert (row.label, row.fingerprint) == (label, FINGERPRINT.digest)
    assert [hit.document for hit in store.search("Where is the boat?")] == ["doc"]
    assert verify(store) == []


def test_a_document_is_read_in_another_dtype(store: MemoryStore) -> None:
    kv = put(store)
    assert same(store.get("doc", dtype=torch.float32).kv, kv.to(dtype=torch.float32))


@IN_A_FOLDER
def test_a_document_lies_in_a_file_that_tells_all_of_it(store: MemoryStore) -> None:
    header, kv = sample()
    label = Label({"a": 1}, ["x"])
    row = store.put(header, kv, TEXT, label, created_at=LONG_AGO)
    file = read_kv_file(store.folder / row.file)
    assert (file.header, file.text) == (header, TEXT)
    assert same(file.kv, kv)
    assert read_label(store.folder / label_name(row.file)) == StoredLabel("doc", "", LONG_AGO, label, row.updated_at)


@pytest.mark.parametrize("precision", Precision)
def test_a_document_is_kept_in_the_precision_that_is_asked_for(store: MemoryStore, precision: str) -> None:
    header, kv = sample(dtype=torch.float32)
    row = store.put(header, kv, TEXT, precision=precision)
    assert row.precision == precision
    assert same(store.read("doc")[1].kv, with_precision(kv, precision, header.window_starts))
    assert (store.get("doc").kv.keys.float() - kv.keys).abs().max() < 0.5
    store.configure(precision=precision)
    assert store.put(*sample("set"), TEXT).precision == precision
    assert store.put(*sample("as it is"), TEXT, precision="as-is").precision == "bfloat16"
    assert verify(store) == []


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
        assert verify(store) == []
        for path in files(store):
            assert path.relative_to(store.folder).as_posix().isascii()
            assert len(path.relative_to(store.folder).parts) == 3
        for id in ids:
            store.delete(id)
            assert id not in store
        assert not files(store)
    assert [path.name for path in folder.iterdir()] in ([], ["store"])


@IN_A_FOLDER
def test_reading_a_store_that_is_not_there_leaves_nothing(store: MemoryStore) -> None:
    assert [*store.list(), *store.search("anything"), *verify(store), *repair(store)] == []
    assert [*store.expire(), *store.namespaces(), store.drop_versions()] == [0]
    assert (store.totals(), store.settings) == (Totals(0, 0), Settings())
    assert "doc" not in store
    for use in (store.get, store.row, store.read, store.text, store.delete, store.update):
        with pytest.raises(DocumentNotFoundError, match="'doc'"):
            use("doc")
    for act in (store.rename, store.convert):
        with pytest.raises(DocumentNotFoundError, match="'doc'"):
            act("doc", "float16")
    store.close()
    assert not store.folder.exists()
    put(store)
    assert "doc" in store


def test_a_store_needs_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="a store needs a folder, got an empty path"):
        MemoryStore("")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; a store needs a folder"):
        MemoryStore(tmp_path / "file")


@pytest.mark.parametrize("id", ["", "\ud800", 3, None])
def test_what_is_no_id_is_in_no_store(store: MemoryStore, id: object) -> None:
    put(store)
    assert id not in store


@IN_A_FOLDER
def test_replacement_leaves_one_file_and_keeps_created_at_and_label(store: MemoryStore) -> None:
    put(store, tag="a")
    first = store.update("doc", tags=["x"], pinned=True, expires_at=LATER)
    kv = put(store, text="quite another text")
    second = store.get("doc")
    assert same(second.kv, kv)
    assert (second.row.created_at, second.row.label) == (first.created_at, first.label)
    assert second.row.file != first.file
    assert files(store) == [store.folder / second.row.file]
    assert labels(store) == [store.folder / label_name(second.row.file)]
    store.put(second.header, second.kv, "quite another text", Label())
    assert store.get("doc").row.label == Label()
    store.put(second.header, second.kv, "quite another text", created_at=LONG_AGO)
    assert store.row("doc").created_at == first.created_at


def test_documents_of_every_compression_live_side_by_side(store: MemoryStore) -> None:
    kept = {}
    for compression in BUILT_IN:
        header, kept[compression] = sample(compression)
        store.put(replace(header, compression=compression), kept[compression], TEXT)
    assert {row.id: row.compression for row in store.list()} == {name: name for name in BUILT_IN}
    for name, kv in kept.items():
        found = store.get(name)
        assert found.header.compression == name
        assert same(found.kv, kv)
    assert verify(store) == []


def test_what_does_not_fit_together_is_refused_and_changes_nothing(store: MemoryStore) -> None:
    kv = put(store)
    before = store.get("doc").row
    header, other = sample()
    beyond = replace(header, windows=(WindowSpan(13, 0, 0, 10_000, 13),), tail_ids=())
    thirteen = MemoryKV.of(stack(13))
    for arguments, message in [
        ((header, other, TEXT.upper(), None), "made for another text"),
        ((header, memory(13, 35), TEXT, None), "35 entries, but its windows take 6 slots"),
        ((header, other.interpolated(7), TEXT, None), "interpolated"),
        ((header, other.to(dtype=torch.float64), TEXT, None), "must be one of float32"),
        ((beyond, thirteen, TEXT, None), "ends after the text's 66 characters"),
        ((header, other, TEXT + "\ud800", None), "surrogate"),
    ]:
        with pytest.raises(InputError, match=message):
            store.put(*arguments)
    assert store.get("doc").row == before
    assert same(store.get("doc").kv, kv)
    with pytest.raises(InputError, match="precision='int2' must be one of"):
        store.put(header, other, TEXT, precision="int2")
    assert len(files(store)) == len(labels(store)) == 1
    assert verify(store) == []


@IN_A_FOLDER
def test_a_put_that_fails_in_the_catalog_leaves_the_old_document(store: MemoryStore) -> None:
    kv = put(store)
    before = store.list()
    change(store, "CREATE TRIGGER t BEFORE INSERT ON passages BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    for id in ("doc", "new"):
        with pytest.raises(StoreError, match="disk is full"):
            put(store, id, "a text to be split anew")
    assert store.list() == before
    assert same(store.get("doc").kv, kv)
    assert store.text("doc") == TEXT
    assert len(files(store)) == len(labels(store)) == 1
    assert verify(store) == []


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
    assert len(files(store)) == len(labels(store)) == 1
    assert verify(store) == []


@IN_A_FOLDER
def test_delete_removes_row_text_and_file(store: MemoryStore) -> None:
    put(store)
    put(store, "other")
    store.delete("doc")
    left = store.row("other").file
    assert [*files(store), *labels(store)] == [store.folder / left, store.folder / label_name(left)]
    assert store.totals() == Totals(1, BYTES)
    for use in (store.get, store.text, store.delete):
        with pytest.raises(DocumentNotFoundError, match="no document 'doc' is stored"):
            use("doc")


@IN_A_FOLDER
def test_what_is_replaced_must_be_what_was_read(store: MemoryStore) -> None:
    header, kv = sample()
    first = store.put(header, kv, TEXT)
    with pytest.raises(ConflictError, match="'doc' was changed or removed meanwhile; read it again"):
        store.put(header, kv, TEXT, replacing=replace(first, file="kv/no/file"))
    assert store.row("doc") == first
    store.update("doc", tags=["a"])  # no reason to compress it anew
    second = store.put(header, kv, TEXT, replacing=first)
    with pytest.raises(ConflictError, match="read it again"):
        store.put(*sample(text="a late text"), "a late text", replacing=first)
    assert store.row("doc") == second
    assert store.text("doc") == TEXT
    assert files(store) == [store.folder / second.file]
    store.delete("doc")
    with pytest.raises(ConflictError, match="changed or removed"):
        store.put(header, kv, TEXT, replacing=second)
    assert not files(store)
    assert verify(store) == []


@pytest.mark.parametrize(("value", "precision"), [(float("nan"), "auto"), (float("inf"), "int8"), (1e6, "float16")])
def test_kv_that_are_not_finite_are_refused(store: MemoryStore, value: float, precision: str) -> None:
    kept = put(store)
    header, kv = sample(dtype=torch.float32)
    kv.values[3, 1] = value
    with pytest.raises(InputError, match=r"value.* hold NaN or infinity; compress it anew|to inf cannot be quantized"):
        store.put(header, kv, TEXT, precision=precision)
    if value == 1e6:
        store.configure(precision="float16")
        with pytest.raises(InputError, match="kept in float16, hold NaN or infinity"):
            store.put(header, kv, TEXT)
    assert same(store.get("doc").kv, kept)
    assert verify(store) == []


def test_what_must_be_new_replaces_nothing(store: MemoryStore) -> None:
    header, kv = sample()
    store.put(header, kv, TEXT, only_new=True)
    with pytest.raises(InputError, match="'doc' would replace stored documents"):
        store.put(*sample(text="another"), "another", only_new=True)
    assert store.text("doc") == TEXT
    assert verify(store) == []
    store.update("doc", expires_at=LONG_AGO)
    store.put(*sample(text="another"), "another", only_new=True)
    assert store.text("doc") == "another"


def test_a_reader_waits_for_no_writer(store: MemoryStore) -> None:
    kv = put(store)
    found = []

    def read() -> None:
        found.append((store.get("doc"), store.text("doc"), store.list(), store.search("boat"), "doc" in store))

    with store.parts.catalog().transaction():
        store.parts.catalog().documents.delete("doc")
        reader = threading.Thread(target=read)
        reader.start()
        reader.join(timeout=20)  # it would wait for 30
        assert not reader.is_alive()
    ((document, text, rows, hits, there),) = found
    assert same(document.kv, kv)
    assert (text, [row.id for row in rows], len(hits), there) == (TEXT, ["doc"], 1, True)
    assert "doc" not in store


def test_a_closed_store_opens_again(store: MemoryStore) -> None:
    put(store)
    store.close()
    store.close()
    assert "doc" in store
    with store as same_store:
        assert same_store is store


@IN_A_FOLDER
def test_a_store_that_is_removed_under_way_is_empty_and_can_be_begun_again(store: MemoryStore) -> None:
    put(store)
    shutil.rmtree(store.folder)
    assert store.list() == []
    assert not store.folder.exists()
    put(store, "new")
    assert [row.id for row in store.list()] == ["new"]
    assert verify(store) == []
