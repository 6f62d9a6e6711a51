"""Evidence: which of a question's words are in what was loaded for it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from .results import SourcePassage

__all__ = ["words_together"]

Place = tuple[str, int, int]  # a passage of the index: document, start and stop in its text


def words_together(
    places: Mapping[str, Sequence[Place]], loaded: Iterable[SourcePassage], said: Iterable[Sequence[str]] = ()
) -> float:
    """Return the largest share of a question's words that one passage has of which something was loaded.

    places: of each word the passages that have it.
    said:   the words of other texts that the model reads, such as earlier turns of a conversation.

    Of a question without words it is 0.
    """
    by_document: dict[str, list[tuple[int, int]]] = {}
    for source in loaded:
        by_document.setdefault(source.document, []).append((source.start, source.stop))
    spans = {document: _Spans(own) for document, own in by_document.items()}
    counts = Counter(place for of_word in places.values() for place in of_word)
    found = (count for (document, *span), count in counts.items() if document in spans and spans[document].meet(*span))
    best = max(found, default=0)
    for text in said:
        best = max(best, len(places.keys() & set(text)))
    return best / max(1, len(places))


class _Spans:
    """Spans of a text, asked whether another one meets any of them."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        ordered = sorted(spans)
        self._starts = [start for start, _ in ordered]
        self._reach = list(accumulate((stop for _, stop in ordered), max))

    def meet(self, start: int, stop: int) -> bool:
        before = bisect_left(self._starts, stop)  # that begin before it ends
        return before > 0 and self._reach[before - 1] > start
