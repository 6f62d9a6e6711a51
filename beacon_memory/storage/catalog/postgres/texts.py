"""The source texts of documents in PostgreSQL, in passages, with the words that each holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from beacon_memory.documents import SESSION_TAG
from beacon_memory.storage.catalog.database import Database
from beacon_memory.storage.catalog.full_text import CONVERSATION
from beacon_memory.storage.catalog.passages import split_passages
from beacon_memory.storage.catalog.texts import Passage, StoredPassage, Texts
from beacon_memory.storage.catalog.words import indexed_form

from .connections import PostgresDatabase
from .full_text import PostgresFullText
from .tokens import tokens_of

__all__ = ["PostgresTexts"]

_BATCH = 1000  # passages that are read together
_STORED = "SELECT ordinal, start, stop, text FROM passages WHERE document = ? ORDER BY ordinal"
_NUMBERS = "SELECT nextval('passage_ids') FROM generate_series(1, ?)"
_LENGTHS = "SELECT count(*), coalesce(sum(length), 0) FROM passages"
_INDEXED = """
    SELECT p.id, p.text, p.length, p.kind,
        ARRAY(SELECT w.word FROM words w WHERE w.passage = p.id ORDER BY w.word),
        ARRAY(SELECT w.count FROM words w WHERE w.passage = p.id ORDER BY w.word),
        EXISTS (SELECT 1 FROM labels l WHERE l.document = p.document AND l.name = 'tag' AND l.value = ?)
    FROM passages p WHERE p.id > ? ORDER BY p.id LIMIT ?
"""


class PostgresTexts(Texts):
    """The source texts of a catalog in PostgreSQL; triggers remove the words of passages that go."""

    def reindex(self) -> int:
        """Write length, kind and words of passages anew where they are others."""
        count = 0
        with self._connections.transaction() as db:
            for id, words, kind in list(_misindexed(db)):
                db.execute("DELETE FROM words WHERE passage = ?", [id])
                _write_words(db, {id: words})
                db.execute("UPDATE passages SET length = ?, kind = ? WHERE id = ?", [len(words), kind, id])
                count += 1
            db.execute(
                "UPDATE lengths SET (passages, words) = (SELECT count(*), coalesce(sum(length), 0) FROM passages)"
            )
        return count

    def is_indexed(self) -> bool:
        """Tell whether all passages have the words and the kind that they should have, and no words are left over."""
        with self._connections.use() as db:
            if db.execute("SELECT passages, words FROM lengths").fetchall() != db.execute(_LENGTHS).fetchall():
                return False
            lone = "SELECT 1 FROM words w WHERE NOT EXISTS (SELECT 1 FROM passages p WHERE p.id = w.passage) LIMIT 1"
            return not db.execute(lone).fetchone() and not any(_misindexed(db))

    def _stored(self, db: Database, id: str) -> list[StoredPassage]:
        return [(*place, text.encode()) for *place, text in db.execute(_STORED, [id]).fetchall()]

    def add(self, texts: Mapping[str, str]) -> None:
        """Write the texts of documents that have rows but no texts yet, and are no conversations: all at once."""
        passages = [
            (id, ordinal, start, stop, text[start:stop])
            for id, text in texts.items()
            for ordinal, (start, stop) in enumerate(split_passages(text))
        ]
        with self._connections.transaction() as db:
            _insert(db, passages, None)

    def _insert(self, db: Database, id: str, passages: Sequence[Passage], kind: str | None) -> None:
        _insert(db, [(id, *passage) for passage in passages], kind)

    def _full_text(self, db: Database) -> PostgresFullText:
        return PostgresFullText(db)


def _insert(db: Database, passages: Sequence[tuple[str, int, int, int, str]], kind: str | None) -> None:
    """Write passages, each with the id of its document, and the words that they hold."""
    if not passages:
        return
    numbers = [number for (number,) in db.execute(_NUMBERS, [len(passages)]).fetchall()]
    words = _words([text for *_, text in passages])
    _copying(db).copy(
        "passages (id, document, ordinal, start, stop, text, length, kind)",
        [(number, *passage, len(held), kind) for number, passage, held in zip(numbers, passages, words, strict=True)],
    )
    _write_words(db, dict(zip(numbers, words, strict=True)))


def _words(texts: Sequence[str]) -> list[list[str]]:
    return tokens_of([indexed_form(text) or text for text in texts])


def _write_words(db: Database, words: dict[int, list[str]]) -> None:
    """Write which words passages hold, each with how often."""
    counted = ((word, passage, count) for passage, held in words.items() for word, count in Counter(held).items())
    _copying(db).copy("words (word, passage, count)", counted)


def _copying(db: Database) -> PostgresDatabase:
    return cast("PostgresDatabase", db)


def _misindexed(db: Database) -> Iterator[tuple[int, list[str], str | None]]:
    """Yield the ids of passages whose words, length or kind are not what they should be, with the right ones."""
    after = 0
    while batch := db.execute(_INDEXED, [SESSION_TAG, after, _BATCH]).fetchall():
        right = _words([text for _, text, *_ in batch])
        for (id, _, length, kind, words, counts, tagged), held in zip(batch, right, strict=True):
            right_kind = CONVERSATION if tagged else None
            if (length, kind) != (len(held), right_kind) or dict(zip(words, counts, strict=True)) != Counter(held):
                yield id, held, right_kind
        after = batch[-1][0]
