"""Search the passages by the words of a question: BM25 over SQLite's full-text index."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from sqlite_utils import Database

from beacon_memory.errors import InputError

__all__ = ["PassageHit", "search"]

# Words of a question that say nothing of what it is about; "s", "t", ... are what apostrophes cut off.
_QUESTION_WORDS = frozenset(
    """
    a about all am an and any are as at be been but by can could d did do does for from had has have how i if in into is
    it its ll m may me might must my of on or our please re s shall should so some t tell than that the their them then
    there these they this those to ve was we were what when where which who whom whose why will with would you your
    """.split()  # noqa: SIM905 -- a list would be eighty lines
)

# What bounds the work in a store of more than _SCORED passages:
_SCORED = 10_000  # passages that are scored for a query; about a microsecond each
_COUNTED = 100_000  # passages with a word up to which they are counted; about 30 nanoseconds each
_LONGEST = 64  # words of a query that count, the rarest
_TOGETHER = 100  # passages from which on words are found together
_BEST = """
    SELECT id, score FROM (
        SELECT rowid AS id, -rank AS score FROM passages_fts
        WHERE passages_fts MATCH :match AND rowid NOT IN (
            SELECT passages.id FROM documents JOIN passages ON passages.document = documents.id WHERE expires_at <= :now
        )
        ORDER BY rowid DESC LIMIT :most
    ) ORDER BY score DESC, id LIMIT :limit
"""


@dataclass(frozen=True, slots=True)
class PassageHit:
    """A passage that matches a query: characters start to stop of a document. A higher `score` (BM25) is better."""

    document: str
    ordinal: int
    start: int
    stop: int
    text: str
    score: float


def search(db: Database, query: str, limit: int, now: str) -> list[PassageHit]:
    """Return the passages that share words with `query`, best first by BM25; any text is a safe query.

    A query without any word finds nothing, and documents that expired before `now` are not found. Words are stemmed as
    English ones; accents and case do not matter. Among more than 10,000 passages not all are looked at, see `_ranked`.
    Raises InputError for another limit than 1, 2, ...
    """
    if type(limit) is not int or limit < 1:
        raise InputError(f"limit must be an integer of at least 1, got {limit!r}")
    words = _words(query)
    scores: dict[int, float] = {}
    if words and db.execute("SELECT 1 FROM passages LIMIT 1 OFFSET ?", [max(limit, _SCORED)]).fetchone():
        scores = _ranked(db, words, now, limit)
    elif words:
        scores = _best(db, _any(words), now, limit)
    best = sorted(scores, key=lambda id: (-scores[id], id))[:limit]
    select = "SELECT document, ordinal, start, stop, text, ? FROM passages WHERE id = ?"
    found = [db.execute(select, [scores[id], id]).fetchone() for id in best]
    kinds = (str, int, int, int, str, float)  # what is damaged may be no passage, or not there
    return [PassageHit(*hit) for hit in found if hit is not None and all(map(isinstance, hit, kinds))]


def _ranked(db: Database, words: list[str], now: str, limit: int) -> dict[int, float]:
    """Return the BM25 scores of the best passages by id, without scoring all of very many.

    Scored are passages with one of the rarest words of the question; the other words that they hold count, too. If
    these are not enough, passages are added that hold as many of the other words at once as occur together. Words that
    a great many passages hold say little and take long to count: they are left out where there are others.
    """
    held = {word: _count(db, _any([word]), _COUNTED) for word in words}
    words = sorted(filter(held.get, words), key=held.__getitem__)[:_LONGEST]
    together = itertools.accumulate(held[word] for word in words)
    rare = words[: sum(count <= max(limit, _SCORED) for count in together)]
    others = words[len(rare) :]
    telling = [word for word in others if held[word] < _COUNTED]
    best = _best(db, _any(rare), now, limit, telling) if rare else {}
    if len(best) < limit and others:
        joint: list[str] = []
        for word in telling or others:
            if _count(db, _all([*joint, word]), _TOGETHER) == _TOGETHER:
                joint.append(word)
        best = _best(db, _all(joint), now, limit, [word for word in telling if word not in joint]) | best
    return best


def _count(db: Database, match: str, most: int) -> int:
    """Count the passages that match, up to `most`."""
    where = "FROM passages_fts WHERE passages_fts MATCH ?"
    if db.execute(f"SELECT 1 {where} LIMIT 1 OFFSET ?", [match, most - 1]).fetchone():
        return most
    return int(db.execute(f"SELECT count(*) {where}", [match]).fetchone()[0])


def _best(db: Database, match: str, now: str, limit: int, others: Sequence[str] = ()) -> dict[int, float]:
    """Return the BM25 scores of the best of the newest passages that match, by id.

    others: words that need not be there, but count where they are. FTS5 sums the scores of the words in one query, so
    passages with other words are scored once more, by all words that they hold.
    """
    asked = {"match": match, "now": now, "most": max(limit, _SCORED), "limit": limit}
    best = dict(db.execute(_BEST, asked).fetchall())
    return best | (_best(db, f"({match}) AND ({_any(others)})", now, limit) if others else {})


def _any(words: Sequence[str]) -> str:
    return " OR ".join(f'"{word}"' for word in words)


def _all(words: Sequence[str]) -> str:
    return " AND ".join(f'"{word}"' for word in words)


def _words(query: str) -> list[str]:
    """Return the different words of a query in lower case, without question words if others remain.

    A word is a run of what FTS5's unicode61 takes for parts of a word; nothing that has a meaning to FTS5 is left.
    """
    if not isinstance(query, str):
        raise InputError(f"a query must be a str, got {query!r} of type {type(query).__name__}")
    kept = (char if char.isalnum() or unicodedata.category(char)[0] == "M" else " " for char in query.lower())
    words = dict.fromkeys(word for word in "".join(kept).split() if any(map(str.isalnum, word)))
    return [word for word in words if word not in _QUESTION_WORDS] or [*words]
