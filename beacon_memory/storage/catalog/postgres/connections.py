"""Connections to one schema of a PostgreSQL database, as many as threads use at a time.

    connections = PostgresConnections("postgresql://db.example.com/memories", "beacon_memory")
    with connections.transaction() as db:
        db.execute("DELETE FROM documents WHERE id = ?", ["a.txt"])

One that was lost, because the server was restarted for instance, is left, and the next use opens another.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import select
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from beacon_memory.errors import BeaconMemoryError, InputError, MissingDependencyError, StoreError
from beacon_memory.storage.catalog.database import Results, Values
from beacon_memory.storage.files.locks import renew_in_forks

if TYPE_CHECKING:
    import psycopg

__all__ = ["BUSY_SECONDS", "PostgresConnections", "PostgresDatabase"]

BUSY_SECONDS = 30.0  # how long to wait for another process that writes
_CONNECT_SECONDS = 10.0  # how long to try, as while a server is being restarted
_PAUSE_SECONDS = 0.2
_OLDEST = 130000  # the server's version, as it says it
_CLIENT: dict[str, Any] = {  # a machine that vanished is noticed within a minute
    "application_name": "beacon-memory",
    "client_encoding": "utf8",
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_SETTINGS = """
    SELECT set_config('search_path', %s, false), set_config('lock_timeout', %s, false), set_config('jit', 'off', false),
        set_config('synchronous_commit', CASE s WHEN 'off' THEN 'on' WHEN 'local' THEN 'on' ELSE s END, false)
    FROM current_setting('synchronous_commit') s
"""
_PLACEHOLDER = re.compile(r"\?|(?<![:\w]):([a-z_]+)")

_inherited: list[PostgresDatabase] = []  # kept for ever: who closes one after a fork ends that of the parent


class PostgresDatabase:
    """A connection to PostgreSQL; a `database.Database`.

    writing: whether this connection holds the lock of writers, see `locks`.
    """

    def __init__(self, connection: psycopg.Connection) -> None:
        self.connection = connection
        self.writing = False

    @property
    def in_transaction(self) -> bool:
        """Tell whether a transaction has begun, even if it has failed since."""
        from psycopg.pq import TransactionStatus

        return self.connection.info.transaction_status is not TransactionStatus.IDLE

    def execute(self, sql: str, values: Values | None = None, /) -> Results:
        """Execute a statement, or several without values."""
        return self.connection.execute(_translated(sql) if values is not None else sql, values)

    def query(self, sql: str, values: Values | None = None, /) -> Iterable[dict[str, Any]]:
        """Return the rows that a statement selects, as values by column."""
        from psycopg.rows import dict_row

        with self.connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(_translated(sql), values or ()).fetchall()

    def executemany(self, sql: str, values: Iterable[Sequence[object]], /) -> None:
        """Execute a statement once for each of many values."""
        with self.connection.cursor() as cursor:
            cursor.executemany(_translated(sql), values)

    def copy(self, table: str, rows: Iterable[Sequence[object]]) -> None:
        """Write many rows; table: its name with columns in brackets."""
        with self.connection.cursor() as cursor, cursor.copy(f"COPY {table} FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)


class PostgresConnections:
    """Lend connections to one schema to threads, and keep those that are not in use for the next.

    Errors of PostgreSQL are raised as StoreError, or as InputError if a value is too long for it.
    """

    def __init__(self, url: str, schema: str) -> None:
        _require_psycopg()
        self.url = url
        self.schema = schema
        self._idle: list[PostgresDatabase] = []
        self._own = threading.local()  # the connection that a thread is using
        renew_in_forks(self)

    def _renew(self) -> None:
        """Let go of what a forked process must not touch; see `renew_in_forks`."""
        _inherited.extend(self._idle)
        self._idle, self._own = [], threading.local()

    @property
    def path(self) -> str:
        """Return where the schema is, as messages say it."""
        return self.url

    def close(self) -> None:
        """Close the connections that are not in use."""
        with contextlib.suppress(IndexError):  # the last one
            while True:
                self._idle.pop().connection.close()

    @property
    def in_transaction(self) -> bool:
        """Tell whether this thread is within a transaction, and so sees the database as it was when that began."""
        db: PostgresDatabase | None = getattr(self._own, "db", None)
        return db is not None and db.in_transaction

    @contextlib.contextmanager
    def use(self) -> Iterator[PostgresDatabase]:
        """Lend this thread a connection of its own; a `use` inside of another one lends the same connection."""
        import psycopg

        own = self._own
        db: PostgresDatabase | None = getattr(own, "db", None)
        try:
            if db is not None:
                yield db
                return
            own.db = db = self._take()
            try:
                yield db
            finally:
                own.db = None
                self._give_back(db, own is not self._own)
        except psycopg.Error as error:
            raise self.failure(error) from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[PostgresDatabase]:
        """Hold the write lock: what is written inside is committed together, or not at all if anything raises.

        Raises StoreError if another process holds the lock for more than 30 seconds.
        """
        with self.use() as db:
            outermost = not db.in_transaction
            with db.connection.transaction():
                if outermost:  # each statement sees what was committed before it, so this waits for the last writer
                    db.execute("SELECT pg_advisory_xact_lock(?)", [self.lock_key("rows")])
                yield db

    @contextlib.contextmanager
    def reading(self) -> Iterator[PostgresDatabase]:
        """Show the database as it is now to all that is read inside, whatever others write meanwhile."""
        with self.use() as db:
            if db.in_transaction:
                yield db
                return
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                yield db
            finally:
                if not db.connection.closed:
                    db.connection.rollback()

    def note(self, sql: str, values: Iterable[Sequence[object]]) -> bool:
        """Write something that is not worth waiting for; False if another process is writing just now.

        sql: one statement, executed for each of `values`.
        """
        with self.use() as db:
            outermost = not db.in_transaction
            with db.connection.transaction():
                if outermost:
                    (free,) = db.execute("SELECT pg_try_advisory_xact_lock(?)", [self.lock_key("rows")]).fetchone()
                    if not free:
                        return False
                    db.execute("SET LOCAL synchronous_commit = off")
                db.executemany(sql, values)
        return True

    def lock_key(self, what: str) -> int:
        """Return the number of an advisory lock of this schema."""
        return int.from_bytes(hashlib.sha256(f"{self.schema} {what}".encode()).digest()[:8], signed=True)

    def failure(self, error: psycopg.Error) -> BeaconMemoryError:
        """Return the error of this package to raise for one of PostgreSQL, with what to do about it."""
        from psycopg import errors

        said = str(error).strip()
        if isinstance(error, errors.LockNotAvailable):
            return StoreError(f"{self.path}: another process has been writing for {BUSY_SECONDS:.0f} s; try again")
        if isinstance(error, errors.ProgramLimitExceeded):
            return InputError(
                f"an id or label is too long for PostgreSQL, which indexes some 2,000 bytes of it: {said}"
            )
        if isinstance(error, errors.InsufficientPrivilege):
            return StoreError(f"{self.path}: {said}; the role needs to create schemas and tables in this database")
        if isinstance(error, errors.DiskFull):
            return StoreError(f"{self.path} cannot be written: {said}; see to the server's disk")
        if error.sqlstate is None or error.sqlstate.startswith(("08", "57P")):  # of the connection; of the server's end
            return StoreError(
                f"{self.path}: the connection was lost or cannot be made ({said}); what was being written is there "
                f"whole, or not at all: look, and try again"
            )
        return StoreError(f"{self.path}: {said}")

    def _take(self) -> PostgresDatabase:
        with contextlib.suppress(IndexError):
            while True:
                db = self._idle.pop()
                if not _ended(db):
                    return db
                db.connection.close()
        return self._connect()

    def _give_back(self, db: PostgresDatabase, forked: bool) -> None:
        if forked:
            _inherited.append(db)
            return
        if db.in_transaction or db.writing:  # whoever began it was interrupted before it could end it
            db.connection.close()
        if not db.connection.closed:
            self._idle.append(db)

    def _connect(self) -> PostgresDatabase:
        import psycopg

        patient = time.monotonic() + _CONNECT_SECONDS
        while True:
            try:
                connection = psycopg.connect(self.url, autocommit=True, **_CLIENT)
                break
            except psycopg.OperationalError as error:
                if not _may_pass(error) or time.monotonic() > patient:
                    raise
                time.sleep(_PAUSE_SECONDS)
        try:
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED  # whatever the server's default is
            _require_server(connection, self.url)
            _keep_texts_whole(connection)
            connection.execute(_SETTINGS, [self.schema, str(int(BUSY_SECONDS * 1000))])
        except BaseException:
            connection.close()
            raise
        return PostgresDatabase(connection)


def _require_psycopg() -> None:
    """Raise MissingDependencyError if psycopg is not installed."""
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"a store in PostgreSQL needs psycopg: pip install 'beacon-memory[postgres]' ({error})"
        ) from error


def _require_server(connection: psycopg.Connection, url: str) -> None:
    """Raise StoreError unless the server can hold a catalog."""
    if connection.info.server_version < _OLDEST:
        raise StoreError(f"{url}: PostgreSQL {connection.info.server_version // 10000} is too old; use 13 or newer")
    if (encoding := connection.info.parameter_status("server_encoding")) != "UTF8":
        raise StoreError(f"{url}: the database is encoded in {encoding}, not UTF8; create one with ENCODING 'UTF8'")


def _may_pass(error: psycopg.OperationalError) -> bool:
    """Tell whether another try may connect: the server is being started, or not there just now."""
    refused = "authentication", "does not exist", "role", "password", "SSL", "pg_hba", "could not translate", "resolve"
    return not any(one in str(error) for one in refused)


def _ended(db: PostgresDatabase) -> bool:
    """Tell whether a connection that was idle was ended from the other side, without asking there.

    Nothing is sent to an idle connection but the reason why it ends, and then its end.
    """
    try:
        return bool(db.connection.closed or select.select([db.connection.fileno()], [], [], 0)[0])
    except (OSError, ValueError):
        return True


@functools.lru_cache(maxsize=512)
def _translated(sql: str) -> str:
    """Return a statement with the placeholders of psycopg."""
    escaped = sql.replace("%", "%%")
    return _PLACEHOLDER.sub(lambda found: f"%({found[1]})s" if found[1] else "%s", escaped)


def _keep_texts_whole(connection: psycopg.Connection) -> None:
    r"""Let a connection write and read texts that hold NUL, which PostgreSQL's do not.

    NUL is written as \1\1 and \1 as \1\2, so texts compare, and begin with each other, as before.
    """
    text = connection.adapters.types["text"].oid
    written, read = _adapters()
    connection.adapters.register_dumper(str, written)
    connection.adapters.register_loader(text, read)


@functools.cache
def _adapters() -> tuple[type[Any], type[Any]]:
    from psycopg.adapt import Dumper, Loader

    class Written(Dumper):
        oid = 0  # PostgreSQL takes it for what is wanted there

        def dump(self, obj: str) -> bytes:
            return re.sub(b"[\0\1]", lambda one: b"\1\1" if one[0] == b"\0" else b"\1\2", obj.encode())

    class Read(Loader):
        def load(self, data: Any) -> str:
            data = bytes(data)
            if b"\1" in data:
                data = re.sub(b"\1[\1\2]", lambda one: b"\0" if one[0] == b"\1\1" else b"\1", data)
            return str(data, "utf-8")

    return Written, Read
