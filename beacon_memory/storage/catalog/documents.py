"""The rows of documents: read, listed by filters, written, and removed."""

from __future__ import annotations

import builtins
import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from beacon_memory.documents import Label, Text, check_id, utc_now
from beacon_memory.errors import CorruptFileError, DocumentNotFoundError, InputError

from .database import Connections, Database
from .rows import COLUMNS, DamagedRow, DocumentRow, files_of, from_record, printable, properties_of, to_record
from .texts import Texts, damaged_text

__all__ = ["Documents"]

_ALL = 2**63 - 1  # rows
_COMPARED = 1000  # ids that are compared with one that is not found, and the characters of each
_SELECT = f"SELECT {', '.join(f'documents.{column}' for column in COLUMNS)} FROM documents"  # noqa: S608  # our names
# Where the thousandth document lies that has a label, from an id on: the further, the rarer the label is there.
_REACH = "SELECT document FROM labels WHERE name = ? AND value = ? AND document >= ? ORDER BY 1 LIMIT 1 OFFSET 999"
_ALSO = "EXISTS (SELECT 1 FROM labels l WHERE l.name = ? AND l.value = ? AND l.document = labels.document)"
_INSERT = f"INSERT INTO documents ({', '.join(COLUMNS)}) VALUES ({', '.join(f':{column}' for column in COLUMNS)})"  # noqa: S608
_UPSERT = f"{_INSERT} ON CONFLICT (id) DO UPDATE SET {', '.join(f'{one} = excluded.{one}' for one in COLUMNS[1:])}"
_ALIVE = "(documents.expires_at IS NULL OR documents.expires_at > ?)"


class Documents:
    """The rows of a catalog's documents.

    A document that has expired is treated as if it were not there, by all methods but `expired`, `scan` and `delete`.
    Whoever reads a damaged row gets a CorruptFileError.
    """

    def __init__(self, connections: Connections, texts: Texts) -> None:
        self._connections = connections
        self._texts = texts

    def get(self, id: str) -> DocumentRow | None:
        """Return the row of a document, or None."""
        with self._connections.use() as db:
            found = list(db.query(f"{_SELECT} WHERE id = ? AND {_ALIVE}", [check_id(id), utc_now()]))
        return from_record(found[0]) if found else None

    def require(self, id: str) -> DocumentRow:
        """Return the row of a document; raises DocumentNotFoundError, which suggests similar ids."""
        row = self.get(id)
        if row is None:
            raise self._not_found(id)
        return row

    def list(
        self,
        *,
        prefix: str = "",
        tags: Iterable[str] = (),
        metadata: Mapping[str, object] | None = None,
        after: str = "",
        limit: int | None = None,
    ) -> builtins.list[DocumentRow]:
        """Return rows in the order of their ids.

        prefix:   only of ids that begin with it.
        tags:     only of documents that have all of them.
        metadata: only of documents that have all of these values: a text, number, true, false or None, each at the top
                  of their metadata.
        after, limit: only so many rows, of ids that come after this one: page by page.

        Raises InputError for a filter that could match nothing.
        """
        if limit is not None and (type(limit) is not int or limit < 1):
            raise InputError(f"limit must be an integer of at least 1, or None for all, got {limit!r}")
        for id in filter(None, (prefix, after)):
            check_id(id)
        sought = Label({} if metadata is None else metadata, tags)
        wanted = builtins.list(self._labels(_plain(sought.metadata), sought.tags))
        with self._connections.use() as db:
            start = max(after, prefix)
            if len(wanted) > 1:
                reach = {one: db.execute(_REACH, [*one, start]).fetchone() for one in wanted}
                wanted.sort(key=lambda one: (reach[one] is None, reach[one]), reverse=True)
            # The rarest filter leads: its index is in the order of ids, so a page of it needs no sorting.
            id = "labels.document" if wanted else "documents.id"
            select = _SELECT.replace("FROM", "FROM labels CROSS JOIN") if wanted else _SELECT
            where = [f"{id} >= ? AND {id} <> ? AND {_ALIVE}"]
            values: builtins.list[object] = [start, after, utc_now()]
            if (end := _behind(prefix)) is not None:
                where.append(f"{id} < ?")
                values.append(end)
            for n, one in enumerate(wanted):
                where.append(_ALSO if n else "labels.name = ? AND labels.value = ? AND documents.id = labels.document")
                values += one
            sql = f"{select} WHERE {' AND '.join(where)} ORDER BY {id} LIMIT ?"
            found = builtins.list(db.query(sql, [*values, _ALL if limit is None else limit]))
        rows = [from_record(record) for record in found]  # not while it is read: an error would keep it being read
        for row in rows:
            if wanted and not set(wanted) <= {*self._labels(row.metadata, row.tags)}:
                raise CorruptFileError(
                    f"what {row.id!r} is found by is not what its row says; `beacon-memory repair` makes it anew"
                )
        return rows

    def scan(self) -> Iterator[DocumentRow | DamagedRow]:
        """Yield the rows of all documents in the order of their ids, expired ones too, damaged or not."""
        with self._connections.use() as db:
            found = builtins.list(db.query(f"{_SELECT.replace('SELECT', 'SELECT documents.rowid,')} ORDER BY id"))
        for record in found:
            number = record.pop("rowid")
            try:
                yield from_record(record)
            except CorruptFileError as error:
                yield DamagedRow(number, printable(record["id"]), printable(record["file"]), printable(error), record)

    def text(self, id: str) -> str:
        """Return the source text of a document; raises DocumentNotFoundError, or CorruptFileError if it is damaged."""
        with self._connections.reading():  # text and row of one version
            row = self.require(id)
            text = self._texts.find(id, row.content_hash)
        if text is None:
            raise damaged_text(id)
        return text

    def put(self, row: DocumentRow, text: Text) -> DocumentRow:
        """Write the row and text of a document, new or in place of what it has; returns the row as it is now.

        A replaced row keeps its created_at. Raises InputError if text or id cannot be stored.
        """
        if row.content_hash != text.sha256:
            raise InputError(f"content_hash {row.content_hash!r} of {row.id!r} is not the sha256 of its text")
        check_id(row.id)
        with self._connections.transaction() as db:
            old = db.execute("SELECT content_hash, created_at FROM documents WHERE id = ?", [row.id]).fetchone()
            if old is not None:
                row = replace(row, created_at=str(old[1]))
            self._write(db, row)
            if old is None or old[0] != row.content_hash or self._texts.find(row.id, row.content_hash) is None:
                self._texts.write(row.id, text.value)
            self._texts.set_kind(row.id, row.tags)
        return row

    def append(self, row: DocumentRow, text: Text) -> None:
        """Write the row of a document whose text has grown at its end, and what is new of that.

        Raises InputError if the row is of another text.
        """
        if row.content_hash != text.sha256:
            raise InputError(f"content_hash {row.content_hash!r} of {row.id!r} is not the sha256 of its text")
        with self._connections.transaction() as db:
            self._write(db, row)
            self._texts.append(row.id, text.value, row.tags)

    def update(self, row: DocumentRow) -> None:
        """Write the row of a document whose text stays."""
        with self._connections.transaction() as db:
            self._write(db, row)
            self._texts.set_kind(row.id, row.tags)

    def rename(self, id: str, row: DocumentRow) -> None:
        """Put `row`, with an id that is free, in the place of a document's row; its kept versions are removed."""
        with self._connections.transaction() as db:
            self._write(db, row)
            db.execute("UPDATE passages SET document = ? WHERE document = ?", [row.id, id])
            self._texts.set_kind(row.id, row.tags)
            db.execute("DELETE FROM documents WHERE id = ?", [id])

    def delete(self, id: str) -> builtins.list[str]:
        """Remove a document with its text and versions; returns its K/V files, or raises DocumentNotFoundError."""
        with self._connections.transaction() as db:
            found = db.execute(
                "SELECT file, segments FROM documents WHERE id = ? "
                "UNION ALL SELECT file, segments FROM versions WHERE document = ?",
                [check_id(id), id],
            ).fetchall()
            if not found:
                raise self._not_found(id)
            db.execute("DELETE FROM documents WHERE id = ?", [id])
        return [name for columns in found for name in files_of(*columns)]

    def forget(self, row: DamagedRow) -> None:
        """Remove a damaged row, with text and versions."""
        with self._connections.transaction() as db:
            db.execute("DELETE FROM documents WHERE rowid = ?", [row.number])

    def touch(self, used: Mapping[str, int]) -> bool:
        """Note when documents were used, in seconds since 1970; False if another process is writing just now."""
        sql = "UPDATE documents SET used_at = ? WHERE id = ? AND used_at < ?"
        return self._connections.note(sql, [(at, id, at) for id, at in used.items()])

    def least_used(self, count: int) -> builtins.list[DocumentRow]:
        """Return up to `count` rows of documents that are not pinned, first the one that was not used for longest."""
        with self._connections.use() as db:
            found = builtins.list(db.query(f"{_SELECT} WHERE pinned = 0 ORDER BY used_at LIMIT ?", [count]))
        return [from_record(record) for record in found]

    def expired(self, now: str) -> builtins.list[str]:
        """Return the ids of documents that have expired; a damaged row is left out, for its time may be the damage."""
        with self._connections.use() as db:
            found = builtins.list(db.query(f"{_SELECT} WHERE expires_at <= ?", [now]))
        ids = []
        for record in found:
            with contextlib.suppress(CorruptFileError):
                row = from_record(record)
                if row.expires_at is not None and row.expires_at <= now:  # an index may be damaged, too
                    ids.append(row.id)
        return sorted(ids)

    def has_its_labels(self, row: DocumentRow) -> bool:
        """Tell whether a document is found by what its row says, and by nothing else."""
        with self._connections.use() as db:
            kept = db.execute("SELECT name, value FROM labels WHERE document = ?", [row.id]).fetchall()
        return set(kept) == set(self._labels(row.metadata, row.tags))

    def _labels(self, metadata: Mapping[str, object], tags: Iterable[str]) -> Iterable[tuple[str, str]]:
        """Return what a document with these metadata and tags can be found by, as names and values."""
        return properties_of(metadata, tags)

    def _write(self, db: Database, row: DocumentRow) -> None:
        """Write a row, and the labels that it is found by."""
        db.execute(_UPSERT, to_record(row))
        db.execute("DELETE FROM labels WHERE document = ?", [row.id])
        labels = [(name, value, row.id) for name, value in self._labels(row.metadata, row.tags)]
        db.executemany("INSERT INTO labels (name, value, document) VALUES (?, ?, ?)", labels)

    def _not_found(self, id: str) -> DocumentNotFoundError:
        with self._connections.use() as db:
            rows = db.execute(
                f"SELECT id FROM documents WHERE length(id) <= ? AND {_ALIVE} ORDER BY id LIMIT ?",  # noqa: S608
                [_COMPARED, utc_now(), _COMPARED],
            ).fetchall()
        close = difflib.get_close_matches(id[:_COMPARED], [str(row[0]) for row in rows])
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "list() shows the ids there are"
        return DocumentNotFoundError(f"no document {id!r} is stored; {hint}")


def _behind(prefix: str) -> str | None:
    """Return the first of all texts that sort behind those that begin with `prefix`; None if there are none."""
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if following == 0xD800 else following)  # between lie the surrogates, in no text


def _plain(metadata: Mapping[str, object]) -> Mapping[str, object]:
    """Return metadata unchanged; raises InputError if a value is no text, number, true, false or null."""
    for name, value in metadata.items():
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise InputError(f"metadata {name}={value!r}: only a text, number, true, false or null can be looked for")
    return metadata
