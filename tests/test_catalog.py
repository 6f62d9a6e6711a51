from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from catalog_samples import add, row
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_utils import Database

from beacon_memory.catalog import Catalog
from beacon_memory.document import content_hash
from beacon_memory.errors import DocumentNotFoundError, InputError, StoreError
from beacon_memory.migrations import migrations


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "catalog.sqlite3")
    yield catalog
    with sqlite3.connect(tmp_path / "catalog.sqlite3") as connection:
        connection.execute("INSERT INTO passages_fts(passages_fts, rank) VALUES('integrity-check', 1)")
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert not connection.execute("PRAGMA foreign_key_check").fetchall()
    connection.close()
    catalog.close()


def test_the_catalog_imports_no_torch() -> None:
    script = (
        "import sys, beacon_memory.catalog; print(sorted({'torch', 'safetensors', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_row_and_its_text_are_read_back(catalog: Catalog) -> None:
    stored = add(catalog, "doc", "text\r\n \0 end", metadata={"tags": ["a", None, 1.5], "nested": {"b": True}})
    assert catalog.get("doc") == catalog.require("doc") == stored
    assert catalog.list() == [stored]
    assert catalog.text("doc") == "text\r\n \0 end"
    assert (stored.ratios, stored.compression) == ((2, 4), "beacon")
    assert stored.metadata == {"tags": ["a", None, 1.5], "nested": {"b": True}}


@pytest.mark.parametrize(
    "id", ["a\0b", "../../etc/passwd", "👩‍🚀", "x" * 10_000, "\u200f\u202eabc", " ", "\n", "a/b\\c:*?", "'; --"]
)
def test_any_text_is_an_id(catalog: Catalog, id: str) -> None:
    for similar in ("a", "a\0", "👩", "x" * 9_999, "\u200f"):
        add(catalog, similar, "another")
    stored = add(catalog, id, id)
    assert catalog.require(id) == stored
    assert catalog.text(id) == id
    assert id in [row.id for row in catalog.list()]
    assert catalog.delete(id) == stored
    assert catalog.get(id) is None
    assert len(catalog.list()) == 5


@given(ids=st.sets(st.text(min_size=1), min_size=1, max_size=8), text=st.text())
@settings(max_examples=40, deadline=None)
def test_ids_texts_and_metadata_survive_as_they_are(ids: set[str], text: str) -> None:
    catalog = Catalog(":memory:")
    for id in ids:
        add(catalog, id, text + id, metadata={id: text})
    assert {row.id for row in catalog.list()} == ids
    for id in ids:
        assert catalog.text(id) == text + id
        assert catalog.require(id).metadata == {id: text}
    catalog.close()


@pytest.mark.parametrize(
    ("id", "message"), [("", "empty"), ("a\udc80", "surrogate"), (7, "must be a str"), (b"a", "str")]
)
def test_what_is_no_id_is_refused(catalog: Catalog, id: str, message: str) -> None:
    for use in (catalog.get, catalog.text, catalog.delete, lambda id: catalog.set_metadata(id, {})):
        with pytest.raises(InputError, match=message):
            use(id)
    with pytest.raises(InputError, match=message):
        add(catalog, id, "text")
    assert not catalog.list()


def test_a_text_without_utf8_form_is_refused(catalog: Catalog) -> None:
    with pytest.raises(InputError, match="surrogate '\\\\ud800' at character 3"):
        content_hash("abc\ud800")
    with pytest.raises(InputError, match="decode bytes first"):
        content_hash(b"abc")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InputError, match="not the sha256 of its text"):
        catalog.put(row("doc", "one text"), "another text")
    assert not catalog.list()


def _loop() -> dict[str, object]:
    loop: dict[str, object] = {}
    loop["again"] = loop
    return loop


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": {"b": [1, {2}]}}, r"metadata\['a'\]\['b'\]\[1\] is \{2\} of type set"),
        ({1: "a"}, "the key 1 of type int"),
        ({"a": {None: 1}}, r"metadata\['a'\] has the key None"),
        ({"a": float("nan")}, "is nan of type float"),
        ({"a": b"x"}, "is b'x' of type bytes"),
        ({"a": 10**5000}, "cannot be written as JSON"),
        ([("a", 1)], "must be a dict"),
        ("text", "must be a dict"),
        (_loop(), "contains itself"),
    ],
)
def test_metadata_that_json_cannot_hold_are_refused(catalog: Catalog, metadata: object, message: str) -> None:
    before = add(catalog, "doc", "text", metadata={"old": 1})
    with pytest.raises(InputError, match=message):
        add(catalog, "doc", "new text", metadata=metadata)
    with pytest.raises(InputError, match=message):
        catalog.set_metadata("doc", metadata)  # type: ignore[arg-type]  # wrong on purpose
    assert catalog.require("doc") == before
    assert catalog.text("doc") == "text"


def test_replacement_keeps_created_at_and_leaves_no_old_passage(catalog: Catalog) -> None:
    first = add(catalog, "doc", "the old text is about apples", created_at="2020-01-01T00:00:00.000+00:00")
    second = add(catalog, "doc", "the new text is about pears", tokens=99)
    assert second.created_at == first.created_at
    assert second.updated_at > first.created_at
    assert catalog.list() == [second]
    assert not catalog.search("apples")
    assert [hit.text for hit in catalog.search("pears")] == ["the new text is about pears"]


def test_delete_removes_row_text_and_passages(catalog: Catalog) -> None:
    add(catalog, "doc", "something about apples")
    add(catalog, "other", "something about pears")
    catalog.delete("doc")
    assert [row.id for row in catalog.list()] == ["other"]
    assert [hit.document for hit in catalog.search("something about apples")] == ["other"]


def test_set_metadata_replaces_all_of_it_and_nothing_else(catalog: Catalog) -> None:
    before = add(catalog, "doc", "text", metadata={"a": 1}, updated_at="2020-01-01T00:00:00.000+00:00")
    after = catalog.set_metadata("doc", {"b": 2})
    assert catalog.require("doc") == after
    assert after.metadata == {"b": 2}
    assert after.updated_at > before.updated_at
    assert (after.created_at, after.file, after.tokens) == (before.created_at, before.file, before.tokens)


def test_a_missing_document_suggests_similar_ids(catalog: Catalog) -> None:
    for use in (catalog.require, catalog.text, catalog.delete, lambda id: catalog.set_metadata(id, {})):
        with pytest.raises(DocumentNotFoundError, match=r"no document 'moby dick' is stored; list\(\) shows"):
            use("moby dick")
    for id in ("moby-dick.txt", "notes", "x" * 10_000):
        add(catalog, id, "text")
    with pytest.raises(DocumentNotFoundError, match=r"did you mean 'moby-dick\.txt'"):
        catalog.require("moby_dick.txt")


def test_a_failed_transaction_leaves_everything_as_it_was(catalog: Catalog) -> None:
    before = add(catalog, "doc", "about apples")
    with pytest.raises(InputError), catalog.transaction():  # noqa: PT012 -- what comes before the error is the point
        add(catalog, "doc", "about pears")
        add(catalog, "new", "about plums")
        add(catalog, "", "refused")
    assert catalog.list() == [before]
    assert not catalog.search("pears plums")
    assert len(catalog.search("apples")) == 1


def test_a_failure_inside_a_nested_transaction_can_be_survived(catalog: Catalog) -> None:
    with catalog.transaction():
        add(catalog, "kept", "text")
        with pytest.raises(InputError):
            add(catalog, "refused", "text", metadata={1: 2})
        with pytest.raises(StoreError):
            add(catalog, "clash", "text", file="kv/'kept'")
    assert [row.id for row in catalog.list()] == ["kept"]


def test_threads_share_a_catalog(catalog: Catalog) -> None:
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for n in range(15):
                add(catalog, f"{name}-{n}", f"the text of {name} {n}")
                assert catalog.search(name)
                assert len(catalog.list()) >= n
        except BaseException as error:  # noqa: BLE001 -- handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("anna", "bela", "carl")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(catalog.list()) == 45


def test_a_reader_goes_on_while_another_connection_writes(catalog: Catalog, tmp_path: Path) -> None:
    before = add(catalog, "doc", "old")
    other = Catalog(tmp_path / "catalog.sqlite3")
    with other.transaction():
        add(other, "doc", "new")
        assert catalog.require("doc") == before
        assert catalog.text("doc") == "old"
    assert catalog.text("doc") == "new"
    other.close()


def test_a_catalog_is_kept_between_openings(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    first = Catalog(path)
    stored = add(first, "doc", "text")
    created = first.created_at()
    first.close()
    again = Catalog(path)
    assert again.list() == [stored]
    assert again.created_at() == created
    again.close()
    db = Database(path)
    assert [step.name for step in migrations.applied(db)] == [
        "m001_documents",
        "m002_passages",
        "m003_compression",
    ]
    assert db.journal_mode == "wal"
    db.close()


def test_an_old_catalog_keeps_its_documents_which_are_of_beacons(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    db = Database(path)
    migrations.apply(db, stop_before=["m003_compression"])
    old = {**asdict(row("doc", "about apples")), "ratios": "[2, 4]", "metadata": '{"a": 1}', "text": "about apples"}
    del old["compression"]
    db.table("documents").insert(old)
    db.table("passages").insert({"document": "doc", "ordinal": 0, "start": 0, "stop": 12, "text": "about apples"})
    db.close()
    with contextlib.closing(Catalog(path)) as catalog:
        (found,) = catalog.list()
        assert (found.compression, found.ratios, found.metadata) == ("beacon", (2, 4), {"a": 1})
        assert catalog.text("doc") == "about apples"
        assert [hit.document for hit in catalog.search("apples")] == ["doc"]
        assert add(catalog, "doc", "about pears", compression="select") == catalog.require("doc")
        assert catalog.require("doc").compression == "select"
        assert catalog.text("doc") == "about pears"
        assert not catalog.search("apples")
        catalog.delete("doc")
        assert not catalog.search("pears")


def test_rows_are_listed_without_reading_their_texts(catalog: Catalog, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "catalog.sqlite3") as connection:
        columns = [column[1] for column in connection.execute("PRAGMA table_info(documents)")]
    connection.close()
    assert columns[-1] == "text"  # SQLite reads a row's pages up to the last column that was asked for


def test_many_processes_may_create_the_same_catalog(tmp_path: Path) -> None:
    script = "import sys; from beacon_memory.catalog import Catalog; Catalog(sys.argv[1]).close()"
    for n in range(3):
        command = [sys.executable, "-c", script, str(tmp_path / f"{n}.sqlite3")]
        children = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
        assert [child.communicate(timeout=60)[1] for child in children] == [""] * 4


def test_waiting_for_another_writer_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beacon_memory.catalog._BUSY_SECONDS", 0.1)
    first, second = Catalog(tmp_path / "catalog.sqlite3"), Catalog(tmp_path / "catalog.sqlite3")
    with first.transaction(), pytest.raises(StoreError, match="another process has been writing"):
        add(second, "doc", "text")
    add(second, "doc", "text")
    assert first.text("doc") == "text"
    first.close()
    second.close()


def test_a_newer_catalog_says_to_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    Catalog(path).close()
    db = Database(path)
    db.table("_sqlite_migrations").insert({"migration_set": "beacon_memory", "name": "m999_future", "applied_at": "x"})
    db.close()
    with pytest.raises(StoreError, match=r"newer beacon_memory \(m999_future\); upgrade"):
        Catalog(path)


def test_a_damaged_catalog_is_a_store_error(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    path.write_bytes(b"not a database at all " * 100)
    with pytest.raises(StoreError, match=r"catalog\.sqlite3 cannot be used as a catalog: file is not a database"):
        Catalog(path)
    with pytest.raises(StoreError, match="unable to open"):
        Catalog(tmp_path / "no such folder" / "catalog.sqlite3")
