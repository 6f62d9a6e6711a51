"""The source texts of documents in SQLite, in passages, with the form in which FTS5 indexes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import sqlite_utils

from beacon_memory.documents import SESSION_TAG

from .database import Database
from .fts5 import FTS5
from .full_text import CONVERSATION
from .texts import Passage, StoredPassage, Texts
from .words import indexed_form

__all__ = ["SQLiteTexts", "misindexed", "stored_passages"]

_BATCH = 1000  # passages that are read together
_STORED = "SELECT ordinal, start, stop, CAST(text AS BLOB) FROM passages WHERE document = ? ORDER BY ordinal"
_INSERT = """
    INSERT INTO passages (document, ordinal, start, stop, text, indexed_form, kind) VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_INDEXED = """
    SELECT id, text, indexed_form, kind, EXISTS (
        SELECT 1 FROM labels WHERE labels.document = passages.document AND name = 'tag' AND value = ?
    )
    FROM passages WHERE id > ? ORDER BY id LIMIT ?
"""


class SQLiteTexts(Texts):
    """The source texts of a catalog in SQLite; triggers keep the full-text index in step with them."""

    def reindex(self) -> int:
        """Write the form in which passages are indexed, and their kind, anew where it is another."""
        count = 0
        with self._connections.transaction() as db:
            for values in misindexed(db):
                db.execute("UPDATE passages SET indexed_form = ?, kind = ? WHERE id = ?", values)
                count += 1
        return count

    def is_indexed(self) -> bool:
        """Tell whether all passages have the form and the kind that they should have."""
        with self._connections.use() as db:
            return not any(misindexed(db))

    def _stored(self, db: Database, id: str) -> list[StoredPassage]:
        return stored_passages(db, id)

    def _insert(self, db: Database, id: str, passages: Sequence[Passage], kind: str | None) -> None:
        db.executemany(_INSERT, [(id, *passage, indexed_form(passage[-1]), kind) for passage in passages])

    def _full_text(self, db: Database) -> FTS5:
        return FTS5(db)


def stored_passages(db: Database | sqlite_utils.Database, id: str) -> list[StoredPassage]:
    """Return the passages that SQLite keeps of a document, in their order."""
    return [(*place, text or b"") for *place, text in db.execute(_STORED, [id]).fetchall()]


def misindexed(db: Database | sqlite_utils.Database) -> Iterator[tuple[str | None, str | None, int]]:
    """Yield the `indexed_form` and `kind` that passages should have, with their ids, where they have others.

    Passages that were yielded may be written before the next one is asked for.
    """
    after = -1
    while batch := db.execute(_INDEXED, [SESSION_TAG, after, _BATCH]).fetchall():
        for id, text, form, kind, tagged in batch:
            right = indexed_form(text) if isinstance(text, str) else None  # what is damaged may be no text
            right_kind = CONVERSATION if tagged else None
            if (form, kind) != (right, right_kind):
                yield right, right_kind, id
        after = batch[-1][0]
