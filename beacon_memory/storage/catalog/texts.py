"""The source texts of documents, kept as the passages that full-text search finds."""

from __future__ import annotations

import hashlib

from sqlite_utils import Database

from beacon_memory.documents import utc_now
from beacon_memory.errors import CorruptFileError

from .connections import Connections
from .full_text import PassageHit, search
from .passages import split_passages
from .rows import printable

__all__ = ["Texts", "damaged_text"]


class Texts:
    """The source texts of a catalog's documents."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def find(self, id: str, content_hash: str) -> str | None:
        """Return the text that is kept of a document, whether it has a row or not; None if it is damaged.

        It is sound if it has this hash, and its passages say where in it they stand.
        """
        with self._connections.use() as db:
            select = "SELECT ordinal, start, stop, CAST(text AS BLOB) FROM passages WHERE document = ? ORDER BY ordinal"
            passages = db.execute(select, [id]).fetchall()
        text = b"".join(passage or b"" for *_, passage in passages)
        if hashlib.sha256(text).hexdigest() != content_hash:
            return None
        stop = 0
        for number, (*place, passage) in enumerate(passages):
            start, stop = stop, stop + len((passage or b"").decode(errors="replace"))
            if place != [number, start, stop]:
                return None
        return text.decode()

    def write(self, id: str, text: str) -> None:
        """Write the text of a document in place of the one it has."""
        passages = [(id, n, start, stop, text[start:stop]) for n, (start, stop) in enumerate(split_passages(text))]
        insert = "INSERT INTO passages (document, ordinal, start, stop, text) VALUES (?, ?, ?, ?, ?)"
        with self._connections.transaction() as db:
            db.execute("DELETE FROM passages WHERE document = ?", [id])
            db.conn.executemany(insert, passages)

    def search(self, query: str, limit: int = 10) -> list[PassageHit]:
        """Return the passages that share words with `query`, best first; see `full_text.search`.

        Raises CorruptFileError if the text of a document that was found is damaged.
        """
        with self._connections.reading() as db:
            hits = search(db, query, limit, utc_now())
            for id in dict.fromkeys(hit.document for hit in hits):
                if not self._is_sound(db, id):
                    raise damaged_text(id)
        return hits

    def _is_sound(self, db: Database, id: str) -> bool:
        """Tell whether the text of a document that passages name is the one that its row names."""
        if printable(id) != id:  # no id at all
            return False
        row = db.execute("SELECT content_hash FROM documents WHERE id = ?", [id]).fetchone()
        return row is not None and self.find(id, row[0]) is not None


def damaged_text(id: str) -> CorruptFileError:
    """Return the error for a document whose text is not the one that was stored."""
    return CorruptFileError(
        f"the catalog's text of {printable(id)!r} is damaged; `beacon-memory repair` takes its file's"
    )
