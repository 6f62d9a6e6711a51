"""Whatever happens to the bytes of a store: what is read is right or an error, and `repair` brings back what it can."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from damage import FORMS, Damage, damages, file_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_memory import folder_in_memory
from kv_samples import FINGERPRINT, TEXT, same, sample
from store_samples import change, put, put_version, version

from beacon_memory.documents import Label
from beacon_memory.errors import BeaconMemoryError, CorruptFileError, MismatchedFileError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.storage.catalog.full_text import PassageHit
from beacon_memory.storage.catalog.rows import DocumentRow, Totals
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.kv_file import read_header, read_kv_file
from beacon_memory.storage.files.label_file import label_name
from beacon_memory.storage.files.stored_kv import StoredKV
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.settings import Settings
from beacon_memory.storage.store import MemoryStore

Read = TypeVar("Read")
LATER = "2099-01-01T00:00:00.000+00:00"
often = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: these tests sync thousands of files, and no power is cut."""
    path = folder_in_memory()
    yield path
    shutil.rmtree(path)


def tried(read: Callable[[], Read]) -> Read | BeaconMemoryError:
    """What `read` returns, or which of our errors it raises; any other one is a failed test."""
    try:
        return read()
    except BeaconMemoryError as error:
        return error


def equal(ours: StoredKV, theirs: StoredKV) -> bool:
    """Equal bit for bit."""
    if isinstance(ours, QuantizedKV) and isinstance(theirs, QuantizedKV):
        return ours.bits == theirs.bits and same(ours.dequantized(torch.float32), theirs.dequantized(torch.float32))
    return isinstance(ours, MemoryKV) and isinstance(theirs, MemoryKV) and same(ours, theirs)


# K/V files


@cache
def _file(form: str) -> tuple[bytes, DocumentHeader, StoredKV]:
    return file_of(form)


@pytest.mark.parametrize("form", FORMS)
def test_an_undamaged_file_of_any_form_is_read(tmp_path: Path, form: str) -> None:
    data, header, kv = _file(form)
    (tmp_path / "a.safetensors").write_bytes(data)
    file = read_kv_file(tmp_path / "a.safetensors")
    assert file.header == header == read_header(tmp_path / "a.safetensors")
    assert equal(file.kv, kv)
    assert file.text == TEXT


@pytest.mark.parametrize("form", FORMS)
@given(damage=damages)
@settings(often, max_examples=200)
def test_a_damaged_file_is_refused_or_read_as_it_was(folder: Path, form: str, damage: Damage) -> None:
    path = folder / "a.safetensors"
    data, header, kv = _file(form)
    path.write_bytes(damage.done_to(data))
    file, read = tried(lambda: read_kv_file(path)), tried(lambda: read_header(path))
    for error in (file, read):
        if isinstance(error, BeaconMemoryError):
            assert isinstance(error, CorruptFileError)
            assert str(path) in str(error)
            assert len(str(error)) < 1000 + len(str(path))
    if not isinstance(file, BeaconMemoryError):
        assert file.header == header
        assert equal(file.kv, kv)
        assert file.text == TEXT
    assert isinstance(read, BeaconMemoryError) or read == header


def test_no_flipped_bit_of_a_tensor_goes_unnoticed(folder: Path) -> None:
    path = folder / "a.safetensors"
    for form in FORMS:
        data, _, _ = _file(form)
        start = 8 + int.from_bytes(data[:8], "little")
        for where in range(start, len(data), 7):
            path.write_bytes(data[:where] + bytes([data[where] ^ 1 << where % 8]) + data[where + 1 :])
            with pytest.raises(CorruptFileError, match=r"a\.safetensors"):
                read_kv_file(path)


class Filled:
    """A store and what must be read from it: K/V, text and row of each document."""

    def __init__(self, store: MemoryStore, known: dict[str, tuple[MemoryKV, str, DocumentRow]]) -> None:
        self.store = store
        self.known = known

    @classmethod
    def of(cls, store: MemoryStore) -> Filled:
        known = {row.id: (store.get(row.id).kv, store.text(row.id), row) for row in store.list()}
        return cls(store, known)

    def copied(self, folder: Path) -> Filled:
        """Everything once more, the log of the catalog too, as a backup or a crash finds it."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.store.folder, folder, ignore=shutil.ignore_patterns("*-shm"))
        return Filled(MemoryStore(folder), dict(self.known))

    def assert_whole(self) -> None:
        """The store is sound, all documents are there, and nothing of them has changed."""
        store = self.store
        assert verify(store) == []
        assert [_told(row) for row in store.list()] == [_told(row) for _, _, row in self.known.values()]
        for id, (kv, text, _) in self.known.items():
            assert same(store.get(id).kv, kv)
            assert store.text(id) == text


def _told(row: DocumentRow) -> DocumentRow:
    """What a row says of its document, and not of itself."""
    return replace(row, used_at=0, updated_at="")


@pytest.fixture(scope="module")
def of_all_forms(folder: Path) -> Iterator[Filled]:
    """A store with a file of every form."""
    with MemoryStore(folder / "forms") as store:
        for form in FORMS:
            _, header, kv = file_of(form, form)
            store.put(header, kv, TEXT, Label({"form": form}, ("old", "x"), pinned=True), precision="as-is")
        filled = Filled.of(store)
        filled.assert_whole()
        yield filled


@given(damage=damages, form=st.sampled_from(FORMS))
@often
def test_a_damaged_file_in_a_store_keeps_its_text_and_row_and_hurts_no_other(
    of_all_forms: Filled, folder: Path, damage: Damage, form: str
) -> None:
    filled = of_all_forms.copied(folder / "copy")
    store, known = filled.store, filled.known
    kv, text, row = known[form]
    path = store.folder / row.file
    damaged = damage.done_to(path.read_bytes())
    path.write_bytes(damaged)
    with store:
        read = tried(lambda: store.get(form))
        harmed = isinstance(read, BeaconMemoryError)
        assert row.file in str(read) if isinstance(read, BeaconMemoryError) else same(read.kv, kv)
        found = [(problem.kind, problem.document, problem.path) for problem in verify(store)]
        assert found == ([("damaged-file", form, row.file)] if harmed else [])
        assert [problem.mended for problem in repair(store)] == [False] * harmed
        assert path.read_bytes() == damaged
        assert store.text(form) == text
        assert [_told(one) for one in store.list()] == [_told(one) for _, _, one in known.values()]
        assert all(same(store.get(id).kv, known[id][0]) for id in known if id != form)
        if harmed:
            put(store, form)
            known[form] = (store.get(form).kv, text, store.row(form))
        filled.assert_whole()


def test_files_swapped_between_documents_are_refused_and_named(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store") as store:
        for id in ("a", "b"):
            put(store, id)
        first, second = (store.folder / store.row(id).file for id in ("a", "b"))
        one, other = first.read_bytes(), second.read_bytes()
        first.write_bytes(other)
        second.write_bytes(one)
        for id in ("a", "b"):
            with pytest.raises(
                CorruptFileError,
                match=f"{store.row(id).file} disagrees with its row in the id, hash of the whole file;",
            ):
                store.get(id)
        assert [(problem.kind, problem.document) for problem in repair(store)] == [
            ("mismatched-file", "a"),
            ("mismatched-file", "b"),
        ]
        assert [store.text("a"), store.text("b")] == [TEXT, TEXT]
        first.write_bytes(one)
        second.write_bytes(other)
        assert verify(store) == []


@pytest.mark.parametrize("change", ["text", "model", "precision"])
def test_a_file_of_an_earlier_version_or_of_another_store_is_refused(tmp_path: Path, change: str) -> None:
    with MemoryStore(tmp_path / "store") as store, MemoryStore(tmp_path / "other") as other:
        header, kv = sample()
        old_text = "Something else altogether." if change == "text" else TEXT
        old_header, old_kv = sample("doc", old_text)
        if change == "model":
            old_header = replace(old_header, fingerprint=replace(FINGERPRINT, adapter="another"))
        precision = "int8" if change == "precision" else "auto"
        before = other.put(old_header, old_kv, old_text, precision=precision)
        row = store.put(header, kv, TEXT)
        whole = (store.folder / row.file).read_bytes()
        shutil.copy(other.folder / before.file, store.folder / row.file)
        with pytest.raises(CorruptFileError, match="disagrees with its row in the"):
            store.get("doc")
        assert [(problem.kind, problem.mended) for problem in repair(store)] == [("mismatched-file", False)]
        assert store.text("doc") == TEXT
        (store.folder / row.file).write_bytes(whole)
        assert same(store.get("doc").kv, kv)
        assert verify(store) == []


def test_an_older_file_of_the_same_text_is_not_taken_for_the_newer(tmp_path: Path) -> None:
    """Only the root tells them apart: text, model, method, precision and sizes are the same."""
    with MemoryStore(tmp_path / "store") as store:
        header, kv = sample()
        before = store.put(header, kv, TEXT)
        old = (store.folder / before.file).read_bytes()
        newer = replace(kv, keys=kv.keys + 1)
        row = store.put(header, newer, TEXT)
        path = store.folder / row.file
        whole = path.read_bytes()
        path.write_bytes(old)
        with pytest.raises(MismatchedFileError, match="disagrees with its row in the hash of the whole file;"):
            store.get("doc")
        for look in (verify, repair):
            assert [(problem.kind, problem.mended) for problem in look(store)] == [("mismatched-file", False)]
        assert (path.read_bytes(), store.text("doc")) == (old, TEXT)
        path.write_bytes(whole)
        assert same(store.get("doc").kv, newer)
        assert verify(store) == []


def test_files_swapped_between_versions_of_a_document_are_refused(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store") as store:
        put_version(store, "old")
        put_version(store, "new")
        kept, now = store.row("doc", version("old")), store.row("doc")
        paths = [store.folder / row.file for row in (kept, now)]
        one, other = (path.read_bytes() for path in paths)
        paths[0].write_bytes(other)
        paths[1].write_bytes(one)
        for fingerprint in (version("old"), version("new")):
            with pytest.raises(CorruptFileError, match="disagrees with its row in the fingerprint"):
                store.get("doc", fingerprint=fingerprint)
        assert {(problem.kind, problem.document) for problem in verify(store)} >= {("mismatched-file", "doc")}
        repair(store)
        assert (store.text("doc"), store.row("doc")) == (TEXT, now)


@given(damage=damages)
@often
def test_a_damaged_label_harms_nothing_and_is_written_anew(of_all_forms: Filled, folder: Path, damage: Damage) -> None:
    filled = of_all_forms.copied(folder / "copy")
    row = filled.known["int8"][2]
    path = filled.store.folder / label_name(row.file)
    whole = path.read_bytes()
    path.write_bytes(damage.done_to(whole))
    with filled.store as store:
        assert same(store.get("int8").kv, filled.known["int8"][0])
        expected = [("stale-label", "int8")] if path.read_bytes() != whole else []
        assert [(problem.kind, problem.document) for problem in verify(store)] == expected
        assert all(problem.mended for problem in repair(store))
        assert path.read_bytes() == whole
        filled.assert_whole()


def test_swapped_labels_are_written_anew(of_all_forms: Filled, folder: Path) -> None:
    filled = of_all_forms.copied(folder / "copy")
    with filled.store as store:
        first, second = (store.folder / label_name(filled.known[id][2].file) for id in ("int4", "int8"))
        one, other = first.read_bytes(), second.read_bytes()
        first.write_bytes(other)
        second.write_bytes(one)
        assert [(problem.kind, problem.mended) for problem in repair(store)] == [("stale-label", True)] * 2
        assert (first.read_bytes(), second.read_bytes()) == (one, other)
        filled.assert_whole()


@given(damage=damages)
@often
def test_with_the_catalog_gone_a_damaged_label_costs_no_more_than_what_it_said(
    of_all_forms: Filled, folder: Path, damage: Damage
) -> None:
    filled = of_all_forms.copied(folder / "copy")
    row = filled.known["int8"][2]
    path = filled.store.folder / label_name(row.file)
    path.write_bytes(damage.done_to(path.read_bytes()))
    for catalog in filled.store.folder.glob("catalog.sqlite3*"):
        catalog.unlink()
    with filled.store as store:
        repair(store)
        for id in ("bfloat16", "float32", "int8", "int4"):
            assert same(store.get(id).kv, filled.known[id][0])
            assert store.text(id) == TEXT
            if id != "int8":
                assert _told(store.row(id)) == _told(filled.known[id][2])
        assert store.row("int8").label in (row.label, Label())


# The catalog


@pytest.fixture(scope="module")
def open_store(folder: Path) -> Iterator[Filled]:
    """A store in use, of which the last commits are in the log of the catalog."""
    with MemoryStore(folder / "open") as store:
        for number in range(6):
            id = f"doc {number}" + "é" * (number % 3)
            text = f"{TEXT} It is number {number}. " + "Lorem ipsum dolor sit amet. " * (number * 40)
            header, kv = sample(id, text)
            label = Label(
                {"n": number, "deep": {"a": [1, "ü"]}},
                (f"t{number % 2}", "all"),
                pinned=number % 2 == 0,
                expires_at=LATER if number % 3 == 1 else None,
            )
            precision = ("auto", "int8", "int4", "float16", "auto", "auto")[number]
            store.put(header, kv, text, label, precision=precision)
        yield Filled.of(store)


@pytest.fixture(scope="module")
def closed_store(open_store: Filled, folder: Path) -> Filled:
    """The same, with an empty log."""
    filled = open_store.copied(folder / "closed")
    filled.assert_whole()
    filled.store.close()
    assert not (filled.store.folder / "catalog.sqlite3-wal").exists()
    return filled


def _hits(store: MemoryStore) -> list[PassageHit]:
    hits = store.search("number lorem harbour", 1000)
    return sorted((replace(hit, score=0.0) for hit in hits), key=lambda hit: (hit.document, hit.ordinal))


FILTERS: tuple[tuple[dict[str, Any], Callable[[DocumentRow], bool]], ...] = (
    ({}, bool),
    ({"tags": ["t1"]}, lambda row: "t1" in row.tags),
    ({"metadata": {"n": 2}}, lambda row: row.metadata["n"] == 2),
    ({"prefix": "doc 4"}, lambda row: row.id.startswith("doc 4")),
)


def _survey(filled: Filled, hits: list[PassageHit]) -> list[object]:
    """Use all that reads: what is read of a document is right. Returns what could not be read, or was not all."""
    store, known, missed = filled.store, filled.known, []

    def missing(read: Callable[[], Read], expected: object = None) -> Read | None:
        """What is read, unless it is an error."""
        result = tried(read)
        if isinstance(result, BeaconMemoryError) or (expected is not None and result != expected):
            missed.append(result)
        return None if isinstance(result, BeaconMemoryError) else result

    for id, (kv, text, row) in known.items():
        document = missing(partial(store.get, id))
        assert document is None or same(document.kv, kv)
        assert missing(partial(store.text, id)) in (None, text)
        assert (found := missing(partial(store.row, id))) is None or _told(found) == _told(row)
        missing(partial(store.__contains__, id), expected=True)
    rows = {id: _told(row) for id, (_, _, row) in known.items()}
    for filters, fits in FILTERS:
        listed = missing(partial(store.list, **filters)) or []
        assert all(_told(row) == rows[row.id] for row in listed)
        if {row.id for row in listed} != {row.id for row in rows.values() if fits(row)}:
            missed.append(filters)
    missing(partial(_hits, store), expected=[hit for hit in hits if hit.document in known])
    missing(store.totals, expected=Totals(len(rows), sum(row.bytes for row in rows.values())))
    missing(lambda: store.settings, expected=Settings())
    missing(store.namespaces, expected=[""])
    return missed


def _write(filled: Filled) -> MemoryKV:
    """Use all that writes; what is refused has not happened to a document that was there. Returns a new one's K/V."""
    store, known = filled.store, filled.known
    header, kv = sample("new")
    with contextlib.suppress(BeaconMemoryError):
        known["new"] = (kv, TEXT, store.put(header, kv, TEXT, Label(tags=("new",))))
    for id in ("doc 1é", "doc 5éé"):
        with contextlib.suppress(BeaconMemoryError):
            known[id] = (*known[id][:2], store.update(id, tags=["updated"]))
    with contextlib.suppress(BeaconMemoryError):
        store.delete("doc 3")
        del known["doc 3"]
    return kv


def _spoiled(open_store: Filled, closed_store: Filled, folder: Path, end: str, damage: Damage) -> Filled:
    """A copy of the store with a damaged catalog, or log of the catalog."""
    filled = (open_store if end else closed_store).copied(folder)
    path = filled.store.folder / f"catalog.sqlite3{end}"
    path.write_bytes(damage.done_to(path.read_bytes()))
    return filled


def test_who_keeps_an_error_does_not_keep_the_store_from_being_repaired(tmp_path: Path) -> None:
    """An error holds the frames that it went through, and whatever they were reading."""
    with MemoryStore(tmp_path / "store") as store:
        kv = put(store, "a")
        put(store, "b")
        change(store, "UPDATE documents SET slots = 7 WHERE id = 'a'")
        kept = [tried(read) for read in (store.list, partial(store.get, "a"), partial(store.update, "a", pinned=True))]
        assert all(isinstance(error, CorruptFileError) for error in kept)
        assert all(problem.mended for problem in repair(store))
        assert verify(store) == []
        assert same(store.get("a").kv, kv)


def test_no_byte_of_the_catalogs_first_lines_keeps_it_from_being_repaired(
    open_store: Filled, closed_store: Filled, folder: Path
) -> None:
    """SQLite's header says among other things that a database must not be written."""
    hits = _hits(open_store.store)
    whole = (closed_store.store.folder / "catalog.sqlite3").read_bytes()
    for where in range(100):
        filled = closed_store.copied(folder / "copy")
        flipped = bytes([whole[where] ^ (1, 0xFF)[where % 2]])
        (filled.store.folder / "catalog.sqlite3").write_bytes(whole[:where] + flipped + whole[where + 1 :])
        with filled.store as store:
            missed = _survey(filled, hits)
            assert verify(store) or not missed, where
            repair(store)
            filled.assert_whole()


@pytest.mark.parametrize("end", ["", "-wal"])
@given(damage=damages)
@settings(often, max_examples=50)
def test_a_damaged_catalog_misleads_nobody_and_is_made_anew(
    open_store: Filled, closed_store: Filled, folder: Path, end: str, damage: Damage
) -> None:
    """The last commits of a damaged log are lost, and come back from the files."""
    filled = _spoiled(open_store, closed_store, folder / "copy", end, damage)
    hits = _hits(open_store.store)
    with filled.store as store:
        missed = _survey(filled, hits)
        assert verify(store) or not missed
        repair(store)
        filled.assert_whole()
        assert _survey(filled, hits) == []


@pytest.mark.parametrize("end", ["", "-wal"])
@given(damage=damages)
@settings(often, max_examples=30)
def test_who_goes_on_writing_to_a_damaged_catalog_loses_nothing(
    open_store: Filled, closed_store: Filled, folder: Path, end: str, damage: Damage
) -> None:
    filled = _spoiled(open_store, closed_store, folder / "copy", end, damage)
    with filled.store as store:
        kv = _write(filled)
        repair(store)
        if "new" in store:  # a file whose row was refused may be all that is left of the catalog's last moments
            filled.known["new"] = (kv, TEXT, store.row("new"))
        filled.assert_whole()
