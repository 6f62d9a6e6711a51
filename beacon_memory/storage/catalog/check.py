"""Checking a catalog as a whole, and mending what follows from its rows. Only `storage.repair` needs this."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping
from typing import Any

from sqlite_utils import Database

from beacon_memory.errors import CorruptFileError, StoreError

from .catalog import Catalog
from .rows import DocumentRow, properties_of
from .texts import misindexed

__all__ = ["find_flaws", "mend_catalog"]


def find_flaws(catalog: Catalog) -> list[str]:
    """Return what is wrong with a database as a whole, a sentence each; [] if it is sound. Rows are not looked at."""
    with catalog.connections.use() as db:
        found = [str(line) for (line,) in db.execute("PRAGMA integrity_check(10)").fetchall() if line != "ok"]
        if found and catalog.connections.misread():
            raise StoreError(f"{catalog.path} cannot be read: {found[0]}; see to the disk")
        if not found:
            try:
                _check_full_text(db.conn)
            except sqlite3.DatabaseError as error:
                if not isinstance(catalog.connections.failure(error), CorruptFileError):
                    raise
                found.append(f"the full-text index does not fit the passages: {error}")
        with catalog.reading():  # others may be writing
            properties = catalog.properties
            if any(properties.find_count(name) != count for name, count in _counts(db)):
                found.append("the numbers of documents and bytes are not those of the rows")
            if properties.find_count("last") is None:
                found.append("the number of the last file is lost")
            sound, damaged = properties.sound_and_damaged()
            if damaged or "identity" not in sound:
                found.append(f"what it says of itself is damaged: {', '.join(map(repr, damaged)) or 'identity'}")
            if any(set(properties_of(row.metadata, row.tags)) != _labels(db, row.id) for row in _sound_rows(catalog)):
                found.append("what documents are found by is not what their rows say")
            if any(misindexed(db)):
                found.append("what passages are found by is not what they are")
    return found


def _check_full_text(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError if the full-text index does not fit the passages.

    SQLite has a command for that, which changes nothing, but is only taken where something could be changed: of a
    database that may only be read, a temporary copy is looked at.
    """
    check = "INSERT INTO passages_fts(passages_fts, rank) VALUES('integrity-check', 1)"
    try:
        connection.execute(check)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY:
            raise
        with contextlib.closing(sqlite3.connect("", isolation_level=None)) as copy:  # "": a file that goes with it
            connection.backup(copy)
            copy.execute(check)


def mend_catalog(catalog: Catalog, properties: Mapping[str, Any]) -> None:
    """Make anew what follows from the rows: indexes, full-text index, counts, and labels to filter by.

    properties: values to set in place of damaged ones, where the catalog's own cannot be read.
    """
    with catalog.transaction(), catalog.connections.use() as db:
        # not the index of the steps that made the tables: which names are right, its own or those of its table?
        for table in ("documents", "passages", "labels", "versions", "conversations", "unsettled", "properties"):
            db.execute(f"REINDEX {table}")
        db.execute("INSERT INTO passages_fts(passages_fts) VALUES('rebuild')")
        for name, count in _counts(db):
            catalog.properties.set(name, count)
        if catalog.properties.find_count("last") is None:
            catalog.properties.set("last", int(time.time() * 1000))
        sound, damaged = catalog.properties.sound_and_damaged()
        if damaged or "identity" not in sound:
            for name in damaged:
                db.execute(
                    "DELETE FROM properties WHERE name = CAST(? AS TEXT)", [name.encode(errors="surrogateescape")]
                )
            for name, value in {"identity": secrets.token_hex(16), **properties, **sound}.items():
                catalog.properties.set(name, value)
        for row in _sound_rows(catalog):
            catalog.documents.update(row)
        for values in misindexed(db):  # triggers keep the index in step
            db.execute("UPDATE passages SET indexed_form = ?, kind = ? WHERE id = ?", values)


def _counts(db: Database) -> Iterator[tuple[str, int]]:
    """Count documents and bytes in the rows, by the names of their properties."""
    yield "documents", int(db.execute("SELECT count(*) FROM documents").fetchone()[0])
    bytes_ = "SELECT bytes FROM documents UNION ALL SELECT bytes FROM versions"
    yield "bytes", int(db.execute(f"SELECT coalesce(sum(bytes), 0) FROM ({bytes_})").fetchone()[0])  # noqa: S608


def _sound_rows(catalog: Catalog) -> Iterator[DocumentRow]:
    return (row for row in catalog.documents.scan() if isinstance(row, DocumentRow))


def _labels(db: Database, id: str) -> set[tuple[str, str]]:
    return set(db.execute("SELECT name, value FROM labels WHERE document = ?", [id]).fetchall())
