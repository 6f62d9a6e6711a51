"""The catalog's tables, as the append-only list of steps that make them.

A step that was released is never edited: a change to the tables is a new function at the end. Each runs once, in its
own transaction, which also records it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from datetime import datetime

from sqlite_utils import Database, Migrations

from .errors import StoreError

__all__ = ["begin_immediate", "created_at", "migrate", "migrations"]

migrations = Migrations("beacon_memory")


@migrations()
def m001_documents(db: Database) -> None:
    """One row a document. `text` comes last, so that listing rows never reads the pages it fills."""
    db.execute(
        """
        CREATE TABLE documents (
            id TEXT PRIMARY KEY NOT NULL,
            file TEXT NOT NULL UNIQUE,
            content_hash TEXT NOT NULL,
            fingerprint TEXT NOT NULL,
            tokens INTEGER NOT NULL,
            slots INTEGER NOT NULL,
            bytes INTEGER NOT NULL,
            ratios TEXT NOT NULL,
            metadata TEXT NOT NULL,
            created_at TEXT NOT NULL,
            updated_at TEXT NOT NULL,
            text TEXT NOT NULL
        )
        """
    )


@migrations()
def m002_passages(db: Database) -> None:
    """The texts in passages, with a full-text index that triggers keep in step.

    `id` is spelled out because VACUUM may renumber the rows of a table that has none, and the index refers to them.
    """
    db.execute(
        """
        CREATE TABLE passages (
            id INTEGER PRIMARY KEY,
            document TEXT NOT NULL REFERENCES documents(id) ON DELETE CASCADE,
            ordinal INTEGER NOT NULL,
            start INTEGER NOT NULL,
            stop INTEGER NOT NULL,
            text TEXT NOT NULL,
            UNIQUE (document, ordinal)
        )
        """
    )
    db.table("passages").enable_fts(["text"], create_triggers=True, tokenize="porter unicode61")


@migrations()
def m003_compression(db: Database) -> None:
    """How a text became slots. SQLite adds columns at the end, so `text` is moved behind it again."""
    db.execute("ALTER TABLE documents ADD COLUMN compression TEXT NOT NULL DEFAULT 'beacon'")
    db.execute("ALTER TABLE documents RENAME COLUMN text TO moved")
    db.execute("ALTER TABLE documents ADD COLUMN text TEXT NOT NULL DEFAULT ''")
    db.execute("UPDATE documents SET text = moved")
    db.execute("ALTER TABLE documents DROP COLUMN moved")


def migrate(db: Database) -> None:
    """Apply the steps that `db` lacks; raises StoreError if it has steps that this version does not know."""
    known = {name for name in globals() if re.match(r"m\d{3}_", name)}
    if unknown := [step.name for step in migrations.applied(db) if step.name not in known]:
        raise StoreError(
            f"the catalog was changed by a newer beacon_memory ({', '.join(unknown)}); upgrade beacon_memory to open it"
        )
    while pending := migrations.pending(db):
        with begin_immediate(db):
            # Read again under the write lock: another process may have been faster.
            later = [step.name for step in migrations.pending(db) if step.name != pending[0].name]
            migrations.apply(db, stop_before=later)


def created_at(db: Database) -> datetime:
    """When the catalog was created: the time of its first step."""
    return datetime.fromisoformat(migrations.applied(db)[0].applied_at)


@contextlib.contextmanager
def begin_immediate(db: Database) -> Iterator[None]:
    """A transaction that holds the write lock from its first moment; inside another one, a savepoint.

    A plain BEGIN takes the lock at the first write, where SQLite may refuse it without waiting.
    """
    if db.conn.in_transaction:
        with db.atomic():
            yield
        return
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("COMMIT")
    except BaseException:
        db.rollback()
        raise
