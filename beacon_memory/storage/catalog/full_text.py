"""Search the passages by the words of a question: BM25 over SQLite's full-text index."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import regex
from sqlite_utils import Database

from beacon_memory.documents import SESSION_TAG
from beacon_memory.errors import InputError

from .words import phrase, words

__all__ = ["CONVERSATION", "PassageHit", "places_of_words", "search"]

CONVERSATION = "conversation"  # the kind of passages that conversations were folded into; one word

# Words of a question that say nothing of what it is about; "s", "t", ... are what apostrophes cut off.
_QUESTION_WORDS = frozenset(
    """
    a about all am an and any are as at be been but by can could d did do does for from had has have how i if in into is
    it its ll m may me might must my of on or our please re s shall should so some t tell than that the their them then
    there these they this those to ve was we were what when where which who whom whose why will with would you your
    """.split()  # noqa: SIM905 -- a list would be eighty lines
)
_NOUNS = frozenset({"can", "may", "might", "must", "will"})  # those that are nouns, too
_INSIDE = regex.compile(r"(?<=[\p{L}\p{N},;]\s+)\p{Lu}\p{L}+")  # a word with a capital that begins no sentence

# What bounds the work in a store of more than _SCORED passages:
_SCORED = 10_000  # passages that are scored for a query; about a microsecond each
_COUNTED = 100_000  # passages with a word up to which they are counted; about 30 nanoseconds each
_LONGEST = 64  # words of a query that count, the rarest
_TOGETHER = 100  # passages from which on words are found together

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
_NEWEST = """
    SELECT id FROM documents
    WHERE content_hash = (SELECT content_hash FROM documents WHERE id = :document)
    AND (expires_at IS NULL OR expires_at > :now)
    AND (:conversations OR NOT EXISTS (SELECT 1 FROM labels WHERE document = id AND name = 'tag' AND value = :tag))
    ORDER BY updated_at DESC, id DESC LIMIT 1
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


def search(
    db: Database,
    query: str,
    limit: int,
    now: str,
    *,
    per_text: int | None = None,
    conversations: bool = True,
    documents: Sequence[str] | None = None,
) -> list[PassageHit]:
    """Return the passages that share words with `query`, best first by BM25; any text is a safe query.

    per_text: at most so many passages of a text. Of documents with the same text, only the one whose row was written
              last is found.
    conversations: whether to find what conversations were folded into, too.
    documents: only passages of these.

    Question words count if there are no others, or as names: with a capital inside a sentence ("What happens in May?"),
    and, if nothing is found without them, those that are nouns. A query without any word finds nothing, and documents
    that expired before `now` are not found. Words are stemmed as English ones; accents and case do not matter; where
    words have no spaces between them, any part of a sentence is found (see `words`). Among more than 10,000 passages
    not all are looked at, see `_Search.ranked`.
    Raises InputError for another limit than 1, 2, ...
    """
    for name, bound in (("limit", limit), ("per_text", per_text)):
        if (type(bound) is not int or bound < 1) and not (name == "per_text" and bound is None):
            raise InputError(f"{name} must be an integer of at least 1, got {bound!r}")
    if not isinstance(query, str):
        raise InputError(f"a query must be a str, got {query!r} of type {type(query).__name__}")
    among = None if documents is None else json.dumps(list(documents))
    asked = _Search(db, limit, now, per_text, conversations, among)
    telling = _telling(query)
    more = [word for word in words(query) if word in telling or word in _NOUNS]
    return asked.hits(telling) or (asked.hits(more) if more != telling else [])


def places_of_words(db: Database, query: str, documents: Sequence[str]) -> dict[str, list[tuple[str, int, int]]]:
    """Return for each word that `search` looks for the passages of some documents with it: document, start, stop."""
    found = {}
    for word in _telling(query)[:_LONGEST]:
        values = {"match": phrase(word), "documents": json.dumps(list(documents))}
        places = db.execute(_WITH_WORD, values)
        found[word] = [
            one for one in places if (*map(type, one),) == (str, int, int)
        ]  # what is damaged may be no passage
    return found


def _telling(query: str) -> list[str]:
    """Return the words of a query that say what it is about: without question words, if it has others."""
    names = set(words(" ".join(_INSIDE.findall(query)))) if not query.isupper() else set()
    every = words(query)
    return [word for word in every if word not in _QUESTION_WORDS or word in names] or every


@dataclass(frozen=True, slots=True)
class _Search:
    """The conditions of a search; see `search`."""

    db: Database
    limit: int
    now: str
    per_text: int | None
    conversations: bool
    documents: str | None

    def hits(self, words: Sequence[str]) -> list[PassageHit]:
        """Return the best passages with any of these words."""
        phrases = [*map(phrase, words)]
        if not phrases:
            return []
        if self.db.execute("SELECT 1 FROM passages LIMIT 1 OFFSET ?", [max(self.limit, _SCORED)]).fetchone():
            return self._chosen(self.ranked(phrases))
        return self._chosen(self._scores(_any(phrases)))

    def ranked(self, phrases: list[str]) -> dict[int, float]:
        """Return the BM25 scores of the best passages by id, without scoring all of very many.

        Scored are passages with one of the rarest words of the question; the other words that they hold count, too. If
        these are not enough, passages are added that hold as many of the other words at once as occur together. Words
        that a great many passages hold say little and take long to count: they are left out where there are others.
        """
        held = {one: self._count(one, _COUNTED) for one in phrases}
        phrases = sorted(filter(held.get, phrases), key=held.__getitem__)[:_LONGEST]
        if self.documents is not None:  # there are few passages of these, whatever others hold
            return self._scores(_any(phrases)) if phrases else {}
        together = itertools.accumulate(held[one] for one in phrases)
        rare = phrases[: sum(count <= max(self.limit, _SCORED) for count in together)]
        others = phrases[len(rare) :]
        telling = [one for one in others if held[one] < _COUNTED]
        scores = self._scores(_any(rare), telling) if rare else {}
        if others and (len(scores) < self.limit or len(self._chosen(scores)) < self.limit):
            joint: list[str] = []
            for one in telling or others:
                if self._count(_all([*joint, one]), _TOGETHER) == _TOGETHER:
                    joint.append(one)
            scores = self._scores(_all(joint), [one for one in telling if one not in joint]) | scores
        return scores

    def _match(self, phrases: str) -> str:
        return phrases if self.conversations else f"({phrases}) NOT kind : {CONVERSATION}"

    def _count(self, phrases: str, most: int) -> int:
        """Count the passages that match, up to `most`."""
        where = "FROM passages_fts WHERE passages_fts MATCH ?"
        match = self._match(phrases)
        if self.db.execute(f"SELECT 1 {where} LIMIT 1 OFFSET ?", [match, most - 1]).fetchone():
            return most
        return int(self.db.execute(f"SELECT count(*) {where}", [match]).fetchone()[0])

    def _scores(self, phrases: str, others: Sequence[str] = ()) -> dict[int, float]:
        """Return the BM25 scores of the best of the newest passages that match, by id.

        others: words that need not be there, but count where they are. FTS5 sums the scores of the words in one query,
        so passages with other words are scored once more, by all words that they hold.
        """
        kept = self.limit if self.per_text is None else -1  # all, of which some may be too many of a text
        bounds = {"most": max(self.limit, _SCORED), "kept": kept}
        values = {"match": self._match(phrases), "now": self.now, "documents": self.documents, **bounds}
        scores = dict(self.db.execute(_BEST, values).fetchall())
        return scores | (self._scores(f"({phrases}) AND ({_any(others)})") if others else {})

    def _chosen(self, scores: Mapping[int, float]) -> list[PassageHit]:
        """Read the best passages, as many as are wanted altogether and of each text."""
        select = "SELECT document, ordinal, start, stop, text, ? FROM passages WHERE id = ?"
        kinds = (str, int, int, int, str, float)  # what is damaged may be no passage, or not there
        found: list[PassageHit] = []
        counts: Counter[str] = Counter()
        passed: set[int] = set()
        for id in sorted(scores, key=lambda id: (-scores[id], id)):
            if id in passed:
                continue
            values = self.db.execute(select, [scores[id], id]).fetchone()
            if values is None or not all(map(isinstance, values, kinds)):
                continue
            hit = PassageHit(*values)
            if self.per_text is not None:
                if counts[hit.document] == self.per_text or (not counts[hit.document] and not self._newest(hit)):
                    of_document = "SELECT id FROM passages WHERE document = ?"
                    passed.update(id for (id,) in self.db.execute(of_document, [hit.document]))
                    continue
                counts[hit.document] += 1
            found.append(hit)
            if len(found) == self.limit:
                break
        return found

    def _newest(self, hit: PassageHit) -> bool:
        """Tell whether no document with the same text was written later."""
        values = {"document": hit.document, "now": self.now, "conversations": self.conversations, "tag": SESSION_TAG}
        return bool(self.db.execute(_NEWEST, values).fetchone() == (hit.document,))


def _any(phrases: Sequence[str]) -> str:
    return " OR ".join(phrases)


def _all(phrases: Sequence[str]) -> str:
    return " AND ".join(phrases)
