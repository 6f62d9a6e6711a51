"""Full-text search in PostgreSQL: BM25 by the formula of SQLite's FTS5, over a table of the words of each passage."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from beacon_memory.storage.catalog import full_text
from beacon_memory.storage.catalog.full_text import CONVERSATION, Bounds, FullText, Sought
from beacon_memory.storage.catalog.words import begins_words

from .tokens import tokens_of

__all__ = ["PostgresFullText"]

_BATCH = 64  # passages that are read together
_BEGUN = 1000  # words that begin with a character, of scripts without spaces, of which so many are looked for

_BEGINNING = "SELECT DISTINCT word FROM words WHERE word >= ? AND word < ? LIMIT ?"
_HOLDS = "EXISTS (SELECT 1 FROM words w WHERE w.passage = p.id AND w.word = ANY(?::text[]))"
_NO_CONVERSATION = f"p.kind IS DISTINCT FROM '{CONVERSATION}'"

# k1 is 1.2 and b 0.75; a word that more than half of the passages hold counts next to nothing, as in FTS5.
_SCORED = """
    WITH asked AS (
        SELECT n, word, (SELECT count(*) FROM (SELECT 1 FROM words w WHERE w.word = a.word LIMIT :counted) held) AS held
        FROM unnest(:numbers::int[], :words::text[]) a(n, word)
    ), weights AS (
        SELECT n, greatest(ln((passages - least(sum(held), passages) + 0.5) / (least(sum(held), passages) + 0.5)), 1e-6)
            AS idf
        FROM asked, lengths GROUP BY n, passages
    ), candidates AS MATERIALIZED (
        SELECT p.id, p.length FROM passages p WHERE {conditions} AND NOT EXISTS (
            SELECT 1 FROM documents d WHERE d.id = p.document AND d.expires_at <= :now
        )
        ORDER BY p.id DESC LIMIT :most
    ), found AS (
        SELECT c.id, c.length, a.n, sum(w.count) AS times
        FROM candidates c CROSS JOIN asked a JOIN words w ON w.word = a.word AND w.passage = c.id
        GROUP BY c.id, c.length, a.n
    )
    SELECT id,
        CAST(sum(idf * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * length * passages / words))) AS float8) AS score
    FROM found JOIN weights USING (n), lengths GROUP BY id ORDER BY score DESC, id LIMIT :kept
"""
_WITH_WORD = """
    SELECT p.document, p.start, p.stop FROM passages p WHERE p.document = ANY(?::text[])
    AND EXISTS (SELECT 1 FROM words w WHERE w.passage = p.id AND w.word = ANY(?::text[]))
    ORDER BY p.id
"""


class PostgresFullText(FullText):
    """Find passages by the words that are kept of them."""

    def _places(self, word: str, documents: Sequence[str]) -> Iterable[Any]:
        places: list[Any] = []
        for number, held in enumerate(self._held([word])):
            found = self._db.execute(_WITH_WORD, [list(documents), held]).fetchall()
            places = [one for one in places if one in found] if number else found
        return places

    def _count(self, together: Sequence[str], most: int, sought: Sought) -> int:
        held = self._held(together)
        if len(held) == 1:
            distinct = "DISTINCT w.passage" if len(held[0]) > 1 else "1"
            tables, conditions = f"SELECT {distinct} FROM words w", ["w.word = ANY(?::text[])"]  # noqa: S608  # our names
        else:
            tables, conditions = "SELECT 1 FROM passages p", [_HOLDS] * len(held)
            if not sought.conversations:
                conditions.append(_NO_CONVERSATION)
        sql = f"SELECT count(*) FROM ({tables} WHERE {' AND '.join(conditions)} LIMIT ?) held"  # noqa: S608  # our names
        return int(self._db.execute(sql, [*held, most]).fetchone()[0]) if held else 0

    def _scores(
        self, leading: Sequence[str], others: Sequence[str], sought: Sought, bounds: Bounds
    ) -> dict[int, float]:
        first = self._held(leading)
        if not first:  # nothing that is a word to the index
            return {}
        held = first + self._held(others)
        conditions, values = self._conditions(first, sought, bounds)
        values |= {
            "numbers": [n for n, some in enumerate(held) for _ in some],
            "words": [word for some in held for word in some],
            "counted": full_text._COUNTED,
            "now": sought.now,
            "most": bounds.most,
            "kept": bounds.kept,
        }
        return dict(self._db.execute(_SCORED.format(conditions=conditions), values).fetchall())

    def _conditions(self, first: Sequence[list[str]], sought: Sought, bounds: Bounds) -> tuple[str, dict[str, Any]]:
        """Return which passages may be scored, and the values for that."""
        values: dict[str, Any] = {}
        if bounds.together:
            values = {f"word_{chr(97 + n // 26)}{chr(97 + n % 26)}": some for n, some in enumerate(first)}
            conditions = [_HOLDS.replace("?", f":{name}") for name in values]
        else:
            values = {"leading": [word for some in first for word in some]}
            conditions = ["p.id IN (SELECT passage FROM words WHERE word = ANY(:leading::text[]))"]
        if sought.documents is not None:
            conditions.append("p.document = ANY(:documents::text[])")
            values["documents"] = list(sought.documents)
        if not sought.conversations:
            conditions.append(_NO_CONVERSATION)
        return " AND ".join(conditions), values

    def _held(self, words: Sequence[str]) -> list[list[str]]:
        """Return for each word, as questions have them, which of the words that passages hold are meant.

        That is one. It is more for a character that begins words in a script without spaces; and what the index takes
        for several words are several, each to be found.
        """
        held: list[list[str]] = []
        for word, tokens in zip(words, tokens_of(words), strict=True):
            if begins_words(word):
                found = self._db.execute(_BEGINNING, [word, word + "\U0010ffff", _BEGUN]).fetchall()
                held.append([one for (one,) in found])
            else:
                held += [[token] for token in tokens]
        return held

    def _passages(self, ids: Iterator[int]) -> Iterator[tuple[int, Any]]:
        select = "SELECT id, document, ordinal, start, stop, text FROM passages WHERE id = ANY(?::bigint[])"
        while some := list(itertools.islice(ids, _BATCH)):
            found = {id: values for id, *values in self._db.execute(select, [some]).fetchall()}
            for id in some:
                yield id, found.get(id)
