"""The catalog of one machine: an SQLite file beside the K/V."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from beacon_memory.errors import CorruptFileError, StoreError
from beacon_memory.storage.files.durable import sync_file

from .connections import BUSY_SECONDS, SQLiteConnections, SQLiteDatabase, begin_immediate, overwrite
from .conversations import Conversations
from .documents import Documents
from .file_names import FileNames
from .migrations import migrate
from .properties import Properties
from .sqlite_texts import SQLiteTexts
from .versions import Versions

__all__ = ["SQLiteCatalog"]


class _Properties(Properties):
    """The properties of a catalog in SQLite, which are read again only if the database has been written to since."""

    def __init__(self, connections: SQLiteConnections, path: Path | str) -> None:
        super().__init__(connections, path)
        self._pool = connections
        self._known: WeakKeyDictionary[SQLiteDatabase, tuple[object, Mapping[str, Any]]] = WeakKeyDictionary()

    def all(self) -> Mapping[str, Any]:
        with self._pool.use() as db:
            if db.conn.in_transaction:  # what is read here may be undone
                return super().all()
            # The first number changes when others have committed something, the second with what is written here.
            state = (db.execute("PRAGMA data_version").fetchone()[0], db.conn.total_changes)
            known = self._known.get(db)
            if known is None or known[0] != state:
                known = self._known[db] = (state, super().all())
        return known[1]

    def forget(self, name: str) -> None:
        with self._pool.transaction() as db:
            db.execute("DELETE FROM properties WHERE name = CAST(? AS TEXT)", [name.encode(errors="surrogateescape")])


class _FileNames(FileNames):
    """The names of K/V files in SQLite."""

    def __init__(self, connections: SQLiteConnections, properties: Properties) -> None:
        super().__init__(connections)
        self._pool = connections
        self._properties = properties

    def take_number(self) -> int:
        with self._pool.unsynced() as db, begin_immediate(db):
            number = max(self._properties.count("last") + 1, int(time.time() * 1000))
            db.execute("UPDATE properties SET value = ? WHERE name = 'last'", [number])
        return number

    def settle(self, numbers: Iterable[str]) -> bool:
        sql = "DELETE FROM unsettled WHERE number = CAST(? AS TEXT)"  # bytes: a damaged one may be no UTF-8
        return self._pool.note(sql, [(number.encode(errors="surrogateescape"),) for number in numbers])


class SQLiteCatalog:
    """The SQLite database of a store; a `Catalog`.

    `path` may be ":memory:" for a catalog that vanishes when it is closed.
    """

    shared = False

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self.connections = SQLiteConnections(path)
        self.properties = _Properties(self.connections, path)
        self.texts = SQLiteTexts(self.connections)
        self.documents = Documents(self.connections, self.texts)
        self.versions = Versions(self.connections)
        self.conversations = Conversations(self.connections)
        self.file_names = _FileNames(self.connections, self.properties)
        try:
            with self.connections.use() as db:
                migrate(db)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections; the next use opens one again."""
        self.connections.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock: what is written inside is committed together, or not at all if anything raises.

        Raises StoreError if another process holds the lock for more than 30 seconds.
        """
        with self.connections.transaction():
            yield

    def overwrite(self) -> None:
        """Make sure that a commit which failed does not come back, whoever is killed now; raises StoreError."""
        with self.connections.use() as db:
            overwrite(db)

    def sync(self) -> None:
        """Wait until all that can be read outlasts a power cut; raises StoreError.

        Whoever commits waits for that, but may be killed before it is so, and others see the commit all the same.
        """
        try:
            with contextlib.suppress(FileNotFoundError):
                sync_file(Path(f"{self.path}-wal"))
        except OSError as error:
            raise StoreError(f"{self.path}-wal cannot be written: {error.strerror}; see to the disk") from error

    def wipe(self) -> None:
        """Write the whole database anew, and empty its log, so that nothing is left of rows that were removed.

        The index is made anew, since it keeps the words of removed texts until it happens to be merged; FTS5's
        `secure-delete` would not, but SQLite before 3.42 cannot read an index that was written with it. VACUUM, since
        pages keep copies of what they once held.

        Takes as much room once more. Raises StoreError if others read from the log for more than 30 seconds.
        """
        with self.transaction(), self.connections.use() as db:
            db.execute("INSERT INTO passages_fts(passages_fts) VALUES('rebuild')")
        with self.connections.use() as db:
            db.execute("VACUUM")
            busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy:
            raise StoreError(
                f"{self.path}: another process has been reading for {BUSY_SECONDS:.0f} s, so that its log, which holds "
                f"what was removed, cannot be emptied; try again"
            )
        self.sync()  # SQLite does not: a power cut could fill the log again

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Show the catalog as it is now to all that is read inside, whatever others write meanwhile."""
        with self.connections.reading():
            yield

    def broken(self) -> list[str]:
        """Return what is wrong with the database file and its full-text index, a sentence each."""
        with self.connections.use() as db:
            found = [str(line) for (line,) in db.execute("PRAGMA integrity_check(10)").fetchall() if line != "ok"]
            if found and self.connections.misread():
                raise StoreError(f"{self.path} cannot be read: {found[0]}; see to the disk")
            if not found:
                try:
                    _check_full_text(db.conn)
                except sqlite3.DatabaseError as error:
                    if not isinstance(self.connections.failure(error), CorruptFileError):
                        raise
                    found.append(f"the full-text index does not fit the passages: {error}")
        return found

    def reindex(self) -> None:
        """Make the indexes of the tables and the full-text index anew."""
        with self.transaction(), self.connections.use() as db:
            # not the index of the steps that made the tables: which names are right, its own or those of its table?
            for table in ("documents", "passages", "labels", "versions", "conversations", "unsettled", "properties"):
                db.execute(f"REINDEX {table}")
            db.execute("INSERT INTO passages_fts(passages_fts) VALUES('rebuild')")


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
