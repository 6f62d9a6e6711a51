"""The source texts of documents, kept as the passages that full-text search finds."""

from __future__ import annotations

import hashlib

from beacon_memory.documents import utc_now

from .connections import Connections
from .full_text import PassageHit, search
from .passages import split_passages

__all__ = ["Texts"]


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
        passages = [(id, n, start, stop, text[start:stop]) for n, (start, stop) in enumerate(split_passages(text))]
        insert = "INSERT INTO passages (document, ordinal, start, stop, text) VALUES (?, ?, ?, ?, ?)"
        with self._connections.transaction() as db:
            db.execute("DELETE FROM passages WHERE document = ?", [id])
            db.conn.executemany(insert, passages)

    def search(self, query: str, limit: int = 10) -> list[PassageHit]:
        """Return the passages that share words with `query`, best first; see `full_text.search`."""
        with self._connections.reading() as db:
            return search(db, query, limit, utc_now())
