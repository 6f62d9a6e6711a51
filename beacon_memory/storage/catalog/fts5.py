"""Full-text search in SQLite: its extension FTS5 finds and scores the passages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .full_text import CONVERSATION, Bounds, FullText, Sought
from .words import phrase

__all__ = ["FTS5"]

_BEST = """
    SELECT id, score FROM (
        SELECT rowid AS id, -rank AS score FROM passages_fts
        WHERE passages_fts MATCH :match AND (
            :documents IS NULL
            OR rowid IN (SELECT id FROM passages WHERE document IN (SELECT value FROM json_each(:documents)))
        ) AND rowid NOT IN (
            SELECT passages.id FROM documents JOIN passages ON passages.document = documents.id WHERE expires_at <= :now
        )
        ORDER BY rowid DESC LIMIT :most
    ) ORDER BY score DESC, id LIMIT :kept
"""
_WITH_WORD = """
    SELECT document, start, stop FROM passages
    WHERE document IN (SELECT value FROM json_each(:documents))
    AND id IN (SELECT rowid FROM passages_fts WHERE passages_fts MATCH :match)
"""


class FTS5(FullText):
    """Find passages by SQLite's full-text index."""

    def _places(self, word: str, documents: Sequence[str]) -> Iterable[Any]:
        return self._db.execute(
            _WITH_WORD, {"match": phrase(word), "documents": json.dumps(list(documents))}
        ).fetchall()

    def _count(self, together: Sequence[str], most: int, sought: Sought) -> int:
        where = "FROM passages_fts WHERE passages_fts MATCH ?"
        match = _match(_all(together), sought)
        if self._db.execute(f"SELECT 1 {where} LIMIT 1 OFFSET ?", [match, most - 1]).fetchone():
            return most
        return int(self._db.execute(f"SELECT count(*) {where}", [match]).fetchone()[0])

    def _scores(
        self, leading: Sequence[str], others: Sequence[str], sought: Sought, bounds: Bounds
    ) -> dict[int, float]:
        phrases = (_all if bounds.together else _any)(leading)
        scores = self._best(phrases, sought, bounds)
        # FTS5 sums the scores of the words in one query: passages with other words are scored once more, by all of them
        return scores | (self._best(f"({phrases}) AND ({_any(others)})", sought, bounds) if others else {})

    def _best(self, phrases: str, sought: Sought, bounds: Bounds) -> dict[int, float]:
        values = {
            "match": _match(phrases, sought),
            "now": sought.now,
            "documents": None if sought.documents is None else json.dumps(list(sought.documents)),
            "most": bounds.most,
            "kept": -1 if bounds.kept is None else bounds.kept,
        }
        return dict(self._db.execute(_BEST, values).fetchall())

    def _passages(self, ids: Iterator[int]) -> Iterator[tuple[int, Any]]:
        select = "SELECT document, ordinal, start, stop, text FROM passages WHERE id = ?"
        for id in ids:
            yield id, self._db.execute(select, [id]).fetchone()


def _match(phrases: str, sought: Sought) -> str:
    return phrases if sought.conversations else f"({phrases}) NOT kind : {CONVERSATION}"


def _any(words: Sequence[str]) -> str:
    return " OR ".join(map(phrase, words))


def _all(words: Sequence[str]) -> str:
    return " AND ".join(map(phrase, words))
