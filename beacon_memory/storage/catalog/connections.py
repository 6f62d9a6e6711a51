"""Connections to one SQLite database, as many as threads use at a time, so that readers never wait for a writer.

connections = SQLiteConnections(folder / "catalog.sqlite3")
with connections.transaction() as db:
    db.execute("DELETE FROM documents WHERE id = ?", ["a.txt"])
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

from sqlite_utils import Database

from beacon_memory.errors import CorruptFileError, StoreError
from beacon_memory.storage.files.durable import status
from beacon_memory.storage.files.locks import renew_in_forks

__all__ = ["BUSY_SECONDS", "SQLiteConnections", "SQLiteDatabase", "begin_immediate", "may_come_back"]

BUSY_SECONDS = 30.0  # how long to wait for another process that writes
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_UNSHARABLE = {sqlite3.SQLITE_IOERR_SHMMAP, sqlite3.SQLITE_IOERR_SHMOPEN, sqlite3.SQLITE_IOERR_SHMSIZE}
_REFUSED = {  # by the system, whatever is in the database
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOLFS,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_TOOBIG,
}
_SEEN_AS_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}  # and not their finer codes
_PIECE = 1 << 20  # bytes read at a time

_pools: weakref.WeakSet[SQLiteConnections] = weakref.WeakSet()
# Kept for ever: SQLite forbids to use a connection, and even to close it, after a fork
_inherited: list[SQLiteDatabase] = []


class SQLiteDatabase(Database):
    """A connection to SQLite; a `database.Database`."""

    def executemany(self, sql: str, values: Iterable[Sequence[object]]) -> None:
        """Execute a statement once for each of many values."""
        self.conn.executemany(sql, values)


class _Unshared(SQLiteDatabase):
    """A read-only connection that does not see what others write, so it is closed after one use."""


class SQLiteConnections:
    """Lend connections to one database to threads, and keep those that are not in use for the next.

    Errors of SQLite are raised as StoreError, or as CorruptFileError if the database is damaged. `path` may be
    ":memory:", for a database that vanishes when it is closed; threads take turns with it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self._idle: list[SQLiteDatabase] = []
        self._own = threading.local()  # the connection that a thread is using
        self._turn = self._new_turn()
        _pools.add(self)
        renew_in_forks(self)

    def _renew(self) -> None:
        """Let go of what a forked process must not touch; see `renew_in_forks`."""
        self._turn = self._new_turn()
        if self.path != ":memory:":
            _inherited.extend(self._idle)
            self._idle, self._own = [], threading.local()

    def _new_turn(self) -> contextlib.AbstractContextManager[object]:
        return threading.Lock() if self.path == ":memory:" else contextlib.nullcontext()

    def close(self) -> None:
        """Close the connections that are not in use."""
        with contextlib.suppress(IndexError):  # the last one
            while True:
                self._idle.pop().close()

    @property
    def in_transaction(self) -> bool:
        """Whether this thread is within a transaction, and so sees the database as it was when that began."""
        db: SQLiteDatabase | None = getattr(self._own, "db", None)
        return db is not None and db.conn.in_transaction

    @contextlib.contextmanager
    def use(self) -> Iterator[SQLiteDatabase]:
        """Lend this thread a connection of its own; a `use` inside of another one lends the same connection."""
        own = self._own
        db: SQLiteDatabase | None = getattr(own, "db", None)
        try:
            if db is not None:
                yield db
                return
            with self._turn:
                own.db = db = self._take()
                try:
                    yield db
                finally:
                    own.db = None
                    if db.conn.in_transaction:  # whoever began it was interrupted before it could end it
                        db.rollback()
                    if isinstance(db, _Unshared):
                        db.close()
                    else:
                        (self._idle if own is self._own else _inherited).append(db)
        except sqlite3.Error as error:
            raise self.failure(error) from error
        except UnicodeDecodeError as error:  # of an error message that quotes a damaged schema
            raise self.failure(sqlite3.DatabaseError(str(error))) from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[SQLiteDatabase]:
        """Hold the write lock: what is written inside is committed together, or not at all if anything raises.

        Raises StoreError if another process holds the lock for more than 30 seconds.
        """
        with self.use() as db, begin_immediate(db):
            yield db

    @contextlib.contextmanager
    def reading(self) -> Iterator[SQLiteDatabase]:
        """Show the database as it is now to all that is read inside, whatever others write meanwhile."""
        with self.use() as db:
            if db.conn.in_transaction:
                yield db
                return
            db.execute("BEGIN")
            try:
                yield db
            finally:
                db.rollback()

    @contextlib.contextmanager
    def unsynced(self) -> Iterator[SQLiteDatabase]:
        """Lend a connection whose commits survive the death of this process, but not a power cut: that saves a sync."""
        with self.use() as db:
            if db.conn.in_transaction:  # whoever began it wants its commit synced
                yield db
                return
            db.execute("PRAGMA synchronous = NORMAL")
            try:
                yield db
            finally:
                db.execute("PRAGMA synchronous = FULL")

    def note(self, sql: str, values: Iterable[Sequence[object]]) -> bool:
        """Write something that is not worth waiting for; False if another process is writing just now.

        sql: one statement, executed for each of `values`.
        """
        with self.unsynced() as db:
            db.execute("PRAGMA busy_timeout = 0")
            try:
                with begin_immediate(db):
                    db.executemany(sql, values)
            except sqlite3.OperationalError:
                return False
            finally:
                db.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        return True

    def _take(self) -> SQLiteDatabase:
        try:
            return self._idle.pop()
        except IndexError:
            pass
        try:
            return self._connect()
        except sqlite3.OperationalError as error:
            # To read with others SQLite writes two files beside the database. Where that is not allowed, or the disk is
            # full, and nobody left a log there, the database is all there is, and whoever only reads can do without.
            if not _unsharable(error) or _size(f"{self.path}-wal"):
                raise
            return _Unshared(_opened(f"file:{quote(str(self.path))}?immutable=1"), execute_plugins=False)

    def _connect(self) -> SQLiteDatabase:
        db = SQLiteDatabase(_opened(self.path), execute_plugins=False)
        try:
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA cell_size_check = ON")
            db.execute("PRAGMA cache_size = -16384")  # 16 MB: one page of a list looks at hundreds of an index
            # what is removed is overwritten, however this SQLite was compiled
            db.execute("PRAGMA secure_delete = ON")
            # FULL: a file is unlinked only when the commit that replaced it is on disk
            db.execute("PRAGMA synchronous = FULL")
            _enable_wal(db)
        except BaseException:
            db.close()
            raise
        return db

    def failure(self, error: sqlite3.Error) -> StoreError:
        """Return the error of this package to raise for one of SQLite, with what to do about it."""
        if _code(error) in _BUSY:
            return StoreError(f"{self.path}: another process has been writing for {BUSY_SECONDS:.0f} s; try again")
        cut = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_SHORT_READ  # a file ends too early
        barred = _code(error) == sqlite3.SQLITE_READONLY and self._forbids_writing()
        seen_as_damage = getattr(error, "sqlite_errorcode", None) in _SEEN_AS_DAMAGE
        if (_code(error) in _REFUSED and not (cut or barred)) or (seen_as_damage and self.misread()):
            return StoreError(f"{self.path} cannot be written or read: {error}; see to space and permissions")
        return CorruptFileError(
            f"{self.path} cannot be used as a catalog: {error}; `beacon-memory repair` makes it anew"
        )

    def misread(self) -> bool:
        """Tell whether what SQLite has just called damage was an error of the machine.

        SQLite takes a disk that cannot read something (EIO) for one that holds something wrong, also where it checks a
        database. So the database is looked at anew: all of it, since nothing less tells.
        """
        if self.path == ":memory:":
            return False
        try:
            for end in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError), Path(f"{self.path}{end}").open("rb") as file:
                    while file.read(_PIECE):
                        pass
        except OSError:
            return True
        with contextlib.suppress(sqlite3.Error, UnicodeDecodeError), contextlib.closing(_opened(self.path)) as anew:
            anew.execute("PRAGMA cell_size_check = ON")
            tables = anew.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage > 0").fetchall()
            for (name,) in tables:
                for _ in anew.execute(f'SELECT * FROM "{name}"'):  # noqa: S608  # read from the schema
                    pass
            return anew.execute("PRAGMA integrity_check(1)").fetchall() == [("ok",)]
        return False

    def _forbids_writing(self) -> bool:
        """Tell whether the database file itself asks not to be written; in a catalog, only damage can make it do so.

        Byte 18 of an SQLite file is the version of the format that a writer must know. SQLite opens a file with a
        version that it does not know (more than 2) for reading only.
        """
        with contextlib.suppress(OSError), Path(self.path).open("rb") as file:
            return file.read(19)[18:] > b"\2"
        return False


@contextlib.contextmanager
def begin_immediate(db: Database) -> Iterator[None]:
    """Hold the write lock from the first moment of a transaction on; inside another transaction, set a savepoint.

    A plain BEGIN takes the lock at the first write, where SQLite may refuse it without waiting.
    """
    if db.conn.in_transaction:
        with db.atomic():
            yield
        return
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
    except BaseException:
        db.rollback()
        raise
    try:
        db.execute("COMMIT")
    except BaseException:
        db.rollback()
        with contextlib.suppress(sqlite3.Error):
            overwrite(db)
        raise


def may_come_back(error: BaseException) -> bool:
    """Tell whether a commit that failed with this error may stand in the log whole: not if there was no room for it."""
    cause = error.__cause__
    if isinstance(cause, sqlite3.Error):
        return _code(cause) != sqlite3.SQLITE_FULL
    return not (isinstance(cause, OSError) and cause.errno == errno.ENOSPC)


def overwrite(db: Database) -> None:
    """Write and sync a commit in place of one that failed in the end, if there is one; raises sqlite3.Error.

    If the log cannot be synced, SQLite takes a commit back, but leaves it in the log behind its end, where whoever
    reads the log anew after this process was killed would find it whole.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    try:
        db.execute("BEGIN IMMEDIATE")
        db.execute(f"PRAGMA user_version = {version}")  # is written, though it stays the same
        db.execute("COMMIT")
    except BaseException:
        db.rollback()
        raise


def _close_idle() -> None:
    """Close the connections that are not in use before this process is forked.

    A child that inherits a connection believes to hold the locks of its parent. Then the parent, or anybody, could
    remove the log that the child is writing to. Connections that other threads are using at that moment are inherited
    all the same.
    """
    for pool in list(_pools):
        if pool.path != ":memory:":
            pool.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_close_idle)


def _code(error: sqlite3.Error) -> int:
    """Return the primary result code of an error; `SQLITE_ERROR` for those that Python's module raises by itself."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _unsharable(error: sqlite3.Error) -> bool:
    """Tell whether the files that SQLite needs to share a database with others could not be written."""
    exact = getattr(error, "sqlite_errorcode", None)
    return exact in _UNSHARABLE or _code(error) in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)


def _size(path: str) -> int:
    found = status(Path(path))
    return found.st_size if found else 0


def _opened(path: Path | str) -> sqlite3.Connection:
    # isolation_level=None: transactions begin where we say so and nowhere else
    connection = sqlite3.connect(
        path,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        uri=isinstance(path, str) and path.startswith("file:"),
    )
    # a damaged value must not keep others from being read; its row's checksum or its text's hash tells
    connection.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
    return connection


def _enable_wal(db: Database) -> None:
    """Let readers go on while another process writes.

    SQLite does not wait when two connections switch a new database at the same time; so we do.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return db.enable_wal()
        except sqlite3.OperationalError as error:
            if _code(error) not in _BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
