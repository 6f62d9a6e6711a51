"""The source texts of documents, kept as the passages that full-text search finds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from sqlite_utils import Database

from beacon_memory.documents import SESSION_TAG, utc_now

from .connections import Connections
from .full_text import CONVERSATION, PassageHit, search
from .passages import split_passages
from .words import indexed_form

__all__ = ["Texts", "misindexed"]

_BATCH = 1000  # passages that are read together
_INDEXED = """
    SELECT id, text, indexed_form, kind, EXISTS (
        SELECT 1 FROM labels WHERE labels.document = passages.document AND name = 'tag' AND value = ?
    )
    FROM passages WHERE id > ? ORDER BY id LIMIT ?
"""


class Texts:
    """The source texts of a catalog's documents."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def find(self, id: str, content_hash: str) -> str | None:
        """Return the text that is kept of a document if it has this hash, whether it has a row or not, else None."""
        with self._connections.use() as db:
            passages = "SELECT CAST(text AS BLOB) FROM passages WHERE document = ? ORDER BY ordinal"
            text = b"".join(passage or b"" for (passage,) in db.execute(passages, [id]))
        return text.decode() if hashlib.sha256(text).hexdigest() == content_hash else None

    def write(self, id: str, text: str) -> None:
        """Write the text of a document in place of the one it has."""
        cuts = [(start, stop, text[start:stop]) for start, stop in split_passages(text)]
        passages = [(id, n, *cut, indexed_form(cut[2])) for n, cut in enumerate(cuts)]
        columns = "document, ordinal, start, stop, text, indexed_form"
        insert = f"INSERT INTO passages ({columns}) VALUES (?, ?, ?, ?, ?, ?)"  # noqa: S608  # our own names
        with self._connections.transaction() as db:
            db.execute("DELETE FROM passages WHERE document = ?", [id])
            db.conn.executemany(insert, passages)

    def set_kind(self, id: str, tags: Iterable[str]) -> None:
        """Note whether a document with these tags is a conversation, for `search`."""
        kind = CONVERSATION if SESSION_TAG in tags else None
        with self._connections.transaction() as db:
            db.execute("UPDATE passages SET kind = ? WHERE document = ? AND kind IS NOT ?", [kind, id, kind])

    def search(
        self, query: str, limit: int = 10, *, per_text: int | None = None, conversations: bool = True
    ) -> list[PassageHit]:
        """Return the passages that share words with `query`, best first; see `full_text.search`."""
        with self._connections.reading() as db:
            return search(db, query, limit, utc_now(), per_text=per_text, conversations=conversations)


def misindexed(db: Database) -> Iterator[tuple[str | None, str | None, int]]:
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
