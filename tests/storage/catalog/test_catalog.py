from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from catalog_samples import LATER, add, clear, row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlite_utils import Database

from beacon_memory.documents import SESSION_TAG, Label, Text, content_hash
from beacon_memory.errors import DocumentNotFoundError, InputError, StoreError
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.check import find_flaws
from beacon_memory.storage.catalog.migrations import migrations
from beacon_memory.storage.catalog.sqlite import SQLiteCatalog

LONG = "\n\n".join(f"Paragraph {n} tells of the {n}th zebra. " * 20 for n in range(9))


@pytest.fixture
def catalog(open_catalog: Callable[[], Catalog]) -> Iterator[Catalog]:
    catalog = open_catalog()
    yield catalog
    assert find_flaws(catalog) == []
    if not catalog.shared:
        with catalog.connections.use() as db:
            assert not db.execute("PRAGMA foreign_key_check").fetchall()


def test_the_catalog_imports_no_torch() -> None:
    script = (
        "import sys, beacon_memory.storage.catalog.sqlite\n"
        "print(sorted({'torch', 'safetensors', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_row_and_its_text_are_read_back(catalog: Catalog) -> None:
    metadata = {"tags": ["a", None, 1.5], "nested": {"b": True}}
    stored = add(catalog, "doc", "text\r\n \0 end", metadata=metadata, tags=("a", "b"), pinned=True, expires_at=LATER)
    assert catalog.documents.get("doc") == catalog.documents.require("doc") == stored
    assert catalog.documents.list() == [*catalog.documents.scan()] == [stored]
    assert catalog.documents.text("doc") == "text\r\n \0 end"
    assert (stored.ratios, stored.compression, stored.precision) == ((2, 4), "beacon", "bfloat16")
    assert stored.label == Label(metadata, ("a", "b"), True, LATER)


@pytest.mark.parametrize(
    "id", ["a\0b", "../../etc/passwd", "👩‍🚀", "x" * 10_000, "\u200f\u202eabc", " ", "\n", "a/b\\c:*?", "'; --"]
)
def test_any_text_is_an_id(catalog: Catalog, id: str) -> None:
    for similar in ("a", "a\0", "👩", "x" * 9_999, "\u200f"):
        add(catalog, similar, "another")
    stored = add(catalog, id, id)
    assert catalog.documents.require(id) == stored
    assert catalog.documents.text(id) == id
    assert id in [row.id for row in catalog.documents.list()]
    assert catalog.file_names.named(id) == {stored.file}
    assert catalog.documents.delete(id) == [stored.file]
    assert catalog.documents.get(id) is None
    assert len(catalog.documents.list()) == 5


@given(ids=st.sets(st.text(min_size=1), min_size=1, max_size=8), text=st.text())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_texts_and_metadata_survive_as_they_are(catalog: Catalog, ids: set[str], text: str) -> None:
    clear(catalog)
    for id in ids:
        add(catalog, id, text + id, metadata={id: text})
    assert {row.id for row in catalog.documents.list()} == ids
    for id in ids:
        assert catalog.documents.text(id) == text + id
        assert catalog.documents.require(id).metadata == {id: text}


@pytest.mark.parametrize(
    ("id", "message"), [("", "empty"), ("a\udc80", "surrogate"), (7, "must be a str"), (b"a", "str")]
)
def test_what_is_no_id_is_refused(catalog: Catalog, id: str, message: str) -> None:
    for use in (catalog.documents.get, catalog.documents.text, catalog.documents.delete):
        with pytest.raises(InputError, match=message):
            use(id)
    with pytest.raises(InputError, match=message):
        add(catalog, id, "text")
    assert not catalog.documents.list()


def test_a_text_without_utf8_form_is_refused(catalog: Catalog) -> None:
    with pytest.raises(InputError, match="surrogate '\\\\ud800' at character 3"):
        content_hash("abc\ud800")
    with pytest.raises(InputError, match="decode bytes first"):
        content_hash(b"abc")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InputError, match="not the sha256 of its text"):
        catalog.documents.put(row("doc", "one text"), Text("another text"))
    assert not catalog.documents.list()


def test_replacement_keeps_created_at_and_leaves_no_old_passage(catalog: Catalog) -> None:
    first = add(catalog, "doc", "the old text is about apples", created_at="2020-01-01T00:00:00.000+00:00")
    second = add(catalog, "doc", "the new text is about pears", tokens=99)
    assert second.created_at == first.created_at
    assert second.updated_at > first.created_at
    assert catalog.documents.list() == [second]
    assert not catalog.texts.search("apples")
    assert [hit.text for hit in catalog.texts.search("pears")] == ["the new text is about pears"]


def passages(catalog: Catalog) -> list[tuple[int, int, str]]:
    with catalog.connections.use() as db:
        return db.execute("SELECT id, ordinal, text FROM passages ORDER BY ordinal").fetchall()


def test_of_a_text_that_grows_only_the_passages_that_change_are_written(catalog: Catalog) -> None:
    add(catalog, "doc", LONG)
    before = passages(catalog)
    add(catalog, "doc", LONG + " The last zebra sleeps." * 20)
    after = passages(catalog)
    assert len(before) > 15
    assert after[: len(before) - 1] == before[:-1]
    assert catalog.documents.text("doc") == LONG + " The last zebra sleeps." * 20
    assert sorted(hit.ordinal for hit in catalog.texts.search("sleeps")) == [
        ordinal for _, ordinal, _ in after[len(before) - 1 :]
    ]
    add(catalog, "doc", LONG[: len(LONG) // 2])
    assert catalog.documents.text("doc") == LONG[: len(LONG) // 2]


@pytest.mark.parametrize("open_catalog", ["sqlite"], indirect=True)  # PostgreSQL takes no text for a number
@pytest.mark.parametrize("ordinal", ["-5", "0.5", "'x'"])
def test_passages_that_stand_nowhere_are_written_anew(catalog: Catalog, ordinal: str) -> None:
    add(catalog, "doc", LONG)
    with catalog.connections.transaction() as db:
        db.execute(f"UPDATE passages SET ordinal = {ordinal} WHERE ordinal = 2")
    add(catalog, "doc", LONG + "And more.")
    assert catalog.documents.text("doc") == LONG + "And more."


def test_delete_removes_row_text_and_passages(catalog: Catalog) -> None:
    add(catalog, "doc", "something about apples")
    add(catalog, "other", "something about pears")
    catalog.documents.delete("doc")
    assert [row.id for row in catalog.documents.list()] == ["other"]
    assert [hit.document for hit in catalog.texts.search("something about apples")] == ["other"]


def test_a_row_is_updated_without_its_text(catalog: Catalog) -> None:
    before = add(catalog, "doc", "about apples", metadata={"a": 1}, tags=("x",))
    after = replace(before.labelled(Label({"b": 2}, ["y"])), updated_at=LATER)
    catalog.documents.update(after)
    assert catalog.documents.require("doc") == after
    assert catalog.documents.text("doc") == "about apples"
    assert len(catalog.texts.search("apples")) == 1
    assert [len(catalog.documents.list(tags=[tag])) for tag in ("x", "y")] == [0, 1]
    assert [len(catalog.documents.list(metadata={name: value})) for name, value in (("a", 1), ("b", 2))] == [0, 1]


def test_a_renamed_document_takes_all_with_it(catalog: Catalog) -> None:
    before = add(catalog, "doc", LONG, metadata={"a": 1}, tags=("x",))
    after = replace(before, id="new", file="kv/new")
    catalog.documents.rename("doc", after)
    assert catalog.documents.list() == catalog.documents.list(metadata={"a": 1}, tags=["x"]) == [after]
    assert catalog.documents.text("new") == LONG
    assert {hit.document for hit in catalog.texts.search("zebra", 100)} == {"new"}
    assert (catalog.properties.count("documents"), catalog.properties.count("bytes")) == (1, before.bytes)
    assert find_flaws(catalog) == []


def test_a_missing_document_suggests_similar_ids(catalog: Catalog) -> None:
    for use in (catalog.documents.require, catalog.documents.text, catalog.documents.delete):
        with pytest.raises(DocumentNotFoundError, match=r"no document 'moby dick' is stored; list\(\) shows"):
            use("moby dick")
    for id in ("moby-dick.txt", "notes", "x" * 10_000):
        add(catalog, id, "text")
    with pytest.raises(DocumentNotFoundError, match=r"did you mean 'moby-dick\.txt'"):
        catalog.documents.require("moby_dick.txt")


def test_a_failed_transaction_leaves_everything_as_it_was(catalog: Catalog) -> None:
    before = add(catalog, "doc", "about apples")
    with pytest.raises(InputError), catalog.transaction():  # noqa: PT012 -- what comes before the error is the point
        add(catalog, "doc", "about pears")
        add(catalog, "new", "about plums")
        add(catalog, "", "refused")
    assert catalog.documents.list() == [before]
    assert not catalog.texts.search("pears plums")
    assert len(catalog.texts.search("apples")) == 1


def test_a_failure_inside_a_nested_transaction_can_be_survived(catalog: Catalog) -> None:
    with catalog.transaction():
        add(catalog, "kept", "text")
        with pytest.raises(InputError):
            catalog.documents.put(row("refused", "text"), Text("another text"))
        with pytest.raises(StoreError):
            add(catalog, "clash", "text", file="kv/'kept'")
    assert [row.id for row in catalog.documents.list()] == ["kept"]


def test_threads_share_a_catalog(catalog: Catalog) -> None:
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for n in range(15):
                add(catalog, f"{name}-{n}", f"the text of {name} {n}")
                assert catalog.texts.search(name)
                assert len(catalog.documents.list()) >= n
        except BaseException as error:  # noqa: BLE001 -- handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("anna", "bela", "carl")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(catalog.documents.list()) == 45


def test_a_reader_goes_on_while_another_connection_writes(
    catalog: Catalog, open_catalog: Callable[[], Catalog]
) -> None:
    before = add(catalog, "doc", "old")
    other = open_catalog()
    with other.transaction():
        add(other, "doc", "new")
        assert catalog.documents.require("doc") == before
        assert catalog.documents.text("doc") == "old"
    assert catalog.documents.text("doc") == "new"


@pytest.mark.parametrize("tags", [(), (SESSION_TAG,)])
def test_a_text_that_grows_is_kept_as_if_it_had_been_written_at_once(catalog: Catalog, tags: tuple[str, ...]) -> None:
    pieces = ["One word. ", "a\n\n", "x" * 500, "漢字。", " ", "Ça va? " * 30, LONG, "end"]
    text = pieces[0]
    add(catalog, "doc", text, tags=tags)
    add(catalog, "beside", LONG)
    for piece in pieces * 3:
        text += piece
        catalog.documents.append(row("doc", text, tags=tags), Text(text))
        assert catalog.documents.text("doc") == text
    add(catalog, "again", text, tags=tags)
    assert kept(catalog, "doc") == kept(catalog, "again")  # and `find_flaws` looks at what they are indexed by


def kept(catalog: Catalog, id: str) -> list[tuple[object, ...]]:
    with catalog.connections.use() as db:
        columns = "SELECT ordinal, start, stop, text, kind FROM passages WHERE document = ? ORDER BY ordinal"
        return db.execute(columns, [id]).fetchall()


@pytest.mark.parametrize("open_catalog", ["sqlite"], indirect=True)
@pytest.mark.parametrize("value", ["text = 'other'", "start = 'x'", "ordinal = 'x'", "text = x'ff'"])
def test_a_text_whose_end_is_damaged_is_written_anew_when_it_grows(
    catalog: Catalog, tmp_path: Path, value: str
) -> None:
    add(catalog, "doc", LONG)
    with contextlib.closing(sqlite3.connect(tmp_path / "catalog.sqlite3", isolation_level=None)) as db:
        db.execute(f"UPDATE passages SET {value} WHERE id = (SELECT max(id) FROM passages)")
    text = f"{LONG} and more"
    catalog.documents.append(row("doc", text), Text(text))
    assert catalog.documents.text("doc") == text
    with pytest.raises(InputError, match="content_hash"):
        catalog.documents.append(row("doc", "another text"), Text(text))


def test_a_catalog_is_kept_between_openings(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    first = SQLiteCatalog(path)
    stored = add(first, "doc", "text")
    identity = first.properties.get("identity")
    first.close()
    again = SQLiteCatalog(path)
    assert again.documents.list() == [stored]
    assert again.properties.get("identity") == identity
    again.close()
    db = Database(path)
    assert [step.name for step in migrations.applied(db)] == [
        "m001_documents",
        "m002_passages",
        "m003_compression",
        "m004_lifetimes",
        "m005_sealed_facts",
        "m006_names",
        "m007_method",
        "m008_words",
        "m009_copies",
        "m010_root",
        "m011_conversations",
        "m012_short_passages",
        "m013_segments",
    ]
    assert db.journal_mode == "wal"
    db.close()


def test_many_processes_may_create_the_same_catalog(tmp_path: Path) -> None:
    script = (
        "import sys, time; from beacon_memory.storage.catalog.sqlite import SQLiteCatalog\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for n in range(8): SQLiteCatalog(f'{sys.argv[1]}/{n}.sqlite3').close()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for child in children:
        child.stdout.readline()
    for child in children:  # all at the same time
        child.stdin.write("\n")
        child.stdin.flush()
    assert [child.communicate(timeout=60)[1] for child in children] == [""] * 4
    for path in tmp_path.glob("*.sqlite3"):
        with contextlib.closing(SQLiteCatalog(path)) as catalog:
            assert (catalog.documents.list(), find_flaws(catalog)) == ([], [])


def test_waiting_for_another_writer_ends(open_catalog: Callable[[], Catalog], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("connections", "postgres.connections"):
        monkeypatch.setattr(f"beacon_memory.storage.catalog.{module}.BUSY_SECONDS", 0.1)
    first, second = open_catalog(), open_catalog()
    with first.transaction(), pytest.raises(StoreError, match="another process has been writing"):
        add(second, "doc", "text")
    add(second, "doc", "text")
    assert first.documents.text("doc") == "text"


def test_a_newer_catalog_says_to_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    SQLiteCatalog(path).close()
    db = Database(path)
    db.table("_sqlite_migrations").insert({"migration_set": "beacon_memory", "name": "m999_future", "applied_at": "x"})
    db.close()
    with pytest.raises(StoreError, match=r"newer beacon_memory \(m999_future\); upgrade"):
        SQLiteCatalog(path)


def test_a_damaged_catalog_is_a_store_error(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    path.write_bytes(b"not a database at all " * 100)
    with pytest.raises(StoreError, match=r"catalog\.sqlite3 cannot be used as a catalog: file is not a database"):
        SQLiteCatalog(path)
    with pytest.raises(StoreError, match="unable to open"):
        SQLiteCatalog(tmp_path / "no such folder" / "catalog.sqlite3")
