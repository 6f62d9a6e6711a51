"""Explaining: the text of what would be loaded for a question, and how much of each word."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise

from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.reading import read_document_part
from beacon_memory.storage.store import MemoryStore

from .recall import Portion
from .results import ExplainedPassage, ExplainedWord

__all__ = ["explained"]

Span = tuple[int, int]  # start and stop in a text, in characters

_SPACELESS = "\u2e80"  # from here on are scripts without spaces: each token of theirs is a word


def explained(
    portion: Portion, store: MemoryStore, tokenized: Callable[[str], Sequence[Span]], slot_bytes: int
) -> list[ExplainedPassage]:
    """Return all passages of a document, with how much of each is loaded, which its file tells.

    tokenized:  returns where the tokens of a text start and stop.
    slot_bytes: of a loaded slot of all heads.

    Raises as `Portion.load` does.
    """
    counts, header = portion.index.counts, portion.index.header
    file = read_document_part(store.parts, portion.row, portion.lowest or (0,) * len(counts))
    text, heads = file.text, math.prod(counts.shape[2:])
    shares = (file.kv.positions.bincount(minlength=header.span) / heads).tolist()
    words = list(_words(header, tokenized(text), text, shares))
    starts = [word.start for word in words]
    sections = zip(header.sections, portion.relevance, strict=True)
    of_text = [(one, relevant) for one, relevant in sections if one.first < _behind_tokens(header)[one.window]]
    passages = []
    for (start, stop), parts in groupby(of_text, key=lambda part: (part[0].start, part[0].stop)):
        own = list(parts)
        loaded = [share for one, _ in own for share in shares[one.first : one.first + one.size]]
        passages.append(
            ExplainedPassage(
                document=portion.row.id,
                start=start,
                stop=stop,
                text=text[start:stop],
                relevance=own[0][1],
                loaded=sum(loaded) / len(loaded),
                slots=sum(loaded),
                bytes=round(sum(loaded) * slot_bytes),
                words=tuple(words[bisect_left(starts, start) : bisect_left(starts, stop)]) if any(loaded) else (),
            )
        )
    return passages


def _behind_tokens(header: DocumentHeader) -> list[int]:
    """Return for each window the first position that is not one of its tokens but behind them, as that of a beacon."""
    return [
        first + min(window.span, window.tokens)
        for first, window in zip(header.window_starts, header.windows, strict=True)
    ]


def _words(
    header: DocumentHeader, tokens: Sequence[Span], text: str, shares: Sequence[float]
) -> Iterator[ExplainedWord]:
    """Yield the words of all windows whose tokens have a position each.

    shares: of each position of the memory.
    """
    starts = [start for start, _ in tokens]
    for first, window in zip(header.window_starts, header.windows, strict=True):
        own = tokens[bisect_left(starts, window.start) : bisect_left(starts, window.stop)]
        if window.span < window.tokens or len(own) != window.tokens:  # beacons; or it was cut into other tokens
            continue
        placed = [(*span, shares[first + place]) for place, span in enumerate(own)]
        begins = [n for n, (start, *_) in enumerate(placed) if not n or _begins_word(text, placed[n - 1][1], start)]
        for begin, end in pairwise([*begins, len(placed)]):
            parts = placed[begin:end]
            yield ExplainedWord(parts[0][0], parts[-1][1], sum(share for *_, share in parts) / len(parts))


def _begins_word(text: str, stop: int, start: int) -> bool:
    """Tell whether a token begins a word, or goes on with that of the token before it, which ends at `stop`."""
    if start < stop:  # both are parts of one character
        return False
    around = text[start - 1 : start + 1]
    return not (around.isalnum() and max(around) < _SPACELESS)
