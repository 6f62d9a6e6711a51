from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from catalog_samples import add
from old_formats import create_old_catalog, insert_old_row
from sqlite_utils import Database

from beacon_memory.documents import content_hash
from beacon_memory.errors import StoreError
from beacon_memory.storage.catalog.check import find_flaws
from beacon_memory.storage.catalog.migrations import migrations
from beacon_memory.storage.catalog.passages import split_passages
from beacon_memory.storage.catalog.sqlite import SQLiteCatalog
from beacon_memory.storage.catalog.words import indexed_form
from beacon_memory.storage.repair import verify
from beacon_memory.storage.store import MemoryStore

LONG = "\n\n".join(f"Paragraph {n} tells of the {n}th zebra.\0 " * 20 for n in range(9))
TEXTS = {"short": "about apples", "long": LONG, "a/ü 🚀\0": "about pears", "empty": ""}


def shape(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """The tables of a database with their columns, and its triggers and indexes."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        columns = {name: db.execute(f"PRAGMA table_info('{name}')").fetchall() for name in names}
        others = db.execute("SELECT type, name, tbl_name FROM sqlite_master WHERE type != 'table' ORDER BY name")
        return columns | {"": others.fetchall()}


def test_a_catalog_written_by_hand_is_what_the_old_steps_made(tmp_path: Path) -> None:
    create_old_catalog(tmp_path / "by-hand").close()
    db = Database(tmp_path / "by-steps")
    migrations.apply(db, stop_before=["m004_lifetimes"])
    db.close()
    assert shape(tmp_path / "by-hand") == shape(tmp_path / "by-steps")


def test_an_old_catalog_becomes_the_same_as_a_new_one(tmp_path: Path) -> None:
    create_old_catalog(tmp_path / "old").close()
    for name in ("old", "new"):
        SQLiteCatalog(tmp_path / name).close()
    assert shape(tmp_path / "old") == shape(tmp_path / "new")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "catalog.sqlite3"
    with contextlib.closing(create_old_catalog(path)) as db:
        for n, (id, text) in enumerate(TEXTS.items()):
            metadata = json.dumps({"n": n, "even": n % 2 == 0, "nested": {"n": n}, "\ud800": None})
            insert_old_row(db, text, id=id, metadata=metadata, compression="hybrid", bytes=100 + n)
    return path


def test_an_old_catalog_keeps_all_it_has(old: Path) -> None:
    with contextlib.closing(SQLiteCatalog(old)) as catalog:
        rows = {row.id: row for row in catalog.documents.list()}
        assert rows.keys() == TEXTS.keys()
        for n, (id, text) in enumerate(TEXTS.items()):
            row = rows[id]
            assert catalog.documents.text(id) == text
            assert row.content_hash == content_hash(text)
            assert row.metadata == {"n": n, "even": n % 2 == 0, "nested": {"n": n}, "\ud800": None}
            assert (row.file, row.fingerprint, row.compression) == (f"kv/{id}", "f" * 16, "hybrid")
            assert (row.tokens, row.slots, row.bytes, row.ratios) == (13, 6, 100 + n, (2, 4))
            assert row.created_at == "2025-01-02T00:00:00.000+00:00"
            assert row.updated_at == "2025-01-03T00:00:00.000+00:00"
            assert (row.precision, row.tags, row.pinned, row.expires_at, row.used_at) == ("", (), False, None, 0)
        assert find_flaws(catalog) == []


def test_an_old_catalog_is_searched_counted_and_filtered(old: Path) -> None:
    with contextlib.closing(SQLiteCatalog(old)) as catalog:
        assert [hit.document for hit in catalog.texts.search("apples")] == ["short"]
        hits = catalog.texts.search("zebras", limit=100)
        assert [hit.text for hit in sorted(hits, key=lambda hit: hit.start)] == [
            LONG[start:stop] for start, stop in split_passages(LONG)
        ]
        assert (catalog.properties.count("documents"), catalog.properties.count("bytes")) == (4, 406)
        assert [row.id for row in catalog.documents.list(metadata={"even": True})] == ["a/ü 🚀\0", "short"]
        assert [row.id for row in catalog.documents.list(metadata={"n": 1})] == ["long"]
        assert [row.id for row in catalog.documents.list(metadata={"\ud800": None})] == sorted(TEXTS)
        assert catalog.file_names.unsettled() == set()


def test_texts_of_an_old_catalog_are_found_in_every_script(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    with contextlib.closing(create_old_catalog(path)) as db:
        for n in range(3):
            insert_old_row(db, "The rent of the mill. " * 900, id=f"english {n}")
        insert_old_row(db, "磨坊的租金由磨坊主艾达支付。", id="chinese")
        insert_old_row(db, "Аренда мельницы Алёны", id="russian")
    with contextlib.closing(SQLiteCatalog(path)) as catalog:
        assert [hit.document for hit in catalog.texts.search("租金")] == ["chinese"]
        assert [hit.document for hit in catalog.texts.search("АЛЕНЫ")] == ["russian"]
        assert {hit.document for hit in catalog.texts.search("rents", 100)} == {"english 0", "english 1", "english 2"}
        assert find_flaws(catalog) == []
        catalog.documents.delete("chinese")
        assert catalog.texts.search("租金") == []


def test_an_old_catalog_is_written_to(old: Path) -> None:
    with contextlib.closing(SQLiteCatalog(old)) as catalog:
        assert add(catalog, "short", "about plums", compression="select") == catalog.documents.require("short")
        assert catalog.documents.require("short").created_at == "2025-01-02T00:00:00.000+00:00"
        assert catalog.documents.text("short") == "about plums"
        assert not catalog.texts.search("apples")
        catalog.documents.delete("long")
        assert not catalog.texts.search("zebra")
        assert catalog.properties.count("documents") == 3
        assert find_flaws(catalog) == []


def test_old_rows_are_sealed(old: Path) -> None:
    SQLiteCatalog(old).close()
    with contextlib.closing(sqlite3.connect(old)) as db:
        db.execute("UPDATE documents SET tokens = 14 WHERE id = 'short'")
        db.commit()
    with contextlib.closing(SQLiteCatalog(old)) as catalog:
        with pytest.raises(StoreError, match="row of 'short' is damaged"):
            catalog.documents.require("short")
        assert catalog.documents.require("long").tokens == 13


@pytest.mark.parametrize("text", ["about apples", LONG, ""])
def test_a_text_whose_passages_are_lost_or_damaged_is_cut_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "catalog.sqlite3"
    with contextlib.closing(create_old_catalog(path)) as db:
        insert_old_row(db, text, passages=False, id="lost")
        insert_old_row(db, text, id="damaged")
        insert_old_row(db, "something about pears", id="sound")
        db.execute("UPDATE passages SET text = 'about plums' WHERE document = 'damaged' AND ordinal = 0")
        (last,) = db.execute("SELECT max(id) FROM passages").fetchone()
    with contextlib.closing(SQLiteCatalog(path)) as catalog:
        assert catalog.documents.text("lost") == catalog.documents.text("damaged") == text
        assert not catalog.texts.search("plums")
        assert [hit.document for hit in catalog.texts.search("pears")] == ["sound"]
        assert len(catalog.texts.search("apples zebra", 100)) == 2 * len(split_passages(text))
        assert find_flaws(catalog) == []
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT id FROM passages WHERE document = 'sound'").fetchall() == [(last,)]


def test_a_step_that_fails_leaves_the_catalog_as_it_was(old: Path) -> None:
    with contextlib.closing(sqlite3.connect(old)) as db:
        db.execute("CREATE TABLE versions (in_the_way TEXT)")
    before = shape(old)
    with pytest.raises(StoreError, match="versions already exists"):
        SQLiteCatalog(old)
    assert shape(old) == before
    with contextlib.closing(sqlite3.connect(old)) as db:
        db.execute("DROP TABLE versions")
    with contextlib.closing(SQLiteCatalog(old)) as catalog:
        assert catalog.documents.text("long") == LONG


def test_processes_that_open_an_old_catalog_together_bring_it_up_to_date_once(old: Path) -> None:
    script = (
        "import sys; from beacon_memory.storage.catalog.sqlite import SQLiteCatalog\n"
        "print(len(SQLiteCatalog(sys.argv[1]).documents.list()))"
    )
    command = [sys.executable, "-c", script, str(old)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [child.communicate(timeout=60) for child in children] == [("4\n", "")] * 4


def test_settings_of_before_they_were_sealed_are_kept(tmp_path: Path) -> None:
    with MemoryStore(tmp_path) as store:
        settings = store.configure(quota=10**6, precision="int8")
    with contextlib.closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as db:
        db.execute("ALTER TABLE properties DROP COLUMN checksum")
        db.execute("ALTER TABLE properties RENAME TO facts")
        db.execute("ALTER TABLE documents RENAME COLUMN checksum TO seal")
        db.execute("DELETE FROM _sqlite_migrations WHERE name IN ('m005_sealed_facts', 'm006_names')")
        db.commit()
    with MemoryStore(tmp_path) as store:
        assert store.settings == settings
        assert verify(store) == []


def with_long_passages(path: Path, texts: dict[str, str]) -> None:
    """Make a catalog of before passages were short."""
    with contextlib.closing(SQLiteCatalog(path)) as catalog, catalog.connections.transaction() as db:
        for id, text in texts.items():
            add(catalog, id, text, tags=("session",) if id == "talk" else ())
            (kind,) = db.execute("SELECT kind FROM passages WHERE document = ?", [id]).fetchone()
            db.execute("DELETE FROM passages WHERE document = ?", [id])
            for n, start in enumerate(range(0, len(text), 1000)):
                part = text[start : start + 1000]
                db.execute(
                    "INSERT INTO passages (document, ordinal, start, stop, text, indexed_form, kind) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [id, n, start, start + len(part), part, indexed_form(part), kind],
                )
        db.execute("DELETE FROM _sqlite_migrations WHERE name = 'm012_short_passages'")


def passages(path: Path, id: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        select = "SELECT start, stop, CAST(text AS BLOB), kind FROM passages WHERE document = ? ORDER BY ordinal"
        return db.execute(select, [id]).fetchall()


def test_texts_in_long_passages_are_cut_into_short_ones(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite3"
    text = LONG + "磨坊的租金由磨坊主艾达支付。" * 40
    with_long_passages(path, {"doc": text, "talk": text, "short": "about apples"})
    before = passages(path, "short")
    assert len(passages(path, "doc")) == -(-len(text) // 1000)
    with contextlib.closing(SQLiteCatalog(path)) as catalog:
        for id in ("doc", "talk"):
            assert catalog.documents.text(id) == text
            kind = "conversation" if id == "talk" else None
            cuts = [(start, stop, text[start:stop].encode(), kind) for start, stop in split_passages(text)]
            assert passages(path, id) == cuts
        assert passages(path, "short") == before
        hits = catalog.texts.search("租金", 100, documents=["doc"])
        assert hits
        assert all("租金" in hit.text == text[hit.start : hit.stop] for hit in hits)
        assert {hit.document for hit in catalog.texts.search("zebra", 500, conversations=False)} == {"doc"}
        assert find_flaws(catalog) == []


@pytest.mark.parametrize(
    "damage", ["text = 'about plums'", "text = CAST(x'ff6162' AS TEXT)", "text = x'6162'", "start = 7", "ordinal = 99"]
)
def test_damaged_texts_are_not_cut_anew(tmp_path: Path, damage: str) -> None:
    """Whoever looks at them shall still see that they are damaged, and what is left of them."""
    path = tmp_path / "catalog.sqlite3"
    with_long_passages(path, {"damaged": LONG, "sound": LONG})
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"UPDATE passages SET {damage} WHERE document = 'damaged' AND ordinal = 1")
        db.commit()
    before = passages(path, "damaged")
    with contextlib.closing(SQLiteCatalog(path)) as catalog:
        assert passages(path, "damaged") == before
        with pytest.raises(StoreError, match="text of 'damaged' is damaged"):
            catalog.documents.text("damaged")
        assert catalog.documents.text("sound") == LONG
        assert len(passages(path, "sound")) == len(split_passages(LONG)) > len(before)
