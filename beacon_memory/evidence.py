"""Evidence: which of a question's words are together in what was found or loaded for it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

from beacon_memory.storage.catalog.full_text import telling_words
from beacon_memory.storage.catalog.words import words

__all__ = ["words_in_one", "words_together"]

Place = tuple[str, int, int]  # a passage of the index: document, start and stop in its text


class Part(Protocol):
    """Characters of a stored document, from `start` to `stop`."""

    @property
    def document(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


def words_together(
    places: Mapping[str, Sequence[Place]], parts: Iterable[Part], said: Iterable[Sequence[str]] = ()
) -> float:
    """Return the largest share of a question's words that one passage has which meets one of these parts.

    places: of each word the passages that have it.
    said:   the words of other texts that the model reads, such as earlier turns of a conversation.

    Of a question without words it is 0.
    """
    by_document: dict[str, list[tuple[int, int]]] = {}
    for part in parts:
        by_document.setdefault(part.document, []).append((part.start, part.stop))
    spans = {document: _Spans(own) for document, own in by_document.items()}
    counts = Counter(place for of_word in places.values() for place in of_word)
    found = (count for (document, *span), count in counts.items() if document in spans and spans[document].meet(*span))
    best = max(found, default=0)
    for text in said:
        best = max(best, len(places.keys() & set(text)))
    return best / max(1, len(places))


def words_in_one(passages: Iterable[str], question: str) -> float:
    """Return the same share for passages that no index knows, of which each word counts in the form it has."""
    asked = {*telling_words(question)}
    return max((len(asked.intersection(words(passage))) for passage in passages), default=0) / max(1, len(asked))


class _Spans:
    """Spans of a text, asked whether another one meets any of them."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        ordered = sorted(spans)
        self._starts = [start for start, _ in ordered]
        self._reach = list(accumulate((stop for _, stop in ordered), max))

    def meet(self, start: int, stop: int) -> bool:
        before = bisect_left(self._starts, stop)  # that begin before it ends
        return before > 0 and self._reach[before - 1] > start
