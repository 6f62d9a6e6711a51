from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from catalog_samples import LONG_AGO
from kv_samples import FINGERPRINT, TEXT, memory, same, sample, write_kv_file
from store_samples import BYTES, change, files, kept_text, labels, put, put_version, version
from upkeep_samples import (
    LABEL,
    LONG,
    Content,
    everything,
    file,
    flip,
    flip_keys,
    kinds,
    leave_catalog,
    replaced_file,
    scribble,
    stale_label,
    unfinished_put,
)

from beacon_memory.documents import Text
from beacon_memory.errors import CorruptFileError
from beacon_memory.storage.catalog.rows import Totals
from beacon_memory.storage.files.header import WindowSpan
from beacon_memory.storage.files.label_file import label_name
from beacon_memory.storage.publishing import Publisher
from beacon_memory.storage.repair import ProblemKind, repair, verify
from beacon_memory.storage.store import MemoryStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store") as store:
        yield store


MENDED: dict[str, tuple[Callable[[MemoryStore], object], list[ProblemKind]]] = {
    "row": (lambda store: change(store, "UPDATE documents SET tokens = 14 WHERE id = 'doc'"), ["damaged-row"]),
    "row that is no text": (
        lambda store: change(store, "UPDATE documents SET metadata = CAST(x'ff00' AS TEXT) WHERE id = 'doc'"),
        ["damaged-row"],
    ),
    "checksum": (lambda store: change(store, "UPDATE documents SET checksum = '' WHERE id = 'doc'"), ["damaged-row"]),
    "id of a row": (lambda store: change(store, "UPDATE documents SET id = 'dpc' WHERE id = 'doc'"), ["damaged-row"]),
    "id that is no text": (
        lambda store: change(store, "UPDATE documents SET id = CAST(x'64ff63' AS TEXT) WHERE id = 'doc'"),
        ["damaged-row"],
    ),
    "hash of a text": (
        lambda store: change(store, "UPDATE documents SET content_hash = 'x' WHERE id = 'doc'"),
        ["damaged-row"],
    ),
    "a letter of a text": (
        lambda store: change(store, "UPDATE passages SET text = replace(text, '7', '8') WHERE document = 'doc'"),
        ["damaged-text"],
    ),
    "a text that is no text": (
        lambda store: change(store, "UPDATE passages SET text = CAST(x'c328' AS TEXT) WHERE document = 'doc'"),
        ["damaged-text"],
    ),
    "passages": (lambda store: change(store, "DELETE FROM passages WHERE document = 'doc'"), ["damaged-text"]),
    "a row that vanished": (
        lambda store: change(store, "DELETE FROM documents WHERE id = 'doc'"),
        ["damaged-catalog", "lost-row"],
    ),
    "counts": (
        lambda store: change(store, "UPDATE properties SET value = 7 WHERE name = 'bytes'"),
        ["damaged-catalog"],
    ),
    "number": (lambda store: change(store, "DELETE FROM properties WHERE name = 'last'"), ["damaged-catalog"]),
    "labels to filter by": (lambda store: change(store, "DELETE FROM labels"), ["damaged-catalog"]),
    "full-text index": (
        lambda store: change(store, "INSERT INTO passages_fts(passages_fts) VALUES ('delete-all')"),
        ["damaged-catalog"],
    ),
    "label gone": (lambda store: (store.folder / label_name(store.row("doc").file)).unlink(), ["stale-label"]),
    "label flipped": (lambda store: flip(store.folder / label_name(store.row("doc").file), 30), ["stale-label"]),
    "label of before": (stale_label, ["stale-label"]),
    "label of another": (lambda store: stale_label(store, id="other"), ["stale-label"]),
    "new put killed": (lambda store: unfinished_put(store, "new"), ["orphan-file", "stale-temp"]),
    "put killed": (lambda store: unfinished_put(store, "doc"), ["orphan-file", "stale-temp"]),
    "replacement killed": (replaced_file, ["orphan-file", "orphan-file"]),
    "temporary file": (lambda store: (store.folder / "kv" / ".tmp-1").write_text("left"), ["stale-temp"]),
    "safetensors' temporary file": (lambda store: (file(store).parent / ".tmpx").write_text("left"), ["stale-temp"]),
    "catalog gone": (lambda store: leave_catalog(store).unlink(), ["lost-row", "lost-row"]),
    "catalog empty": (
        lambda store: leave_catalog(store).write_bytes(b""),
        ["lost-row", "lost-row"],
    ),
    "catalog scribbled over": (
        lambda store: scribble(leave_catalog(store)),
        ["damaged-catalog", "lost-row", "lost-row"],
    ),
    "catalog no database": (
        lambda store: leave_catalog(store).write_text("once upon a time " * 1000),
        ["damaged-catalog", "lost-row", "lost-row"],
    ),
    "table gone": (
        lambda store: change(store, "DROP TABLE passages_fts_data"),
        ["damaged-catalog", "lost-row", "lost-row"],
    ),
}


@pytest.mark.parametrize("name", MENDED)
def test_what_files_or_rows_still_tell_is_found_and_mended(store: MemoryStore, name: str) -> None:
    for id, text in (("doc", LONG), ("other", TEXT)):
        store.put(*sample(id, text), text, LABEL, created_at=LONG_AGO)
    before = everything(store)
    make, expected = MENDED[name]
    make(store)
    shown = {path: path.read_bytes() for path in store.folder.glob("kv/*/*")}
    found = [problem.kind for problem in verify(store)]
    assert found == expected or found == ["damaged-catalog"] == expected[:1]  # then nothing else can be told
    assert {path: path.read_bytes() for path in store.folder.glob("kv/*/*")} == shown
    done = repair(store)
    assert [problem.kind for problem in done] == expected
    assert all(problem.mended for problem in done)
    after = {content.row.id: content for content in everything(store)}
    for content in before:
        now = after.pop(content.row.id)
        moved = {"file": now.row.file} if name == "replacement killed" else {}
        content.row = replace(content.row, **moved)  # type: ignore[arg-type]  # by field name
        assert content.stands(store)
    assert after == {}
    assert verify(store) == repair(store) == []
    assert [hit.document for hit in store.search("zebra", 3)] == ["doc"] * 3
    assert {row.id for row in store.list(tags=["x"], metadata={"b": "x"})} == {"doc", "other"}
    assert store.totals() == Totals(2, 2 * BYTES)
    assert len(files(store)) == len(labels(store)) == 2


UNMENDED: dict[str, tuple[Callable[[MemoryStore], object], ProblemKind]] = {
    "file gone": (lambda store: file(store).unlink(), "missing-file"),
    "keys flipped": (lambda store: flip_keys(file(store)), "damaged-file"),
    "text flipped": (lambda store: flip(file(store), -5), "damaged-file"),
    "header flipped": (lambda store: flip(file(store), 200), "damaged-file"),
    "file cut": (lambda store: file(store).write_bytes(file(store).read_bytes()[:-10]), "damaged-file"),
    "file empty": (lambda store: file(store).write_bytes(b""), "damaged-file"),
    "file of another": (lambda store: shutil.copy(file(store, "other"), file(store)), "mismatched-file"),
}


@pytest.mark.parametrize("name", UNMENDED)
def test_what_only_a_model_can_mend_is_reported_and_kept(store: MemoryStore, name: str) -> None:
    store.put(*sample(), TEXT, LABEL, created_at=LONG_AGO)
    put(store, "other")
    other = Content.of(store, "other")
    make, kind = UNMENDED[name]
    make(store)
    shown = {path: path.read_bytes() for path in files(store)}
    with pytest.raises(CorruptFileError, match="`beacon-memory repair`"):
        store.get("doc")
    for look in (verify, repair, repair):
        (problem,) = look(store)
        assert (problem.kind, problem.document, problem.path) == (kind, "doc", store.row("doc").file)
        assert not problem.mended
    assert {path: path.read_bytes() for path in files(store)} == shown
    assert kept_text(store) == TEXT
    assert other.stands(store)
    kv = put(store)
    assert same(store.get("doc").kv, kv)
    assert (store.row("doc").label, store.row("doc").created_at) == (LABEL, LONG_AGO)
    assert verify(store) == []
    assert len(files(store)) == 2


def test_every_kind_of_problem_was_made_here() -> None:
    made = {kind for _, found in MENDED.values() for kind in found} | {kind for _, kind in UNMENDED.values()}
    assert made == {*get_args(ProblemKind)}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"id": "another"}, "id"),
        ({"content_hash": "0" * 64}, "content hash"),
        ({"compression": "hybrid"}, "compression"),
        ({"fingerprint": replace(FINGERPRINT, adapter="another")}, "fingerprint"),
        (
            {"windows": (WindowSpan(16, 4, 0, 1, 8), WindowSpan(5, 4, 1, 2, 5)), "tokens": 21},
            "number of tokens",
        ),
        (
            {"windows": (WindowSpan(8, 2, 0, 1, 8), WindowSpan(5, 1, 1, 2, 5))},
            "number of slots",
        ),
    ],
)
def test_a_file_that_contradicts_its_row_is_refused(store: MemoryStore, changed: dict[str, object], named: str) -> None:
    put(store)
    header, _ = sample()
    text = TEXT
    if named == "content hash":
        header, _ = sample(text=(text := "quite another text"))
        changed = {}
    header = replace(header, **changed)  # type: ignore[arg-type]  # by field name
    write_kv_file(file(store), header, memory(13, 6 * header.slots).to(dtype=sample()[1].keys.dtype), text)
    with pytest.raises(CorruptFileError, match=f"in the {named}, hash of the whole file; `beacon-memory repair` mends"):
        store.get("doc")
    assert kinds(verify(store)) == [("mismatched-file", "doc")]
    assert file(store).exists()


def test_a_file_in_another_precision_is_refused(store: MemoryStore) -> None:
    header, kv = sample()
    store.put(header, kv, TEXT)
    write_kv_file(file(store), header, kv.to(dtype=kv.keys.float().dtype))
    with pytest.raises(CorruptFileError, match="disagrees with its row in the precision"):
        store.get("doc")


# A text and its file may be damaged together: what is left is kept for the day when the other comes back.


def test_a_damaged_text_waits_for_its_file(store: MemoryStore) -> None:
    put(store)
    whole = file(store).read_bytes()
    file(store).unlink()
    change(store, "UPDATE passages SET text = 'damaged'")
    assert kinds(repair(store)) == [("missing-file", "doc"), ("damaged-text", "doc")]
    assert not any(problem.mended for problem in repair(store))
    file(store).write_bytes(whole)
    assert kinds(repair(store)) == [("damaged-text", "doc")]
    assert store.text("doc") == TEXT
    assert verify(store) == []


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_row_without_a_file_keeps_its_text(store: MemoryStore, damage: Callable[[Path], object]) -> None:
    store.put(*sample(), TEXT, LABEL, created_at=LONG_AGO)
    damage(file(store))
    change(store, "UPDATE documents SET tokens = 14")
    assert [problem.kind for problem in repair(store)] == ["damaged-row"]
    assert kept_text(store) == TEXT
    assert (store.row("doc").label, store.row("doc").created_at) == (LABEL, LONG_AGO)
    (problem,) = repair(store)
    assert problem.kind in ("missing-file", "damaged-file")
    kv = put(store)
    assert same(store.get("doc").kv, kv)
    assert verify(store) == []


def test_a_damaged_row_without_file_and_text_is_kept_and_reported(store: MemoryStore) -> None:
    put(store)
    file(store).unlink()
    change(store, "UPDATE documents SET tokens = 14; UPDATE passages SET text = 'damaged'")
    for look in (verify, repair, repair):
        (problem,) = look(store)
        assert (problem.kind, problem.document, problem.mended) == ("damaged-row", "doc", False)


def test_a_document_that_is_damaged_beyond_repair_can_be_removed(store: MemoryStore) -> None:
    for id in ("doc", "other"):
        put(store, id)
    before = Content.of(store, "other")
    file(store).unlink()
    change(store, "UPDATE passages SET text = 'damaged' WHERE document = 'doc'")
    change(store, f"UPDATE documents SET file = '{label_name(before.row.file)}' WHERE id = 'doc'")  # of another
    assert not repair(store)[0].mended
    with pytest.raises(CorruptFileError, match="row of 'doc' is damaged"):
        put(store)
    store.delete("doc")
    assert "doc" not in store
    assert before.stands(store)
    kv = put(store)
    assert same(store.get("doc").kv, kv)
    assert [problem.kind for problem in repair(store)] in ([], ["orphan-file"])
    assert verify(store) == []


def test_a_damaged_row_comes_from_the_file_that_it_named(store: MemoryStore) -> None:
    put(store)
    before = Content.of(store, "doc")
    unfinished_put(store, "doc")  # later, but never committed
    change(store, "UPDATE documents SET tokens = 14")
    assert [problem.kind for problem in repair(store)] == ["damaged-row", "orphan-file", "stale-temp"]
    assert before.stands(store)
    assert verify(store) == []


def test_a_row_that_names_another_file_finds_its_own_again(store: MemoryStore) -> None:
    for id in ("doc", "other"):
        put(store, id)
    before = everything(store)
    change(store, "UPDATE documents SET file = 'kv/../../etc/passwd' WHERE id = 'doc'")
    assert [problem.kind for problem in verify(store)] == ["damaged-row", "lost-row"]
    assert [problem.kind for problem in repair(store)] == ["damaged-row"]
    assert all(content.stands(store) for content in before)
    assert verify(store) == []


def test_a_damaged_version_is_dropped(store: MemoryStore) -> None:
    for damage in (
        Path.unlink,
        flip_keys,
        lambda path: flip(path, -5),
        lambda path: shutil.copy(file(store, "other"), path),
    ):
        put(store, "other")
        put_version(store, "a")
        put_version(store, "b")
        before = Content.of(store, "doc")
        damage(store.folder / store.row("doc", version("a")).file)
        (problem,) = verify(store)
        assert (problem.kind, problem.document) == ("damaged-file", "doc")
        assert "kept for readers with another model" in problem.message
        assert {(problem.kind, problem.mended) for problem in repair(store)} <= {
            ("damaged-file", True),
            ("orphan-file", True),
        }
        assert before.stands(store)
        assert verify(store) == []
        assert len(files(store)) == len(labels(store)) == 2


def test_a_damaged_row_of_a_version_is_dropped(store: MemoryStore) -> None:
    put_version(store, "a")
    put_version(store, "b")
    before = Content.of(store, "doc")
    change(store, "UPDATE versions SET record = CAST(x'ff' AS TEXT)")
    assert kinds(verify(store)) == [("damaged-row", "doc")]
    assert {(problem.kind, problem.mended) for problem in repair(store)} == {
        ("damaged-row", True),
        ("orphan-file", True),
    }
    assert before.stands(store)
    assert verify(store) == []
    assert len(files(store)) == len(labels(store)) == 1


def test_files_of_others_are_reported_and_kept(store: MemoryStore) -> None:
    put(store)
    theirs = [file(store).parent / name for name in ("notes.txt", "a.safetensors", f"{'0' * 32}-0.json")]
    for path in theirs:
        path.write_text("theirs")
    for look in (verify, repair, repair):
        problems = look(store)
        assert {(problem.kind, problem.mended) for problem in problems} == {("orphan-file", False)}
        assert {problem.path for problem in problems} == {str(path.relative_to(store.folder)) for path in theirs}
    assert all(path.read_text() == "theirs" for path in theirs)


def test_what_cannot_be_removed_is_not_called_mended(store: MemoryStore) -> None:
    put(store)
    left = file(store)
    put(store, text="a later text")
    (left / "inside").mkdir(parents=True)
    (problem,) = repair(store)
    assert (problem.kind, problem.mended) == ("orphan-file", False)
    shutil.rmtree(left)
    assert verify(store) == []


def test_a_repair_forgets_of_files_that_are_gone(store: MemoryStore) -> None:
    put(store)
    change(store, "INSERT INTO unsettled VALUES ('0123456789ab'), ('0123456789ac')")
    assert repair(store) == []
    assert store.parts.catalog().file_names.unsettled() == set()


def test_replaced_and_removed_files_need_no_repair_to_be_forgotten(store: MemoryStore) -> None:
    for n in range(3):
        put(store, text=f"text {n}")
    store.delete("doc")
    assert store.parts.catalog().file_names.unsettled() == set()
    with contextlib.suppress(KeyError), Publisher(store.parts).new_file(*sample(), Text(TEXT)):
        raise KeyError
    assert store.parts.catalog().file_names.unsettled() == set()
    assert files(store) == []


def test_a_store_that_is_not_there_has_no_problems(store: MemoryStore) -> None:
    assert verify(store) == repair(store) == []
    assert not store.folder.exists()
    store.folder.mkdir()
    assert verify(store) == repair(store) == []


def test_problems_name_paths_below_the_store(store: MemoryStore) -> None:
    put(store)
    file(store).unlink()
    (problem,) = verify(store)
    assert problem.path is not None
    assert os.path.commonpath([store.folder / problem.path, store.folder]) == str(store.folder)
    assert problem.path in problem.message
