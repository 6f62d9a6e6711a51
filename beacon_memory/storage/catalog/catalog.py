"""The index of what is stored: a row a document, its source text in passages, and their full-text index.

Nothing here imports torch. The K/V themselves are files, see `kv_file.py`; `store.py` keeps the two in step.
"""

from __future__ import annotations

import builtins
import contextlib
import difflib
import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from beacon_memory.documents import Label, Text, check_id, utc_now
from beacon_memory.errors import CorruptFileError, DocumentNotFoundError, InputError

from .connections import BUSY_SECONDS, Connections
from .full_text import PassageHit, search
from .migrations import begin_immediate, migrate
from .passages import split_passages
from .rows import COLUMNS, DamagedRow, DocumentRow, checksum, from_record, properties_of, to_record

__all__ = ["COUNTS", "Catalog", "DocumentRow", "PassageHit"]

COUNTS = ("documents", "bytes", "last")
_COMPARED = 1000  # ids that are compared with one that is not found, and the characters of each
_SELECT = f"SELECT {', '.join(f'documents.{column}' for column in COLUMNS)} FROM documents"  # noqa: S608  # our names
# Where the thousandth document lies that has a label, from an id on: the further, the rarer the label is there.
_REACH = "SELECT document FROM labels WHERE name = ? AND value = ? AND document >= ? ORDER BY 1 LIMIT 1 OFFSET 999"
_ALSO = "EXISTS (SELECT 1 FROM labels l WHERE l.name = ? AND l.value = ? AND l.document = labels.document)"
_INSERT = f"INSERT INTO documents ({', '.join(COLUMNS)}) VALUES ({', '.join(f':{column}' for column in COLUMNS)})"  # noqa: S608
_UPSERT = f"{_INSERT} ON CONFLICT (id) DO UPDATE SET {', '.join(f'{one} = excluded.{one}' for one in COLUMNS[1:])}"
_ALIVE = "(documents.expires_at IS NULL OR documents.expires_at > ?)"


class Catalog:
    """The SQLite database of a store, safe to use from several threads and processes at a time.

    What SQLite raises comes out as StoreError. `path` may be ":memory:" for a catalog that vanishes when closed.
    Documents that have expired are as good as not there, to all but `expired`, `scan` and `files`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self._connections = Connections(path)
        try:
            with self._database() as db:
                migrate(db)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections; the next use opens one again."""
        self._connections.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock: what is written inside is committed together, or not at all if anything raises.

        Raises StoreError if another process holds the lock for more than 30 seconds.
        """
        with self._database() as db, begin_immediate(db):
            yield

    def get(self, id: str) -> DocumentRow | None:
        """The row of a document, or None. This and all that read rows raise CorruptFileError for a damaged one."""
        with self._database() as db:
            found = list(db.query(f"{_SELECT} WHERE id = ? AND {_ALIVE}", [check_id(id), utc_now()]))
        return from_record(found[0]) if found else None

    def require(self, id: str) -> DocumentRow:
        """The row of a document; raises DocumentNotFoundError, which suggests similar ids."""
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
        """Rows by id, no texts: of ids that begin with `prefix`, with all these tags and values in the metadata.

        A value is a plain one (text, number, true, false, None) at the top of the metadata. after, limit: only so many
        rows, of ids that come after this one: page by page. Raises InputError for what nothing could be found by.
        """
        if limit is not None and (type(limit) is not int or limit < 1):
            raise InputError(f"limit must be an integer of at least 1, or None for all, got {limit!r}")
        for id in filter(None, (prefix, after)):
            check_id(id)
        sought = Label({} if metadata is None else metadata, tags)
        wanted = builtins.list(properties_of(_plain(sought.metadata), sought.tags))
        with self._database() as db:
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
            found = builtins.list(db.query(sql, [*values, -1 if limit is None else limit]))
        return [from_record(record) for record in found]  # not while it is read: an error would keep it being read

    def scan(self) -> Iterator[DocumentRow | DamagedRow]:
        """The rows of all documents by id, expired ones too, damaged or not."""
        with self._database() as db:
            found = builtins.list(db.query(f"{_SELECT.replace('SELECT', 'SELECT documents.rowid,')} ORDER BY id"))
        for record in found:
            number = record.pop("rowid")
            try:
                yield from_record(record)
            except CorruptFileError as error:
                yield DamagedRow(number, _utf8(record["id"]), _utf8(record["file"]), _utf8(error), record)

    def text(self, id: str) -> str:
        """The source text of a document; raises DocumentNotFoundError, or CorruptFileError if it is damaged."""
        with self.reading():  # text and row of one version
            row = self.require(id)
            text = self.kept_text(id, row.content_hash)
        if text is None:
            raise CorruptFileError(f"the catalog's text of {id!r} is damaged; `beacon-memory repair` takes its file's")
        return text

    def kept_text(self, id: str, content_hash: str) -> str | None:
        """The text of this hash that the passages of a document are, whatever its row says; None if it is another."""
        with self._database() as db:
            passages = "SELECT CAST(text AS BLOB) FROM passages WHERE document = ? ORDER BY ordinal"
            text = b"".join(passage or b"" for (passage,) in db.execute(passages, [id]))
        return text.decode() if hashlib.sha256(text).hexdigest() == content_hash else None

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """What is read inside is of one moment."""
        with self._database() as db:
            if db.conn.in_transaction:
                yield
                return
            db.execute("BEGIN")
            try:
                yield
            finally:
                db.rollback()

    def put(self, row: DocumentRow, text: Text) -> DocumentRow:
        """Write or replace a document's row, text and passages; returns the row as it is now.

        A replaced row keeps its created_at. Raises InputError if text or id cannot be stored.
        """
        if row.content_hash != text.sha256:
            raise InputError(f"content_hash {row.content_hash!r} of {row.id!r} is not the sha256 of its text")
        check_id(row.id)
        with self.transaction(), self._database() as db:
            old = db.execute("SELECT content_hash, created_at FROM documents WHERE id = ?", [row.id]).fetchone()
            if old is not None:
                row = replace(row, created_at=str(old[1]))
            row = self._write(db, row)
            if old is None or old[0] != row.content_hash or self.kept_text(row.id, row.content_hash) is None:
                self._write_text(db, row.id, text.value)
        return row

    def update(self, row: DocumentRow) -> None:
        """Write the row of a document whose text stays."""
        with self.transaction(), self._database() as db:
            self._write(db, row)

    def rename(self, id: str, row: DocumentRow) -> None:
        """Let `row`, of another id that is free, take the place of a document's, whose kept versions go."""
        with self.transaction(), self._database() as db:
            self._write(db, row)
            db.execute("UPDATE passages SET document = ? WHERE document = ?", [row.id, id])
            db.execute("DELETE FROM documents WHERE id = ?", [id])

    def delete(self, id: str) -> builtins.list[str]:
        """Remove a document; returns the K/V files it had, or raises DocumentNotFoundError."""
        with self.transaction(), self._database() as db:
            found = db.execute(
                "SELECT file FROM documents WHERE id = ? UNION ALL SELECT file FROM versions WHERE document = ?",
                [check_id(id), id],
            ).fetchall()
            if not found:
                raise self._not_found(id)
            db.execute("DELETE FROM documents WHERE id = ?", [id])
        return [str(file) for (file,) in found]

    def forget(self, row: DamagedRow) -> None:
        """Remove whatever hangs on a damaged row."""
        with self.transaction(), self._database() as db:
            db.execute("DELETE FROM documents WHERE rowid = ?", [row.number])

    def keep_version(self, row: DocumentRow) -> builtins.list[str]:
        """Keep a row that is about to be replaced, as the version of its fingerprint; returns files to remove."""
        record = {"document": row.id, "fingerprint": row.fingerprint, "file": row.file, "bytes": row.bytes}
        with self.transaction(), self._database() as db:
            gone = self.drop_versions(row.id, row.fingerprint)
            db.table("versions").insert(record | {"record": json.dumps(to_record(row))})
        return gone

    def version(self, id: str, fingerprint: str) -> DocumentRow | None:
        """The kept version of a document for readers of a fingerprint; raises CorruptFileError if it is damaged."""
        return next((self._version(one) for one in self._versions(id) if one["fingerprint"] == fingerprint), None)

    def versions(self) -> Iterator[DocumentRow | DamagedRow]:
        """All kept versions, damaged or not."""
        for one in self._versions():
            try:
                yield self._version(one)
            except CorruptFileError as error:
                yield DamagedRow(one["rowid"], _utf8(one["document"]), _utf8(one["file"]), _utf8(error), one)

    def forget_version(self, row: DamagedRow) -> None:
        """Remove a damaged row of a kept version."""
        with self.transaction(), self._database() as db:
            db.execute("DELETE FROM versions WHERE rowid = ?", [row.number])

    def drop_versions(self, id: str | None = None, fingerprint: str | None = None) -> builtins.list[str]:
        """Forget the kept versions of a document, or of all, of one fingerprint or of all; returns their files."""
        given = {name: one for name, one in (("document", id), ("fingerprint", fingerprint)) if one is not None}
        where = " AND ".join(f"{name} = :{name}" for name in given) or "TRUE"
        with self.transaction(), self._database() as db:
            files = db.execute(f"SELECT file FROM versions WHERE {where}", given).fetchall()  # noqa: S608  # our names
            db.execute(f"DELETE FROM versions WHERE {where}", given)  # noqa: S608
        return [str(file) for (file,) in files]

    def search(self, query: str, limit: int = 10) -> builtins.list[PassageHit]:
        """The passages that share words with `query`, best first; see `full_text.search`."""
        with self.reading(), self._database() as db:
            return search(db, query, limit, utc_now())

    def files(self, id: str | None = None) -> set[str]:
        """The K/V files of a document, or of all, those of versions too."""
        where = ("WHERE id = ?", "WHERE document = ?") if id is not None else ("", "")
        sql = f"SELECT file FROM documents {where[0]} UNION ALL SELECT file FROM versions {where[1]}"  # noqa: S608
        with self._database() as db:
            return {str(file) for (file,) in db.execute(sql, [id, id] if id is not None else []).fetchall()}

    def properties(self) -> dict[str, Any]:
        """What is known of the whole catalog and does not follow from its rows; raises CorruptFileError if damaged.

        identity: a random text, of this catalog alone. Others are set with `write_property`.
        """
        sound, damaged = self._properties()
        if damaged:
            names = ", ".join(map(repr, damaged))
            raise CorruptFileError(f"{self.path}: what it says of {names} is damaged; `beacon-memory repair` mends it")
        return sound

    def sound_properties(self) -> dict[str, Any]:
        """As `properties`, without those that are damaged."""
        return self._properties()[0]

    def read_property(self, name: str) -> Any:
        """One of the `properties`, None if there is none of this name."""
        return self.properties().get(name)

    def count(self, name: str) -> int:
        """One of the `COUNTS`; raises CorruptFileError if it is lost.

        documents, bytes: how many there are, kept versions counted in bytes only. last: see `take_number`.
        """
        value = self._count(name)
        if value is None:
            raise CorruptFileError(f"{self.path}: the number of {name} is lost; `beacon-memory repair` finds it again")
        return value

    def write_property(self, name: str, value: object) -> None:
        """Set a property; None forgets it."""
        with self.transaction(), self._database() as db:
            if value is None:
                db.execute("DELETE FROM properties WHERE name = ?", [name])
            else:
                kept = {"name": name, "value": value}
                db.table("properties").upsert(kept | {"checksum": checksum(kept)}, pk="name")

    def take_number(self) -> int:
        """A number for a new file, higher than all before: milliseconds since 1970, or one more than the last."""
        with self._unsynced() as db, begin_immediate(db):
            number = max(self.count("last") + 1, int(time.time() * 1000))
            db.execute("UPDATE properties SET value = ? WHERE name = 'last'", [number])
        return number

    def unsettled(self) -> set[str]:
        """Numbers in names of files that had a row, and are about to be removed."""
        with self._database() as db:
            return {str(number) for (number,) in db.execute("SELECT number FROM unsettled").fetchall()}

    def settle(self, numbers: Iterable[str]) -> bool:
        """Forget numbers of files that are gone; False if another process is writing just now."""
        sql = "DELETE FROM unsettled WHERE number = CAST(? AS TEXT)"  # bytes: a damaged one may be no UTF-8
        return self._note(sql, [(number.encode(errors="surrogateescape"),) for number in numbers])

    def touch(self, used: Mapping[str, int]) -> bool:
        """Note when documents were used, in seconds since 1970; False if another process is writing just now."""
        sql = "UPDATE documents SET used_at = max(used_at, ?) WHERE id = ?"
        return self._note(sql, [(at, id) for id, at in used.items()])

    def _note(self, sql: str, values: builtins.list[tuple[object, ...]]) -> bool:
        """Write what is only a note: not worth to wait for, or to fail."""
        with self._unsynced() as db:
            db.execute("PRAGMA busy_timeout = 0")
            try:
                with begin_immediate(db):
                    db.conn.executemany(sql, values)
            except sqlite3.OperationalError:
                return False
            finally:
                db.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        return True

    @contextlib.contextmanager
    def _unsynced(self) -> Iterator[Database]:
        """A connection for what must outlive this process, not the machine: that saves a sync."""
        with self._database() as db:
            if db.conn.in_transaction:  # which others want synced
                yield db
                return
            db.execute("PRAGMA synchronous = NORMAL")
            try:
                yield db
            finally:
                db.execute("PRAGMA synchronous = FULL")

    def least_used(self, count: int) -> builtins.list[DocumentRow]:
        """Documents that are not pinned, longest unused first."""
        with self._database() as db:
            found = builtins.list(db.query(f"{_SELECT} WHERE pinned = 0 ORDER BY used_at LIMIT ?", [count]))
        return [from_record(record) for record in found]

    def expired(self, now: str) -> builtins.list[str]:
        """The ids of documents that have expired; not of damaged rows, which might say so by mistake."""
        with self._database() as db:
            found = builtins.list(db.query(f"{_SELECT} WHERE expires_at <= ?", [now]))
        ids = []
        for record in found:
            with contextlib.suppress(CorruptFileError):
                row = from_record(record)
                if row.expires_at is not None and row.expires_at <= now:  # an index may be damaged, too
                    ids.append(row.id)
        return sorted(ids)

    def check(self) -> builtins.list[str]:
        """What is wrong with the database as a whole; [] is sound."""
        with self._database() as db:
            found = [str(line) for (line,) in db.execute("PRAGMA integrity_check(10)").fetchall() if line != "ok"]
            if not found:
                try:
                    db.execute("INSERT INTO passages_fts(passages_fts, rank) VALUES('integrity-check', 1)")
                except sqlite3.DatabaseError as error:
                    if not isinstance(self._connections.failure(error), CorruptFileError):
                        raise
                    found.append(f"the full-text index does not fit the passages: {error}")
            with self.reading():  # others may be writing
                if any(self._count(name) != count for name, count in self._counts(db)):
                    found.append("the numbers of documents and bytes are not those of the rows")
                if self._count("last") is None:
                    found.append("the number of the last file is lost")
                sound, damaged = self._properties()
                if damaged or "identity" not in sound:
                    found.append(f"what it says of itself is damaged: {', '.join(map(repr, damaged)) or 'identity'}")
                if any(set(properties_of(row.metadata, row.tags)) != self._labels(db, row.id) for row in self._sound()):
                    found.append("what documents are found by is not what their rows say")
        return found

    def mend(self, properties: Mapping[str, Any]) -> None:
        """Make anew what follows from the rows: indexes, full-text index, counts, labels.

        properties: which to set in place of damaged ones, as far as they are known.
        """
        with self.transaction(), self._database() as db:
            # not the index of the steps that made the tables: which names are right, its own or those of its table?
            for table in ("documents", "passages", "labels", "versions", "unsettled", "properties"):
                db.execute(f"REINDEX {table}")
            db.execute("INSERT INTO passages_fts(passages_fts) VALUES('rebuild')")
            for name, count in self._counts(db):
                self.write_property(name, count)
            if self._count("last") is None:
                self.write_property("last", int(time.time() * 1000))
            sound, damaged = self._properties()
            if damaged or "identity" not in sound:
                for name in damaged:
                    db.execute(
                        "DELETE FROM properties WHERE name = CAST(? AS TEXT)", [name.encode(errors="surrogateescape")]
                    )
                for name, value in {"identity": secrets.token_hex(16), **properties, **sound}.items():
                    self.write_property(name, value)
            for row in self._sound():
                self._write(db, row)

    def _properties(self) -> tuple[dict[str, Any], builtins.list[str]]:
        """All properties but the counts, which change too often for a checksum: sound ones, names of damaged ones."""
        with self._database() as db:
            found = builtins.list(db.query("SELECT name, value, checksum FROM properties"))
        properties = [one for one in found if one["name"] not in COUNTS]
        damaged = [str(one["name"]) for one in properties if one["checksum"] != checksum(one)]
        return {one["name"]: one["value"] for one in properties if one["name"] not in damaged}, damaged

    def _count(self, name: str) -> int | None:
        with self._database() as db:
            found = db.execute("SELECT value FROM properties WHERE name = ?", [name]).fetchone()
        return found[0] if found is not None and type(found[0]) is int else None

    def _sound(self) -> Iterator[DocumentRow]:
        return (row for row in self.scan() if isinstance(row, DocumentRow))

    @staticmethod
    def _labels(db: Database, id: str) -> set[tuple[str, str]]:
        return set(db.execute("SELECT name, value FROM labels WHERE document = ?", [id]).fetchall())

    def _versions(self, id: str | None = None) -> builtins.list[dict[str, Any]]:
        where, values = ("WHERE document = ?", [id]) if id is not None else ("", [])
        with self._database() as db:
            found = db.query(f"SELECT rowid, * FROM versions {where} ORDER BY document, fingerprint", values)  # noqa: S608
            return builtins.list(found)

    @staticmethod
    def _version(stored: Mapping[str, Any]) -> DocumentRow:
        """What a row of the versions holds."""
        with contextlib.suppress(ValueError, KeyError, TypeError, CorruptFileError):
            row = from_record(json.loads(stored["record"]))
            columns = (stored["document"], stored["fingerprint"], stored["file"], stored["bytes"])
            if columns == (row.id, row.fingerprint, row.file, row.bytes):
                return row
        raise CorruptFileError(f"a kept version of {stored['document']!r} is damaged; `beacon-memory repair` drops it")

    @staticmethod
    def _counts(db: Database) -> Iterator[tuple[str, int]]:
        yield "documents", int(db.execute("SELECT count(*) FROM documents").fetchone()[0])
        bytes_ = "SELECT bytes FROM documents UNION ALL SELECT bytes FROM versions"
        yield "bytes", int(db.execute(f"SELECT coalesce(sum(bytes), 0) FROM ({bytes_})").fetchone()[0])  # noqa: S608

    def _database(self) -> contextlib.AbstractContextManager[Database]:
        return self._connections.use()

    @staticmethod
    def _write(db: Database, row: DocumentRow) -> DocumentRow:
        db.execute(_UPSERT, to_record(row))
        db.execute("DELETE FROM labels WHERE document = ?", [row.id])
        labels = [(name, value, row.id) for name, value in properties_of(row.metadata, row.tags)]
        db.conn.executemany("INSERT INTO labels (name, value, document) VALUES (?, ?, ?)", labels)
        return row

    @staticmethod
    def _write_text(db: Database, id: str, text: str) -> None:
        db.execute("DELETE FROM passages WHERE document = ?", [id])
        passages = [(id, n, start, stop, text[start:stop]) for n, (start, stop) in enumerate(split_passages(text))]
        insert = "INSERT INTO passages (document, ordinal, start, stop, text) VALUES (?, ?, ?, ?, ?)"
        db.conn.executemany(insert, passages)

    def _not_found(self, id: str) -> DocumentNotFoundError:
        with self._database() as db:
            rows = db.execute(
                f"SELECT id FROM documents WHERE length(id) <= ? AND {_ALIVE} ORDER BY id LIMIT ?",  # noqa: S608
                [_COMPARED, utc_now(), _COMPARED],
            ).fetchall()
        close = difflib.get_close_matches(id[:_COMPARED], [str(row[0]) for row in rows])
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "list() shows the ids there are"
        return DocumentNotFoundError(f"no document {id!r} is stored; {hint}")


def _behind(prefix: str) -> str | None:
    """The first of all texts that come after those that begin with `prefix`; None if there are none."""
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if following == 0xD800 else following)  # between lie the surrogates, in no text


def _utf8(damaged: object) -> str:
    """What can be shown of something that may not be valid UTF-8."""
    return str(damaged).encode(errors="replace").decode()


def _plain(metadata: Mapping[str, object]) -> Mapping[str, object]:
    for name, value in metadata.items():
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise InputError(f"metadata {name}={value!r}: only a text, number, true, false or null can be looked for")
    return metadata
