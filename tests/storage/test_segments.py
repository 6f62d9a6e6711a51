"""Documents that grow: what is appended has a file of its own, until there are too many."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from kv_samples import FINGERPRINT, same
from store_samples import IN_A_FOLDER, change, files
from workload import State, append, document, label, look, perform, piece

from beacon_memory.documents import content_hash
from beacon_memory.errors import ConflictError, CorruptFileError, InputError, QuotaError
from beacon_memory.kv.levels import LEVELS
from beacon_memory.storage.archive import copy_documents, export_documents, import_documents
from beacon_memory.storage.erasing import erase
from beacon_memory.storage.files.kv_file import read_kv_file
from beacon_memory.storage.reading import read_document_index, read_document_part
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

GROWN = "1+2+3+4"


@pytest.fixture
def store(open_store: Callable[[], MemoryStore]) -> MemoryStore:
    return open_store()


@pytest.fixture
def grown(store: MemoryStore) -> MemoryStore:
    """A store with a document that has two segments, of two pieces and of one."""
    return grow(store)


def grow(store: MemoryStore, precision: str = "float32") -> MemoryStore:
    store.put(*document("doc", "1"), label("5"), precision=precision)
    for version in GROWN.split("+")[1:]:
        assert append(store, "doc", version)
    return store


def segments(store: MemoryStore) -> list[Path]:
    return [store.folder / name for name in store.row("doc").segments]


def kinds(store: MemoryStore) -> list[tuple[str, str | None, bool]]:
    return [(problem.kind, problem.document, problem.mended) for problem in repair(store)]


@IN_A_FOLDER
def test_an_append_writes_what_is_new_and_leaves_all_other_files_as_they_are(store: MemoryStore) -> None:
    store.put(*document("doc", "1"), label("5"))
    before = {path: path.read_bytes() for path in store.folder.glob("kv/*/*")}
    assert append(store, "doc", "2")
    after = {path: path.read_bytes() for path in store.folder.glob("kv/*/*")}
    (segment,) = segments(store)
    assert after == before | {segment: after[segment]}
    assert (read_kv_file(segment).text, read_kv_file(segment).header.tokens) == (" word2 was appended as 2", 1)
    assert look(store, "doc") == State("1+2", "5")


@IN_A_FOLDER
def test_a_segment_takes_in_those_before_it_that_are_less_than_twice_as_large(store: MemoryStore) -> None:
    store.put(*document("doc", "1"))  # of 6 slots
    tokens = []
    for version in "2345":
        assert append(store, "doc", version)
        tokens.append([read_kv_file(path).header.tokens for path in segments(store)])
        assert len(files(store)) == 1 + len(tokens[-1])
    assert tokens == [[1], [2], [2, 1], []]
    assert look(store, "doc") == State("1+2+3+4+5", "")


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
def test_a_document_of_segments_is_the_one_that_would_be_stored_as_one_file(store: MemoryStore, precision: str) -> None:
    grow(store, precision)
    (row, file), (_, index) = store.read("doc"), read_document_index(store.parts, store.row("doc"))
    header, kv, text = document("doc", GROWN)
    with MemoryStore(store.folder / "whole") as whole:
        whole.put(header, kv, text, precision=precision)
        (one_row, one), (_, its_index) = whole.read("doc"), read_document_index(whole.parts, whole.row("doc"))
        differing = {"file": "", "segments": (), "root": "", "updated_at": "", "created_at": "", "used_at": 0}
        assert replace(row.labelled(one_row.label), **differing) == replace(one_row, **differing)
        assert (file.header, file.text) == (one.header, one.text) == (header, text)
        assert index.header == its_index.header
        assert index.counts.equal(its_index.counts)
        assert same(file.kv, one.kv)
        for lowest in ([LEVELS, 3, 0, LEVELS, 0], [5, LEVELS, LEVELS, 0, LEVELS], [LEVELS] * 5):
            part, same_part = (read_document_part(one.parts, one.row("doc"), lowest) for one in (store, whole))
            assert part.lowest == lowest
            assert same(part.kv, same_part.kv)


def test_what_is_changed_as_a_whole_is_one_file_again(grown: MemoryStore, tmp_path: Path) -> None:
    export_documents(grown, tmp_path / "archive")
    copy_documents(grown, grown.within("other"))
    with MemoryStore(tmp_path / "imported") as imported:
        import_documents(imported, tmp_path / "archive")
        for store in (imported, grown.within("other")):
            assert store.row("doc").segments == ()
            assert look(store, "doc") == State(GROWN, "5")
    grown.convert("doc", "int8")
    assert len(files(grown)) == 1
    assert append(grown, "doc", "6")
    grown.rename("doc", "new")
    assert len(files(grown)) == 1
    assert look(grown, "new") == State(f"{GROWN}+6", "5", "int8")
    assert verify(grown) == []


def test_who_appends_to_what_was_changed_meanwhile_is_refused(grown: MemoryStore) -> None:
    row, file = grown.read("doc")
    before = files(grown)
    assert append(grown, "doc", "9")  # which takes in all
    for meanwhile in (
        lambda: None,
        lambda: grow(grown),
        lambda: append(grown, "doc", "7"),
        lambda: grown.delete("doc"),
    ):
        meanwhile()
        with pytest.raises(ConflictError, match="changed or removed"):
            grown.append(row, *piece(file.header, file.text, "8"))
    assert not any(path.exists() for path in before)
    assert files(grown) == []
    assert verify(grown) == []


def test_who_is_overtaken_while_writing_a_segment_is_refused(store: MemoryStore) -> None:
    store.put(*document("doc", "1"))
    row, file = store.read("doc")
    assert append(store, "doc", "2")
    with pytest.raises(ConflictError, match="changed or removed"):  # the first file is there, and none is taken in
        store.append(row, *piece(file.header, file.text, "3"))
    assert look(store, "doc") == State("1+2", "")
    assert len(files(store)) == 2
    assert verify(store) == []


def test_what_does_not_fit_into_the_quota_is_not_appended(store: MemoryStore) -> None:
    store.put(*document("old", "1"))
    grow(store)
    assert store.totals().bytes == store.row("old").bytes + store.row("doc").bytes
    store.configure(quota=store.row("doc").bytes + 100)  # a piece takes more
    with pytest.raises(QuotaError, match="'doc' takes"):
        append(store, "doc", "5")
    assert {row.id for row in store.list()} == {"old", "doc"}
    store.configure(quota=store.totals().bytes)
    assert append(store, "doc", "5")
    assert [row.id for row in store.list()] == ["doc"]
    assert look(store, "doc") == State(f"{GROWN}+5", "5")
    assert verify(store) == []


def test_a_label_stays_when_a_document_grows_and_can_be_changed_after(grown: MemoryStore) -> None:
    assert perform(grown, ["update", "doc", "8"])
    assert append(grown, "doc", "5")
    assert look(grown, "doc") == State(f"{GROWN}+5", "8")
    assert verify(grown) == []


@IN_A_FOLDER
@pytest.mark.parametrize("which", [0, 1])
def test_a_segment_that_is_not_the_one_that_was_written_is_refused_and_named(grown: MemoryStore, which: int) -> None:
    path, other = (segments(grown)[number] for number in (which, 1 - which))
    data = path.read_bytes()
    for change_file in (
        lambda: path.write_bytes(data[:-1] + bytes([data[-1] ^ 1])),
        lambda: path.write_bytes(data[: len(data) // 2]),
        lambda: shutil.copyfile(other, path),
        lambda: shutil.copyfile(grown.folder / grown.row("doc").file, path),
        path.unlink,
    ):
        change_file()
        with pytest.raises(CorruptFileError, match=path.name):
            grown.get("doc")
        (problem,) = verify(grown)
        assert problem.kind in ("damaged-file", "mismatched-file", "missing-file")
        assert problem.path == path.relative_to(grown.folder).as_posix() or problem.kind == "mismatched-file"
        path.write_bytes(data)
        assert look(grown, "doc") == State(GROWN, "5")


@IN_A_FOLDER
def test_a_segment_of_before_is_not_taken_for_one_of_now(grown: MemoryStore) -> None:
    """The same document grew another way before; the files have changed places."""
    before = {path.name: path.read_bytes() for path in segments(grown)}
    grown.delete("doc")
    for version in "1897":
        perform(grown, ["put" if version == "1" else "append", "doc", version])
    for path, data in zip(segments(grown), before.values(), strict=True):
        good = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(CorruptFileError, match="is not the file that its row names"):
            grown.get("doc")
        path.write_bytes(good)


@IN_A_FOLDER
def test_segments_come_back_with_a_lost_catalog(grown: MemoryStore) -> None:
    row = grown.row("doc")
    grown.close()
    (grown.folder / "catalog.sqlite3").unlink()
    assert kinds(grown) == [("lost-row", "doc", True)]
    assert grown.row("doc").files == row.files
    assert look(grown, "doc") == State(GROWN, "5")
    assert verify(grown) == []


@IN_A_FOLDER
def test_segments_that_are_newer_than_the_catalog_come_back(grown: MemoryStore, tmp_path: Path) -> None:
    for more, left in (("5+6", 1), ("5", 0)):  # what the catalog knows is there, or was taken in
        grown.close()
        shutil.copyfile(grown.folder / "catalog.sqlite3", tmp_path / "older")
        for version in more.split("+"):
            assert append(grown, "doc", version)
        content = State(f"{GROWN}+{more}", "5")
        assert look(grown, "doc") == content
        grown.close()
        shutil.copyfile(tmp_path / "older", grown.folder / "catalog.sqlite3")
        assert ("lost-row", "doc", True) in kinds(grown)
        assert look(grown, "doc") == content
        assert verify(grown) == []
        assert len(segments(grown)) == left
        grown.delete("doc")
        grow(grown)


@IN_A_FOLDER
@pytest.mark.parametrize("column", ["segments", "root", "tokens", "content_hash"])
def test_a_damaged_row_gets_its_segments_back(grown: MemoryStore, column: str) -> None:
    row = grown.row("doc")
    change(grown, f"UPDATE documents SET {column} = 'x[' WHERE id = 'doc'")
    assert ("damaged-row", "doc", True) in kinds(grown)
    assert grown.row("doc").files == row.files
    assert look(grown, "doc") == State(GROWN, "5")
    assert verify(grown) == []


@IN_A_FOLDER
def test_segments_without_their_document_are_left_and_reported(grown: MemoryStore) -> None:
    grown.close()
    (grown.folder / "catalog.sqlite3").unlink()
    (base,) = set(files(grown)) - set(segments_by_name(grown))
    base.unlink()
    for _ in range(2):
        assert kinds(grown) == [("lost-row", "doc", False)]
    assert len(files(grown)) == 2


def segments_by_name(store: MemoryStore) -> list[Path]:
    return [path for path in files(store) if path.stem.count("-") == 2]


def test_the_old_model_goes_on_with_all_segments_while_documents_are_recompressed(grown: MemoryStore) -> None:
    header, kv, text = document("doc", GROWN)
    old = header.fingerprint.digest
    grown.put(replace(header, fingerprint=replace(FINGERPRINT, base="new")), kv, text, keep_version=True)
    assert len(files(grown)) == 4
    assert same(grown.read("doc", old)[1].kv, kv)
    assert verify(grown) == []
    erase(grown)
    assert len(files(grown)) == 4
    grown.drop_versions()
    assert len(files(grown)) == 1
    assert verify(grown) == []


def test_a_grown_document_can_lie_elsewhere_and_be_erased(tmp_path: Path) -> None:
    backend = tmp_path / "files"
    with MemoryStore(tmp_path / "store", files=backend.as_uri()) as store:
        grow(store)
        shutil.rmtree(store.folder / "cache")
        assert look(store, "doc") == State(GROWN, "5")
        cached = sorted((store.folder / "cache").glob("kv/*/*-*-*.safetensors"))
        shutil.copyfile(cached[0], cached[1])  # a damaged copy is taken anew
        assert look(store, "doc") == State(GROWN, "5")
        erase(store, ["doc"])
        assert not list(backend.glob("kv/*/*"))
        assert verify(store) == []


def test_what_does_not_belong_behind_a_document_is_not_appended(grown: MemoryStore) -> None:
    row, file = grown.read("doc")
    before = files(grown)
    header, kv, text = piece(file.header, file.text, "9")
    for wrong, whole in (
        (replace(header, id="other"), text),
        (replace(header, fingerprint=replace(FINGERPRINT, adapter="other")), text),
        (replace(header, compression="beacon"), text),
        (replace(header, method={"score": "expected"}), text),
        (replace(header, content_hash=content_hash("other")), text),
        (header, f"x{text[1:]}"),
        (header, f"{text} and more"),
        (header, file.text),
        (replace(header, windows=(), tokens=0, span=0, tail_ids=()), text),
    ):
        with pytest.raises(InputError, match="'doc'"):
            grown.append(row, wrong, kv, whole)
    with pytest.raises(InputError, match="cannot grow: its keys, kept in float32, hold NaN"):
        grown.append(row, header, replace(kv, keys=kv.keys / 0), text)
    with pytest.raises(InputError, match="cannot be stored: it spans 18 positions"):
        grown.append(row, header, replace(kv, span=2), text)
    assert files(grown) == before
    assert look(grown, "doc") == State(GROWN, "5")
    assert verify(grown) == []
