"""The database of a catalog, as those see it who write SQL that SQLite and PostgreSQL both understand.

    with connections.transaction() as db:
        db.execute("DELETE FROM documents WHERE id = ?", ["a.txt"])

Values stand for `?`, or by their names for `:name`. Texts compare by their code points.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

__all__ = ["Connections", "Database", "Results", "Values"]

Values = Sequence[object] | dict[str, Any]


class Results(Protocol):
    """The rows that a statement returned."""

    def fetchone(self) -> Any:
        """Return the next row as a tuple, None if there is none."""

    def fetchall(self) -> list[Any]:
        """Return all rows that are left, as tuples."""


class Database(Protocol):
    """One connection to a database."""

    def execute(self, sql: str, values: Values | None = None, /) -> Results:
        """Execute a statement."""

    def query(self, sql: str, values: Values | None = None, /) -> Iterable[dict[str, Any]]:
        """Return the rows that a statement selects, as values by column."""

    def executemany(self, sql: str, values: Iterable[Sequence[object]], /) -> None:
        """Execute a statement once for each of many values."""


class Connections(Protocol):
    """Lend connections to one database to threads. Errors of the database are raised as StoreError."""

    @property
    def in_transaction(self) -> bool:
        """Tell whether this thread is within a transaction, and so sees the database as it was when that began."""

    def close(self) -> None:
        """Close the connections that are not in use."""

    def use(self) -> AbstractContextManager[Database]:
        """Lend this thread a connection of its own; a `use` inside of another one lends the same connection."""

    def transaction(self) -> AbstractContextManager[Database]:
        """Hold the write lock: what is written inside is committed together, or not at all if anything raises.

        Raises StoreError if another process holds the lock for more than 30 seconds.
        """

    def reading(self) -> AbstractContextManager[Database]:
        """Show the database as it is now to all that is read inside, whatever others write meanwhile."""

    def note(self, sql: str, values: Iterable[Sequence[object]]) -> bool:
        """Write something that is not worth waiting for; False if another process is writing just now.

        sql: one statement, executed for each of `values`.
        """
