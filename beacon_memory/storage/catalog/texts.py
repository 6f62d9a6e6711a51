"""The source texts of documents, kept as the passages that full-text search finds."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from beacon_memory.documents import SESSION_TAG, utc_now
from beacon_memory.errors import CorruptFileError

from .database import Connections, Database
from .full_text import CONVERSATION, FullText, PassageHit, Sought
from .passages import split_passages
from .rows import printable

__all__ = ["Passage", "StoredPassage", "Texts", "damaged_text", "kind_of", "sound_text"]

Passage = tuple[int, int, int, str]  # ordinal, start, stop and text
StoredPassage = tuple[object, object, object, bytes]  # the same as it is now, perhaps damaged, its text in UTF-8

_LAST = "SELECT ordinal, start, text FROM passages WHERE document = ? ORDER BY ordinal DESC LIMIT 1"
_SET_KIND = "UPDATE passages SET kind = ? WHERE document = ? AND coalesce(kind, '') <> ?"


class Texts(ABC):
    """The source texts of a catalog's documents."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def find(self, id: str, content_hash: str) -> str | None:
        """Return the text that is kept of a document, whether it has a row or not; see `sound_text`."""
        with self._connections.use() as db:
            return sound_text(self._stored(db, id), content_hash)

    def write(self, id: str, text: str) -> None:
        """Write the text of a document in place of the one it has; the first passages that stay are left alone."""
        cuts = [(start, stop, text[start:stop]) for start, stop in split_passages(text)]
        with self._connections.transaction() as db:
            same = 0
            for (start, stop, passage), stored in zip(cuts, self._stored(db, id), strict=False):
                if stored != (same, start, stop, passage.encode()):
                    break
                same += 1
            db.execute("DELETE FROM passages WHERE document = ? AND NOT ordinal BETWEEN 0 AND ?", [id, same - 1])
            self._insert(db, id, [(n, *cut) for n, cut in enumerate(cuts[same:], same)], None)

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
            self._insert(db, id, [(n, *cut) for n, cut in enumerate(cuts, number)], kind_of(tags))

    def set_kind(self, id: str, tags: Iterable[str]) -> None:
        """Note whether a document with these tags is a conversation, for `search`."""
        kind = kind_of(tags)
        with self._connections.transaction() as db:
            db.execute(_SET_KIND, [kind, id, kind or ""])

    def search(
        self,
        query: str,
        limit: int = 10,
        *,
        per_text: int | None = None,
        conversations: bool = True,
        documents: Sequence[str] | None = None,
    ) -> list[PassageHit]:
        """Return the passages that share words with `query`, best first; see `full_text.FullText`.

        Takes and raises as `Sought` and `FullText.search`; raises CorruptFileError, too, if the text of a document that
        was found is damaged.
        """
        sought = Sought(limit, utc_now(), per_text, conversations, documents)
        with self._connections.reading() as db:
            hits = self._full_text(db).search(query, sought)
            for id in dict.fromkeys(hit.document for hit in hits):
                if not self._is_sound(db, id):
                    raise damaged_text(id)
        return hits

    def places_of_words(self, query: str, documents: Sequence[str]) -> dict[str, list[tuple[str, int, int]]]:
        """Return for each word of a query which passages of some documents have it; see `full_text.FullText`."""
        with self._connections.reading() as db:
            return self._full_text(db).places_of_words(query, documents)

    @abstractmethod
    def reindex(self) -> int:
        """Make anew what passages are found by, where it is not what they are; returns of how many passages."""

    @abstractmethod
    def is_indexed(self) -> bool:
        """Tell whether all passages are found by what they are."""

    @abstractmethod
    def _stored(self, db: Database, id: str) -> list[StoredPassage]:
        """Return the passages of a document in their order."""

    @abstractmethod
    def _insert(self, db: Database, id: str, passages: Sequence[Passage], kind: str | None) -> None:
        """Write new passages of a document, all of one kind, with what they are found by."""

    @abstractmethod
    def _full_text(self, db: Database) -> FullText:
        """Return the search with one connection."""

    def _is_sound(self, db: Database, id: str) -> bool:
        """Tell whether the text of a document that passages name is the one that its row names."""
        if printable(id) != id:  # no id at all
            return False
        row = db.execute("SELECT content_hash FROM documents WHERE id = ?", [id]).fetchone()
        return row is not None and self.find(id, row[0]) is not None


def kind_of(tags: Iterable[str]) -> str | None:
    """Return the kind of the passages of a document with these tags."""
    return CONVERSATION if SESSION_TAG in tags else None


def sound_text(passages: Sequence[StoredPassage], content_hash: str) -> str | None:
    """Return the text that passages keep of a document; None if it is damaged.

    It is sound if it has this hash, and its passages say where in it they stand.
    """
    text = b"".join(passage for *_, passage in passages)
    if hashlib.sha256(text).hexdigest() != content_hash:
        return None
    stop = 0
    for number, (*place, passage) in enumerate(passages):
        start, stop = stop, stop + len(passage.decode(errors="replace"))
        if place != [number, start, stop]:
            return None
    return text.decode()


def damaged_text(id: str) -> CorruptFileError:
    """Return the error for a document whose text is not the one that was stored."""
    return CorruptFileError(
        f"the catalog's text of {printable(id)!r} is damaged; `beacon-memory repair` takes its file's"
    )
