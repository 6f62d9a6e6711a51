from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from catalog_samples import LATER, add

from beacon_memory.documents import Text
from beacon_memory.errors import CorruptFileError, StoreError
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.check import find_flaws, mend_catalog
from beacon_memory.storage.catalog.rows import COLUMNS, DamagedRow
from beacon_memory.storage.catalog.sqlite import SQLiteCatalog

LONG = "\n\n".join(f"Paragraph {n} tells of the {n}th zebra. " * 20 for n in range(9))


def change(catalog: Catalog, sql: str) -> None:
    """Change a catalog behind its back."""
    with contextlib.closing(sqlite3.connect(catalog.path, isolation_level=None)) as db:
        db.executescript(sql)


@pytest.mark.parametrize("column", [name for name in COLUMNS if name not in ("used_at", "pinned")])
@pytest.mark.parametrize("value", ["CAST(x'61ff00' AS TEXT)", "x'00'", "''", "7"])
def test_a_change_in_any_column_of_a_row_is_noticed(tmp_path: Path, column: str, value: str) -> None:
    catalog = SQLiteCatalog(tmp_path / "catalog.sqlite3")
    add(catalog, "doc", "text", metadata={"a": 1}, tags=("x",), expires_at=LATER)
    sound = add(catalog, "sound", "text")
    change(catalog, f"UPDATE documents SET {column} = {value} WHERE id = 'doc'")
    (damaged,) = (row for row in catalog.documents.scan() if isinstance(row, DamagedRow))
    assert "is damaged; `beacon-memory repair` makes it anew" in damaged.message
    (damaged.id + damaged.file + damaged.message).encode()  # can be shown
    assert catalog.documents.require("sound") == sound
    with pytest.raises(StoreError):
        catalog.documents.require("doc")
    catalog.documents.forget(damaged)
    assert [*catalog.documents.scan()] == [sound]
    assert catalog.properties.count("documents") == 1
    catalog.close()


def test_a_changed_pin_is_noticed(tmp_path: Path) -> None:
    catalog = SQLiteCatalog(tmp_path / "catalog.sqlite3")
    add(catalog, "doc", "text")
    change(catalog, "UPDATE documents SET pinned = 1")
    with pytest.raises(CorruptFileError, match="row of 'doc' is damaged"):
        catalog.documents.get("doc")
    with pytest.raises(CorruptFileError, match="row of 'doc' is damaged"):
        catalog.documents.list()


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE passages SET text = replace(text, '3th', '4th')",
        "UPDATE passages SET text = CAST(x'ff' || CAST(text AS BLOB) AS TEXT) WHERE ordinal = 1",
        "UPDATE passages SET ordinal = 100 WHERE ordinal = 0",
        "DELETE FROM passages WHERE ordinal = 2",
        "DELETE FROM passages",
        "UPDATE passages SET document = 'other' WHERE ordinal = 1",
        "UPDATE passages SET start = start + 1 WHERE ordinal = 1",
        "UPDATE passages SET stop = stop + 256 WHERE ordinal = 2",
        "UPDATE passages SET ordinal = 100 WHERE ordinal = (SELECT max(ordinal) FROM passages)",
    ],
)
def test_a_damaged_text_is_noticed(tmp_path: Path, sql: str) -> None:
    catalog = SQLiteCatalog(tmp_path / "catalog.sqlite3")
    kept = add(catalog, "doc", LONG)
    add(catalog, "other", "")
    change(catalog, sql)
    with pytest.raises(CorruptFileError, match="text of 'doc' is damaged; `beacon-memory repair` takes its file's"):
        catalog.documents.text("doc")
    assert catalog.texts.find("doc", kept.content_hash) is None
    catalog.documents.put(kept, Text(LONG))
    assert catalog.documents.text("doc") == LONG
    catalog.close()


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE passages SET text = replace(text, 'tells', 'yells') WHERE ordinal = 1",  # another than is found first
        "UPDATE passages SET text = replace(text, 'needle', 'noodle')",  # of which the index says so, too
        "DROP TRIGGER passages_au; UPDATE passages SET text = replace(text, '7th', '8th')",  # behind the index
        "UPDATE passages SET start = 7 WHERE document = 'doc' AND ordinal = 0",
        "UPDATE passages SET stop = stop + 1 WHERE document = 'doc'",
        "UPDATE passages SET document = 'other' WHERE document = 'doc'",
        "UPDATE passages SET document = CAST(x'646fff' AS TEXT) WHERE document = 'doc'",
        "UPDATE documents SET content_hash = 'x' WHERE id = 'doc'",
    ],
)
def test_no_passage_of_a_damaged_text_is_found(tmp_path: Path, sql: str) -> None:
    catalog = SQLiteCatalog(tmp_path / "catalog.sqlite3")
    add(catalog, "other", "")
    kept = add(catalog, "doc", f"{LONG} needle")
    add(catalog, "sound", "a boat")
    assert catalog.texts.search("zebra", 100)
    change(catalog, sql)
    with pytest.raises(CorruptFileError, match=r"text of '.+' is damaged; `beacon-memory repair` takes its file's"):
        catalog.texts.search("zebra", 100)
    assert [hit.document for hit in catalog.texts.search("boat")] == ["sound"]
    change(catalog, "DELETE FROM passages WHERE document != 'sound'")
    catalog.documents.put(kept, Text(f"{LONG} needle"))
    assert {hit.document for hit in catalog.texts.search("zebra", 100)} == {"doc"}
    catalog.close()


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("UPDATE properties SET value = 99 WHERE name = 'documents'", "the numbers of documents and bytes"),
        ("UPDATE properties SET value = 'many' WHERE name = 'bytes'", "the numbers of documents and bytes"),
        ("DELETE FROM properties WHERE name = 'bytes'", "the numbers of documents and bytes"),
        ("DELETE FROM properties WHERE name = 'last'", "the number of the last file is lost"),
        ("UPDATE properties SET value = 'x' WHERE name = 'last'", "the number of the last file is lost"),
        ("DELETE FROM labels WHERE name = 'tag'", "what documents are found by"),
        ("UPDATE labels SET value = '2' WHERE value = '1'", "what documents are found by"),
        ("INSERT INTO labels VALUES ('tag', 'y', 'doc')", "what documents are found by"),
        ("INSERT INTO passages_fts(passages_fts) VALUES ('delete-all')", "full-text index does not fit"),
        (
            "UPDATE passages SET indexed_form = 'about pears'",
            "what passages are found by is not what they are",
        ),
        ("UPDATE passages SET kind = 'conversation'", "what passages are found by is not what they are"),
        ("DROP TRIGGER passages_au; UPDATE passages SET text = 'about pears'", "full-text index does not fit"),
    ],
)
def test_what_follows_from_the_rows_is_checked_and_made_anew(tmp_path: Path, sql: str, message: str) -> None:
    catalog = SQLiteCatalog(tmp_path / "catalog.sqlite3")
    kept = add(catalog, "doc", "about apples", metadata={"a": 1}, tags=("x",))
    number = catalog.file_names.take_number()
    assert find_flaws(catalog) == []
    change(catalog, sql)
    (found,) = find_flaws(catalog)
    assert message in found
    mend_catalog(catalog, {})
    assert find_flaws(catalog) == []
    assert catalog.documents.list(tags=["x"], metadata={"a": 1}) == [kept]
    assert len(catalog.texts.search("apples", conversations=False)) == ("pears" not in sql or "indexed_form" in sql)
    assert (catalog.properties.count("documents"), catalog.properties.count("bytes")) == (1, kept.bytes)
    assert catalog.file_names.take_number() > number
    catalog.close()


def test_no_document_is_listed_by_a_label_that_its_row_has_not(tmp_path: Path) -> None:
    catalog = SQLiteCatalog(tmp_path / "catalog.sqlite3")
    kept = add(catalog, "doc", "about apples", metadata={"a": 1}, tags=("x",))
    change(catalog, "INSERT INTO labels VALUES ('tag', 'y', 'doc')")
    with pytest.raises(CorruptFileError, match="what 'doc' is found by is not what its row says"):
        catalog.documents.list(tags=["y"])
    assert catalog.documents.list(tags=["x"], metadata={"a": 1}) == [kept]
    catalog.close()


def test_a_check_that_must_wait_is_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beacon_memory.storage.catalog.connections.BUSY_SECONDS", 0.1)
    first, second = SQLiteCatalog(tmp_path / "catalog.sqlite3"), SQLiteCatalog(tmp_path / "catalog.sqlite3")
    with first.transaction(), pytest.raises(StoreError, match="another process has been writing") as caught:
        find_flaws(second)
    assert not isinstance(caught.value, CorruptFileError)
    first.close()
    second.close()
