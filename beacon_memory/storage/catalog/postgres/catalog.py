"""The catalog that many machines share: a schema of a PostgreSQL database.

    catalog = PostgresCatalog("postgresql://db.example.com/memories", schema_of(""))

Each namespace has a schema of its own, with the tables that a catalog in SQLite has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from beacon_memory.errors import CorruptFileError, InputError, StoreError
from beacon_memory.storage.catalog.conversations import Conversations
from beacon_memory.storage.catalog.documents import Documents
from beacon_memory.storage.catalog.file_names import FileNames
from beacon_memory.storage.catalog.properties import Properties
from beacon_memory.storage.catalog.versions import Versions

from .connections import BUSY_SECONDS, PostgresConnections
from .migrations import exists, migrate
from .texts import PostgresTexts

__all__ = ["PostgresCatalog", "check_url", "is_url", "namespaces_at", "schema_of"]

_SCHEMES = ("postgresql://", "postgres://")
_SCHEMA = "beacon_memory"
_LONGEST = 300  # bytes of a label that are indexed as they are: PostgreSQL's indexes take 2,700 with the id
_TABLES = ("documents", "labels", "versions", "passages", "words", "conversations", "properties", "unsettled", "begun")
_PAUSE_SECONDS = 0.1
_OLDER = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend'
    AND pid <> pg_backend_pid() AND xact_start < ?
"""
_TAKE_NUMBER = """
    WITH taken AS (
        UPDATE properties SET value = CAST(greatest(
            CAST(value AS bigint) + 1, CAST(floor(extract(epoch FROM clock_timestamp()) * 1000) AS bigint)
        ) AS text)
        WHERE name = 'last' RETURNING CAST(value AS bigint) AS number
    ), kept AS (INSERT INTO begun SELECT lpad(to_hex(number), 12, '0') FROM taken)
    SELECT number FROM taken
"""
_SETTLE = """
    WITH begun AS (
        DELETE FROM begun WHERE number IN (SELECT number FROM begun WHERE number = ANY(:numbers) FOR UPDATE SKIP LOCKED)
    )
    DELETE FROM unsettled WHERE number IN (
        SELECT number FROM unsettled WHERE number = ANY(:numbers) FOR UPDATE SKIP LOCKED
    )
"""


def is_url(place: object) -> bool:
    """Tell whether a store is named by a URL, rather than by a folder."""
    return isinstance(place, str) and "://" in place


def check_url(url: str) -> str:
    """Return the URL of a database unchanged; raises InputError for one that cannot be used, or holds a password."""
    if not url.startswith(_SCHEMES):
        raise InputError(f"{url.partition('://')[0]}://... is no store: name a folder, or postgresql://host/database")
    try:
        parts = urlsplit(url)
        secret = parts.password is not None or "password=" in parts.query
    except ValueError as error:
        raise InputError(
            f"the URL of a store cannot be read: {error}; give one such as postgresql://host/database"
        ) from None
    if secret:  # which is not shown
        raise InputError(
            "the URL of a store names a place only: give the password in PGPASSWORD, ~/.pgpass or a service file"
        )
    if not parts.path.strip("/"):
        raise InputError(f"{url!r} names no database; give one such as postgresql://host/database")
    return url


def schema_of(namespace: str) -> str:
    """Return the schema of a namespace; "" is the one outside of all others."""
    return f"{_SCHEMA}_{hashlib.sha256(namespace.encode()).hexdigest()[:32]}" if namespace else _SCHEMA


def namespaces_at(url: str) -> list[str]:
    """Return the names of all namespaces in a database that were ever written to, sorted."""
    with contextlib.closing(PostgresConnections(url, _SCHEMA)) as connections, connections.use() as db:
        pattern = f"^{_SCHEMA}(_[0-9a-f]{{32}})?$"
        schemas = db.execute("SELECT nspname FROM pg_namespace WHERE nspname ~ ?", [pattern]).fetchall()
    found = []
    for (schema,) in schemas:
        with contextlib.closing(PostgresConnections(url, schema)) as connections:
            if exists(connections):
                name = _Properties(connections, url).get("namespace")
                found += [""] if schema == _SCHEMA else [str(name)] if name else []
    return sorted(found)


class _Documents(Documents):
    """The rows of documents in PostgreSQL, whose indexes hold no long labels: a hash stands for these."""

    def _labels(self, metadata: Mapping[str, object], tags: Iterable[str]) -> Iterable[tuple[str, str]]:
        return [(_short(name), _short(value)) for name, value in super()._labels(metadata, tags)]


def _short(label: str) -> str:
    data = label.encode(errors="surrogateescape")
    return label if len(data) <= _LONGEST else hashlib.sha256(data).hexdigest()


class _Properties(Properties):
    """The properties of a catalog in PostgreSQL: JSON, of which whole numbers are as SQL writes them."""

    def _to_column(self, value: object) -> object:
        return json.dumps(value)

    def _from_column(self, written: object) -> Any:
        try:
            return json.loads(str(written))
        except ValueError:
            return None


class _FileNames(FileNames):
    """The names of K/V files in PostgreSQL."""

    def take_number(self) -> int:
        with self._connections.use() as db:  # not within the write lock: who holds it may be uploading a label
            taken = db.execute(_TAKE_NUMBER, []).fetchone()
        if taken is None:
            raise CorruptFileError("the number of last is lost; `beacon-memory repair` finds it again")
        return int(taken[0])

    def begun(self) -> set[str]:
        with self._connections.use() as db:
            return {number for (number,) in db.execute("SELECT number FROM begun").fetchall()}

    def settle(self, numbers: Iterable[str]) -> bool:
        with self._connections.use() as db:
            db.execute(_SETTLE, {"numbers": list(numbers)})
        return True


class PostgresCatalog:
    """A schema of a PostgreSQL database; a `Catalog`."""

    shared = True

    def __init__(self, connections: PostgresConnections) -> None:
        self.path = connections.path
        self.connections = connections
        self.properties = _Properties(connections, self.path)
        self.texts = PostgresTexts(connections)
        self.documents = _Documents(connections, self.texts)
        self.versions = Versions(connections)
        self.conversations = Conversations(connections)
        self.file_names = _FileNames(connections)
        migrate(connections)

    def close(self) -> None:
        """Close the connections that are not in use; the next use opens one again."""
        self.connections.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock; see `Catalog.transaction`."""
        with self.connections.transaction():
            yield

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Show the catalog as it is now; see `Catalog.reading`."""
        with self.connections.reading():
            yield

    def overwrite(self) -> None:
        """Wait until a commit of which no answer came has ended, one way or the other; raises StoreError.

        The server may still be at it when the connection is lost. Until then it holds the write lock.
        """
        with self.transaction():
            pass

    def sync(self) -> None:
        """Do nothing: what others see is on the server's disk."""

    def wipe(self) -> None:
        """Write all tables anew, with their indexes; see `Catalog.wipe`.

        Rows that a transaction can still see would be kept, so it waits for those that began before.
        """
        with self.connections.use() as db:
            (began,) = db.execute("SELECT clock_timestamp()").fetchone()
            patient = time.monotonic() + BUSY_SECONDS
            while db.execute(_OLDER, [began]).fetchone()[0]:
                if time.monotonic() > patient:
                    raise StoreError(
                        f"{self.path}: another session has been reading for {BUSY_SECONDS:.0f} s, so that what was "
                        f"removed cannot be erased yet; try again"
                    )
                time.sleep(_PAUSE_SECONDS)
            db.execute(f"VACUUM (FULL, ANALYZE) {', '.join(_TABLES)}")

    def broken(self) -> list[str]:
        """Return []: the server finds damage itself, where its data has checksums."""
        return []

    def reindex(self) -> None:
        """Make the indexes of the tables anew."""
        with self.connections.transaction() as db:
            for table in _TABLES:
                db.execute(f"REINDEX TABLE {table}")
