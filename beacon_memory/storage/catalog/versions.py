"""K/V of the same text that another model made, kept beside a document's own.

While documents are recompressed for a new model, programs with the old model go on with these *versions*. A version is
found by the fingerprint of the model that made it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from beacon_memory.errors import CorruptFileError

from .database import Connections
from .rows import DamagedRow, DocumentRow, files_of, from_record, printable, to_record

__all__ = ["Versions"]

_INSERT = """
    INSERT INTO versions (document, fingerprint, file, bytes, segments, record)
    VALUES (:document, :fingerprint, :file, :bytes, :segments, :record)
"""


class Versions:
    """The kept versions of documents."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def get(self, id: str, fingerprint: str) -> DocumentRow | None:
        """Return the row of a document's version, None if it has none; raises CorruptFileError if it is damaged."""
        return next((_row(one) for one in self._stored(id) if one["fingerprint"] == fingerprint), None)

    def scan(self) -> Iterator[DocumentRow | DamagedRow]:
        """Yield the rows of all versions, damaged or not."""
        for one in self._stored():
            try:
                yield _row(one)
            except CorruptFileError as error:
                yield DamagedRow(
                    one["rowid"], printable(one["document"]), printable(one["file"]), printable(error), one
                )

    def keep(self, row: DocumentRow) -> list[str]:
        """Keep a document's row that is about to be replaced; returns the files of the version whose place it takes."""
        record = {"document": row.id, "fingerprint": row.fingerprint, "file": row.file, "bytes": row.bytes}
        record["segments"] = json.dumps(row.segments)
        with self._connections.transaction() as db:
            gone = self.drop(row.id, row.fingerprint)
            db.execute(_INSERT, record | {"record": json.dumps(to_record(row))})
        return gone

    def drop(self, id: str | None = None, fingerprint: str | None = None) -> list[str]:
        """Drop the versions of a document, or of all, with one fingerprint, or with any; returns their files."""
        given = {name: one for name, one in (("document", id), ("fingerprint", fingerprint)) if one is not None}
        where = " AND ".join(f"{name} = :{name}" for name in given) or "TRUE"
        with self._connections.transaction() as db:
            found = db.execute(f"SELECT file, segments FROM versions WHERE {where}", given).fetchall()  # noqa: S608
            db.execute(f"DELETE FROM versions WHERE {where}", given)  # noqa: S608  # our names
        return [name for columns in found for name in files_of(*columns)]

    def forget(self, row: DamagedRow) -> None:
        """Remove a damaged row."""
        with self._connections.transaction() as db:
            db.execute("DELETE FROM versions WHERE rowid = ?", [row.number])

    def _stored(self, id: str | None = None) -> list[dict[str, Any]]:
        where, values = ("WHERE document = ?", [id]) if id is not None else ("", [])
        with self._connections.use() as db:
            return list(db.query(f"SELECT rowid, * FROM versions {where} ORDER BY document, fingerprint", values))  # noqa: S608


def _row(stored: Mapping[str, Any]) -> DocumentRow:
    """Return the row that is kept in the columns of a version; raises CorruptFileError if it is damaged."""
    with contextlib.suppress(ValueError, KeyError, TypeError, CorruptFileError):
        row = from_record(json.loads(stored["record"]))
        columns = tuple(stored[name] for name in ("document", "fingerprint", "file", "bytes", "segments"))
        if columns == (row.id, row.fingerprint, row.file, row.bytes, json.dumps(row.segments)):
            return row
    raise CorruptFileError(f"a kept version of {stored['document']!r} is damaged; `beacon-memory repair` drops it")
