"""Locks of a store that many machines share: advisory locks of PostgreSQL, each of one connection.

They are gone with the connection that holds them, however that ended. So a thread holds them on the connection that it
also writes rows with: if that is lost, nothing is committed any more, and whoever comes next may take its unfinished
files for leftovers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from beacon_memory.errors import StoreError
from beacon_memory.storage.files.locks import (
    MOMENT_SECONDS,
    PATIENT_SECONDS,
    TIDY_SECONDS,
    WRITE_SECONDS,
    waited,
)

from .connections import PostgresConnections, PostgresDatabase

__all__ = ["PostgresLocks"]


class PostgresLocks:
    """The locks of one namespace; `files.locks.Locks`."""

    def __init__(self, connections: PostgresConnections) -> None:
        self._connections = connections
        self._key = connections.lock_key("writers")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the shared lock of writers; a thread may hold it several times."""
        with self._connections.use() as db:
            if db.writing:
                yield
                return
            (free,) = db.execute("SELECT pg_try_advisory_lock_shared(?)", [self._key]).fetchone()
            if not free and not _acquired(db, "pg_advisory_lock_shared", self._key, WRITE_SECONDS):
                raise waited(f"{self._connections.path} is being repaired", WRITE_SECONDS)
            db.writing = True
            with _released(db, "pg_advisory_unlock_shared", self._key):
                yield
            db.writing = False

    @contextlib.contextmanager
    def tidying(self) -> Iterator[None]:
        """Hold the lock alone: who waits for it holds off new writers, for a second at a time at first."""
        with self._connections.use() as db:
            patient = time.monotonic() + PATIENT_SECONDS
            while True:
                last = time.monotonic() >= patient
                seconds = TIDY_SECONDS if last else min(MOMENT_SECONDS, TIDY_SECONDS)
                if _acquired(db, "pg_advisory_lock", self._key, seconds):
                    break
                if last:
                    raise waited(f"{self._connections.path} is being written to", TIDY_SECONDS)
                time.sleep(MOMENT_SECONDS)
            with _released(db, "pg_advisory_unlock", self._key):
                yield

    def looking(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of `tidying`, which leaves nothing behind."""
        return self.tidying()

    @contextlib.contextmanager
    def alone(self, name: str, what: str) -> Iterator[None]:
        """Hold a lock of this name alone; `what` begins the error if others hold it for more than 120 seconds."""
        key = self._connections.lock_key(f"alone {name}")
        with self._connections.use() as db:
            if not _acquired(db, "pg_advisory_lock", key, WRITE_SECONDS):
                raise waited(what, WRITE_SECONDS)
            with _released(db, "pg_advisory_unlock", key):
                yield


def _acquired(db: PostgresDatabase, take: str, key: int, seconds: float) -> bool:
    """Wait for a lock of this connection; returns False if others hold it for so long."""
    from psycopg.errors import LockNotAvailable

    if db.in_transaction:
        raise StoreError("a lock of the store was asked for within a transaction, which others could wait for")
    try:
        with db.connection.transaction():
            db.execute(f"SET LOCAL lock_timeout = {int(seconds * 1000)}; SELECT {take}({key})")
    except LockNotAvailable:
        return False
    return True


@contextlib.contextmanager
def _released(db: PostgresDatabase, release: str, key: int) -> Iterator[None]:
    """Release a lock in the end, if need be with the connection that holds it."""
    import psycopg

    try:
        yield
    finally:
        try:
            if not db.connection.closed:
                db.execute(f"SELECT {release}(?)", [key])
        except psycopg.Error:
            db.connection.close()
