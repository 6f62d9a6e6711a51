"""Checking a catalog as a whole, and mending what follows from its rows. Only `storage.repair` needs this."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from .catalog import Catalog
from .database import Database
from .rows import DocumentRow

__all__ = ["find_flaws", "mend_catalog"]


def find_flaws(catalog: Catalog) -> list[str]:
    """Return what is wrong with a database as a whole, a sentence each; [] if it is sound. Rows are not looked at."""
    with catalog.connections.use() as db:
        found = catalog.broken()
        with catalog.reading():  # others may be writing
            properties = catalog.properties
            if any(properties.find_count(name) != count for name, count in _counts(db)):
                found.append("the numbers of documents and bytes are not those of the rows")
            if properties.find_count("last") is None:
                found.append("the number of the last file is lost")
            sound, damaged = properties.sound_and_damaged()
            if damaged or "identity" not in sound:
                found.append(f"what it says of itself is damaged: {', '.join(map(repr, damaged)) or 'identity'}")
            if not all(map(catalog.documents.has_its_labels, _sound_rows(catalog))):
                found.append("what documents are found by is not what their rows say")
            if not catalog.texts.is_indexed():
                found.append("what passages are found by is not what they are")
    return found


def mend_catalog(catalog: Catalog, properties: Mapping[str, Any]) -> None:
    """Make anew what follows from the rows: indexes, full-text index, counts, and labels to filter by.

    properties: values to set in place of damaged ones, where the catalog's own cannot be read.
    """
    with catalog.transaction(), catalog.connections.use() as db:
        catalog.reindex()
        for name, count in _counts(db):
            catalog.properties.set(name, count)
        if catalog.properties.find_count("last") is None:
            catalog.properties.set("last", int(time.time() * 1000))
        sound, damaged = catalog.properties.sound_and_damaged()
        if damaged or "identity" not in sound:
            for name in damaged:
                catalog.properties.forget(name)
            for name, value in {"identity": secrets.token_hex(16), **properties, **sound}.items():
                catalog.properties.set(name, value)
        for row in _sound_rows(catalog):
            catalog.documents.update(row)
        catalog.texts.reindex()


def _counts(db: Database) -> Iterator[tuple[str, int]]:
    """Count documents and bytes in the rows, by the names of their properties."""
    yield "documents", int(db.execute("SELECT count(*) FROM documents").fetchone()[0])
    bytes_ = "SELECT bytes FROM documents UNION ALL SELECT bytes FROM versions"
    yield "bytes", int(db.execute(f"SELECT coalesce(sum(bytes), 0) FROM ({bytes_}) AS kept").fetchone()[0])  # noqa: S608


def _sound_rows(catalog: Catalog) -> Iterator[DocumentRow]:
    return (row for row in catalog.documents.scan() if isinstance(row, DocumentRow))
