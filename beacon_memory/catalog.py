"""The index of what is stored: a row a document, its source text, and a full-text index of its passages.

Nothing here imports torch. The K/V themselves are files, see `kv_file.py`; `store.py` keeps the two in step.
"""

from __future__ import annotations

import builtins
import contextlib
import difflib
import json
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from .document import check_id, check_metadata, content_hash, utc_now
from .errors import DocumentNotFoundError, InputError, StoreError
from .migrations import begin_immediate, created_at, migrate
from .passages import split_passages

__all__ = ["Catalog", "DocumentRow", "PassageHit"]

_BUSY_SECONDS = 30.0  # how long to wait for another process that writes
_COMPARED = 1000  # ids that are compared with one that is not found, and the characters of each

# Words of a question that say nothing of what it is about; "s", "t", ... are what apostrophes cut off.
_QUESTION_WORDS = frozenset(
    """
    a about all am an and any are as at be been but by can could d did do does for from had has have how i if in into is
    it its ll m may me might must my of on or our please re s shall should so some t tell than that the their them then
    there these they this those to ve was we were what when where which who whom whose why will with would you your
    """.split()  # noqa: SIM905 -- a list would be eighty lines
)


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """What the catalog knows of a document, its text apart.

    file:         name of the K/V file, relative to the store's folder, with forward slashes
    content_hash: sha256 of the text, in hexadecimal
    fingerprint:  digest of the `Fingerprint` of the K/V
    compression:  how the text became slots, one of `config.COMPRESSIONS`
    tokens, slots, bytes: raw tokens of the text; memory slots (of a head, the mean over all) and bytes of its K/V
    ratios:       the different ratios of its windows, ascending; the file's header has each window's own
    created_at, updated_at: ISO 8601, UTC; the first survives replacement
    """

    id: str
    file: str
    content_hash: str
    fingerprint: str
    compression: str
    tokens: int
    slots: int
    bytes: int
    ratios: tuple[int, ...]
    metadata: Mapping[str, object]
    created_at: str
    updated_at: str


_COLUMNS = ", ".join(field.name for field in fields(DocumentRow))


@dataclass(frozen=True, slots=True)
class PassageHit:
    """A passage that matches a query: characters start to stop of a document. A higher `score` (BM25) is better."""

    document: str
    ordinal: int
    start: int
    stop: int
    text: str
    score: float


class Catalog:
    """The SQLite database of a store, safe to use from several threads and processes at a time.

    What SQLite raises comes out as StoreError. `path` may be ":memory:" for a catalog that vanishes when closed.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self._lock = threading.RLock()
        try:
            # isolation_level=None: transactions begin where we say so and nowhere else
            connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._failure(error) from error
        self._db = Database(connection, execute_plugins=False)
        try:
            with self._database() as db:
                db.execute("PRAGMA foreign_keys = ON")
                # FULL: a file is unlinked only when the commit that replaced it is on disk
                db.execute("PRAGMA synchronous = FULL")
                _enable_wal(db)
                migrate(db)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; the catalog cannot be used any more."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock: what is written inside is committed together, or not at all if anything raises.

        Raises StoreError if another process holds the lock for more than 30 seconds.
        """
        with self._database() as db, begin_immediate(db):
            yield

    def get(self, id: str) -> DocumentRow | None:
        """The row of a document, or None."""
        with self._database() as db:
            found = list(db.table("documents").rows_where("id = ?", [check_id(id)], select=_COLUMNS))
        return _row(found[0]) if found else None

    def require(self, id: str) -> DocumentRow:
        """The row of a document; raises DocumentNotFoundError, which suggests similar ids."""
        row = self.get(id)
        if row is None:
            raise self._not_found(id)
        return row

    def list(self) -> builtins.list[DocumentRow]:
        """All rows by id; no text is read."""
        with self._database() as db:
            return [_row(found) for found in db.table("documents").rows_where(order_by="id", select=_COLUMNS)]

    def text(self, id: str) -> str:
        """The source text of a document; raises DocumentNotFoundError."""
        with self._database() as db:
            found = db.execute("SELECT text FROM documents WHERE id = ?", [check_id(id)]).fetchone()
        if found is None:
            raise self._not_found(id)
        return str(found[0])

    def put(self, row: DocumentRow, text: str) -> DocumentRow:
        """Write or replace a document's row, text and passages; returns the row as it is now.

        A replaced row keeps its created_at. Raises InputError if text, id or metadata cannot be stored.
        """
        if row.content_hash != content_hash(text):
            raise InputError(f"content_hash {row.content_hash!r} of {row.id!r} is not the sha256 of its text")
        row = replace(row, id=check_id(row.id), metadata=check_metadata(row.metadata))
        with self.transaction(), self._database() as db:
            old = self.get(row.id)
            if old is not None:
                row = replace(row, created_at=old.created_at)
            record = {**asdict(row), "ratios": json.dumps(row.ratios), "metadata": json.dumps(row.metadata)}
            db.table("documents").upsert({**record, "text": text}, pk="id")
            if old is None or old.content_hash != row.content_hash:
                db.table("passages").delete_where("document = ?", [row.id])
                db.table("passages").insert_all(
                    {"document": row.id, "ordinal": n, "start": start, "stop": stop, "text": text[start:stop]}
                    for n, (start, stop) in enumerate(split_passages(text))
                )
        return row

    def delete(self, id: str) -> DocumentRow:
        """Remove a document and its passages; returns the row it had, or raises DocumentNotFoundError."""
        with self.transaction(), self._database() as db:
            row = self.require(id)
            db.execute("DELETE FROM documents WHERE id = ?", [id])
        return row

    def set_metadata(self, id: str, metadata: Mapping[str, object]) -> DocumentRow:
        """Replace the metadata of a document as a whole; returns its new row, or raises DocumentNotFoundError."""
        metadata = check_metadata(metadata)
        with self.transaction(), self._database() as db:
            row = replace(self.require(id), metadata=metadata, updated_at=utc_now())
            changed = {"metadata": json.dumps(metadata), "updated_at": row.updated_at}
            db.table("documents").update(id, changed)
        return row

    def search(self, query: str, limit: int = 10) -> builtins.list[PassageHit]:
        """The passages that share words with `query`, best first by BM25; any text is a safe query.

        A query without any word finds nothing. Words are stemmed as English ones; accents and case do not matter.
        """
        if type(limit) is not int or limit < 1:
            raise InputError(f"limit must be an integer of at least 1, got {limit!r}")
        words = _words(query)
        if not words:
            return []
        with self._database() as db:
            found = db.execute(
                """
                SELECT passages.document, passages.ordinal, passages.start, passages.stop, passages.text, -rank
                FROM passages_fts JOIN passages ON passages.id = passages_fts.rowid
                WHERE passages_fts MATCH ? ORDER BY rank, passages.id LIMIT ?
                """,
                [" OR ".join(f'"{word}"' for word in words), limit],
            ).fetchall()
        return [PassageHit(*hit) for hit in found]

    def files(self) -> set[str]:
        """The K/V files of all rows."""
        with self._database() as db:
            return {str(file) for (file,) in db.execute("SELECT file FROM documents").fetchall()}

    def created_at(self) -> datetime:
        """When the catalog itself was created."""
        with self._database() as db:
            return created_at(db)

    @contextlib.contextmanager
    def _database(self) -> Iterator[Database]:
        """The connection, for this thread alone."""
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise self._failure(error) from error

    def _failure(self, error: sqlite3.Error) -> StoreError:
        if "locked" in str(error):
            return StoreError(f"{self.path}: another process has been writing for {_BUSY_SECONDS:.0f} s; try again")
        return StoreError(f"{self.path} cannot be used as a catalog: {error}; restore it from a backup, or remove it")

    def _not_found(self, id: str) -> DocumentNotFoundError:
        with self._database() as db:
            rows = db.execute(
                "SELECT id FROM documents WHERE length(id) <= ? ORDER BY id LIMIT ?", [_COMPARED, _COMPARED]
            ).fetchall()
        close = difflib.get_close_matches(id[:_COMPARED], [row[0] for row in rows])
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "list() shows the ids there are"
        return DocumentNotFoundError(f"no document {id!r} is stored; {hint}")


def _enable_wal(db: Database) -> None:
    """Let readers go on while another process writes.

    SQLite does not wait when two connections switch a new database at the same time; so we do.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            return db.enable_wal()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _row(found: Mapping[str, Any]) -> DocumentRow:
    decoded = {"ratios": tuple(json.loads(found["ratios"])), "metadata": json.loads(found["metadata"])}
    return DocumentRow(**{**found, **decoded})


def _words(query: str) -> builtins.list[str]:
    """The different words of a query in lower case, without question words if others remain.

    A word is a run of what FTS5's unicode61 takes for parts of a word; nothing that has a meaning to FTS5 is left.
    """
    if not isinstance(query, str):
        raise InputError(f"a query must be a str, got {query!r} of type {type(query).__name__}")
    kept = (char if char.isalnum() or unicodedata.category(char)[0] == "M" else " " for char in query.lower())
    words = dict.fromkeys(word for word in "".join(kept).split() if any(map(str.isalnum, word)))
    return [word for word in words if word not in _QUESTION_WORDS] or [*words]
