"""Search the passages by the words of a question, by BM25.

`FullText` decides which words are searched for, and how many passages are looked at. How these are found is told by
`fts5` for SQLite and by `postgres.full_text` for PostgreSQL.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import regex

from beacon_memory.documents import SESSION_TAG
from beacon_memory.errors import InputError

from .database import Database
from .words import words

__all__ = ["CONVERSATION", "FullText", "PassageHit", "Sought", "telling_words"]

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

_NEWEST = """
    SELECT id FROM documents
    WHERE content_hash = (SELECT content_hash FROM documents WHERE id = :document)
    AND (expires_at IS NULL OR expires_at > :now)
    {among} ORDER BY updated_at DESC, id DESC LIMIT 1
"""
_NO_CONVERSATION = "AND NOT EXISTS (SELECT 1 FROM labels WHERE document = id AND name = 'tag' AND value = :tag)"


@dataclass(frozen=True, slots=True)
class PassageHit:
    """A passage that matches a query: characters start to stop of a document. A higher `score` (BM25) is better."""

    document: str
    ordinal: int
    start: int
    stop: int
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many passages a search looks at.

    most:     of the newest passages that match, so many are scored.
    kept:     of the scored ones, the best that are returned; None for all, of which some may be too many of a text.
    together: whether passages match that hold all of the words, rather than any of them.
    """

    most: int
    kept: int | None
    together: bool = False


@dataclass(frozen=True, slots=True)
class Sought:
    """The conditions of a search.

    limit:    how many passages are wanted.
    now:      documents that expired before are not found.
    per_text: at most so many passages of a text. Of documents with the same text, only the one whose row was written
              last is found.
    conversations: whether to find what conversations were folded into, too.
    documents: only passages of these.

    Raises InputError for another limit than 1, 2, ...
    """

    limit: int
    now: str
    per_text: int | None = None
    conversations: bool = True
    documents: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, bound in (("limit", self.limit), ("per_text", self.per_text)):
            if (type(bound) is not int or bound < 1) and not (name == "per_text" and bound is None):
                raise InputError(f"{name} must be an integer of at least 1, got {bound!r}")


class FullText(ABC):
    """Find passages by their words, with one connection to the database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def search(self, query: str, sought: Sought) -> list[PassageHit]:
        """Return the passages that share words with `query`, best first by BM25; any text is a safe query.

        Question words count if there are no others, or as names: with a capital inside a sentence ("What happens in
        May?"), and, if nothing is found without them, those that are nouns. A query without any word finds nothing.
        Words are stemmed as English ones; accents and case do not matter; where words have no spaces between them, any
        part of a sentence is found (see `words`). Among more than 10,000 passages not all are looked at, see
        `_ranked`. Raises InputError for a query that is no text.
        """
        if not isinstance(query, str):
            raise InputError(f"a query must be a str, got {query!r} of type {type(query).__name__}")
        telling = telling_words(query)
        more = [word for word in words(query) if word in telling or word in _NOUNS]
        return self._hits(telling, sought) or (self._hits(more, sought) if more != telling else [])

    def places_of_words(self, query: str, documents: Sequence[str]) -> dict[str, list[tuple[str, int, int]]]:
        """Return for each word of a query the passages of some documents with it: document, start, stop."""
        places = {word: self._places(word, documents) for word in telling_words(query)[:_LONGEST]}
        return {  # what is damaged may be no passage
            word: [one for one in found if (*map(type, one),) == (str, int, int)] for word, found in places.items()
        }

    @abstractmethod
    def _places(self, word: str, documents: Sequence[str]) -> Iterable[Any]:
        """Select document, start and stop of the passages of these documents with a word."""

    @abstractmethod
    def _count(self, together: Sequence[str], most: int, sought: Sought) -> int:
        """Count the passages that hold all of these words, up to `most`."""

    @abstractmethod
    def _scores(
        self, leading: Sequence[str], others: Sequence[str], sought: Sought, bounds: Bounds
    ) -> dict[int, float]:
        """Return the BM25 scores of the best of the newest passages with leading words, by id.

        others: words that need not be there, but count where they are.
        """

    @abstractmethod
    def _passages(self, ids: Iterator[int]) -> Iterator[tuple[int, Any]]:
        """Yield each of these ids with its passage, as document, ordinal, start, stop and text, or with None."""

    def _hits(self, words: Sequence[str], sought: Sought) -> list[PassageHit]:
        """Return the best passages with any of these words."""
        if not words:
            return []
        bounds = Bounds(most=max(sought.limit, _SCORED), kept=sought.limit if sought.per_text is None else None)
        if self._db.execute("SELECT 1 FROM passages LIMIT 1 OFFSET ?", [bounds.most]).fetchone():
            return self._chosen(self._ranked(words, sought, bounds), sought)
        return self._chosen(self._scores(words, (), sought, bounds), sought)

    def _ranked(self, words: Sequence[str], sought: Sought, bounds: Bounds) -> dict[int, float]:
        """Return the BM25 scores of the best passages by id, without scoring all of very many.

        Scored are passages with one of the rarest words of the question; the other words that they hold count, too. If
        these are not enough, passages are added that hold as many of the other words at once as occur together. Words
        that a great many passages hold say little and take long to count: they are left out where there are others.
        """
        held = {one: self._count([one], _COUNTED, sought) for one in words}
        words = sorted(filter(held.get, words), key=held.__getitem__)[:_LONGEST]
        if sought.documents is not None:  # there are few passages of these, whatever others hold
            return self._scores(words, (), sought, bounds) if words else {}
        together = itertools.accumulate(held[one] for one in words)
        rare = words[: sum(count <= bounds.most for count in together)]
        others = words[len(rare) :]
        telling = [one for one in others if held[one] < _COUNTED]
        scores = self._scores(rare, telling, sought, bounds) if rare else {}
        if others and (len(scores) < sought.limit or len(self._chosen(scores, sought)) < sought.limit):
            joint: list[str] = []
            for one in telling or others:
                if self._count([*joint, one], _TOGETHER, sought) == _TOGETHER:
                    joint.append(one)
            more = [one for one in telling if one not in joint]
            scores = self._scores(joint, more, sought, replace(bounds, together=True)) | scores
        return scores

    def _chosen(self, scores: Mapping[int, float], sought: Sought) -> list[PassageHit]:
        """Read the best passages, as many as are wanted altogether and of each text."""
        kinds = (str, int, int, int, str)  # what is damaged may be no passage, or not there
        found: list[PassageHit] = []
        counts: Counter[str] = Counter()
        passed: set[int] = set()
        best = sorted(scores, key=lambda id: (-scores[id], id))
        for id, values in self._passages(one for one in best if one not in passed):
            if id in passed or values is None or not all(map(isinstance, values, kinds)):
                continue
            document, ordinal, start, stop, text = values
            hit = PassageHit(document, ordinal, start, stop, text, scores[id])
            if sought.per_text is not None:
                if counts[hit.document] == sought.per_text or (
                    not counts[hit.document] and not self._newest(hit, sought)
                ):
                    of_document = "SELECT id FROM passages WHERE document = ?"
                    passed.update(id for (id,) in self._db.execute(of_document, [hit.document]).fetchall())
                    continue
                counts[hit.document] += 1
            found.append(hit)
            if len(found) == sought.limit:
                break
        return found

    def _newest(self, hit: PassageHit, sought: Sought) -> bool:
        """Tell whether no document with the same text was written later."""
        values = {"document": hit.document, "now": sought.now, "tag": SESSION_TAG}
        among = "" if sought.conversations else _NO_CONVERSATION
        return bool(self._db.execute(_NEWEST.format(among=among), values).fetchone() == (hit.document,))


def telling_words(query: str) -> list[str]:
    """Return the words of a query that say what it is about: without question words, if it has others."""
    names = set(words(" ".join(_INSIDE.findall(query)))) if not query.isupper() else set()
    every = words(query)
    return [word for word in every if word not in _QUESTION_WORDS or word in names] or every
