"""The source texts of documents, kept as the passages that full-text search finds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

from sqlite_utils import Database

from beacon_memory.documents import SESSION_TAG, utc_now
from beacon_memory.errors import CorruptFileError

from .connections import Connections
from .full_text import CONVERSATION, PassageHit, places_of_words, search
from .passages import split_passages
from .rows import printable
from .words import indexed_form

__all__ = ["Texts", "damaged_text", "misindexed", "sound_text"]

_BATCH = 1000  # passages that are read together
_STORED = "SELECT ordinal, start, stop, CAST(text AS BLOB) FROM passages WHERE document = ? ORDER BY ordinal"
_LAST = "SELECT ordinal, start, text FROM passages WHERE document = ? ORDER BY ordinal DESC LIMIT 1"
_INSERT = """
    INSERT INTO passages (document, ordinal, start, stop, text, indexed_form, kind) VALUES (?, ?, ?, ?, ?, ?, ?)
"""
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
        """Return the text that is kept of a document, whether it has a row or not; see `sound_text`."""
        with self._connections.use() as db:
            return sound_text(db, id, content_hash)

    def write(self, id: str, text: str) -> None:
        """Write the text of a document in place of the one it has; the first passages that stay are left alone."""
        cuts = [(start, stop, text[start:stop]) for start, stop in split_passages(text)]
        with self._connections.transaction() as db:
            same = 0
            for (start, stop, passage), stored in zip(cuts, db.execute(_STORED, [id]).fetchall(), strict=False):
                if stored != (same, start, stop, passage.encode()):
                    break
                same += 1
            db.execute("DELETE FROM passages WHERE document = ? AND NOT ordinal BETWEEN 0 AND ?", [id, same - 1])
            passages = [(id, n, *cut, indexed_form(cut[2]), None) for n, cut in enumerate(cuts[same:], same)]
            db.conn.executemany(_INSERT, passages)

    def append(self, id: str, text: str, tags: Iterable[str]) -> None:
        """Write the text of a document, with these tags, that has grown at its end: only its last passage is cut anew.

        Passages before that one are not looked at.
        """
        with self._connections.transaction() as db:
            number, begin, last = db.execute(_LAST, [id]).fetchone() or (0, 0, "")
            kinds = zip((number, begin, last), (int, int, str), strict=True)
            if not all(isinstance(*one) for one in kinds) or not text.startswith(last, begin):
                self.write(id, text)  # what was stored is damaged
                self.set_kind(id, tags)
                return
            db.execute("DELETE FROM passages WHERE document = ? AND ordinal = ?", [id, number])
            cuts = [(start, stop, text[start:stop]) for start, stop in split_passages(text, begin)]
            passages = [(id, n, *cut, indexed_form(cut[2]), _kind(tags)) for n, cut in enumerate(cuts, number)]
            db.conn.executemany(_INSERT, passages)

    def set_kind(self, id: str, tags: Iterable[str]) -> None:
        """Note whether a document with these tags is a conversation, for `search`."""
        kind = _kind(tags)
        with self._connections.transaction() as db:
            db.execute("UPDATE passages SET kind = ? WHERE document = ? AND kind IS NOT ?", [kind, id, kind])

    def search(
        self,
        query: str,
        limit: int = 10,
        *,
        per_text: int | None = None,
        conversations: bool = True,
        documents: Sequence[str] | None = None,
    ) -> list[PassageHit]:
        """Return the passages that share words with `query`, best first; see `full_text.search`.

        Raises CorruptFileError if the text of a document that was found is damaged.
        """
        with self._connections.reading() as db:
            hits = search(
                db, query, limit, utc_now(), per_text=per_text, conversations=conversations, documents=documents
            )
            for id in dict.fromkeys(hit.document for hit in hits):
                if not self._is_sound(db, id):
                    raise damaged_text(id)
        return hits

    def places_of_words(self, query: str, documents: Sequence[str]) -> dict[str, list[tuple[str, int, int]]]:
        """Return for each word of a query which passages of some documents have it; see `full_text.places_of_words`."""
        with self._connections.reading() as db:
            return places_of_words(db, query, documents)

    def _is_sound(self, db: Database, id: str) -> bool:
        """Tell whether the text of a document that passages name is the one that its row names."""
        if printable(id) != id:  # no id at all
            return False
        row = db.execute("SELECT content_hash FROM documents WHERE id = ?", [id]).fetchone()
        return row is not None and self.find(id, row[0]) is not None


def _kind(tags: Iterable[str]) -> str | None:
    """Return the kind of the passages of a document with these tags."""
    return CONVERSATION if SESSION_TAG in tags else None


def sound_text(db: Database, id: str, content_hash: str) -> str | None:
    """Return the text that passages keep of a document; None if it is damaged.

    It is sound if it has this hash, and its passages say where in it they stand.
    """
    passages = db.execute(_STORED, [id]).fetchall()
    text = b"".join(passage or b"" for *_, passage in passages)
    if hashlib.sha256(text).hexdigest() != content_hash:
        return None
    stop = 0
    for number, (*place, passage) in enumerate(passages):
        start, stop = stop, stop + len((passage or b"").decode(errors="replace"))
        if place != [number, start, stop]:
            return None
    return text.decode()


def damaged_text(id: str) -> CorruptFileError:
    """Return the error for a document whose text is not the one that was stored."""
    return CorruptFileError(
        f"the catalog's text of {printable(id)!r} is damaged; `beacon-memory repair` takes its file's"
    )


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
