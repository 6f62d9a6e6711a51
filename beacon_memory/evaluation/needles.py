"""Needles in a haystack: questions about a made-up fact that is hidden in long texts."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, groupby, product
from typing import NamedTuple

from beacon_memory.errors import InputError
from beacon_memory.storage.catalog.passages import split_passages

from .items import Item

__all__ = ["needle_items"]

_NEEDLES = (
    ("The magic number of {place} is {value}.", "What is the magic number of {place}?"),
    ("The old lighthouse of {place} has the secret code {value}.", "Which code has the old lighthouse of {place}?"),
    ("To open the vault of {place}, one must dial {value}.", "What must one dial to open the vault of {place}?"),
)
_PLACES = ("Lisbon", "Nairobi", "Tromso", "Quito", "Hobart", "Almaty", "Dakar", "Porto", "Cusco", "Tallinn", "Hanoi")
# The last form has no space: some essays have lost it between paragraphs when they were extracted.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'’”)\]])\s+|(?<=[a-z][.!?])(?=[A-Z][a-z'’])")


def needle_items(
    haystack: Sequence[str],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    count: Callable[[str], int],
    seed: int = 0,
    repeats: int = 1,
) -> list[Item]:
    """Hide a made-up fact (the needle) in essays, for each pair of a length and a depth.

    lengths: most tokens of a text, the needle included; `count` counts them, sentence by sentence.
    depths:  share of the essays that comes before the needle, 0 to 1. It goes to the nearest end of a sentence.
    repeats: number of items for each pair, each with another needle and another order of the essays.

    The essays are cut after the last whole sentence that fits. Passages are those that `split_passages` cuts; the group
    is `{length} {depth}`. Raises InputError for a depth outside 0 to 1, for a length with no room for a sentence, and
    for too few essays.
    """
    if outside := [depth for depth in depths if not 0 <= depth <= 1]:
        raise InputError(f"depths={outside!r}, but must be from 0 (the beginning) to 1 (the end)")
    essays = [_sentences(essay, count) for essay in haystack]
    items = []
    for repeat in range(1, repeats + 1):
        order = random.Random(f"{seed} {repeat}").sample(essays, len(essays))
        hay = [_Sentence(*one, number) for number, passage in enumerate(chain(*order)) for one in passage]
        for length, depth in product(lengths, depths):
            rng = random.Random(f"{seed} {length} {depth} {repeat}")
            place, value = rng.choice(_PLACES), str(rng.randrange(1_000_000, 10_000_000))
            fact, question = (text.format(place=place, value=value) for text in rng.choice(_NEEDLES))
            context = _hide(fact, _cut(hay, length, count(" " + fact)), depth)
            group = f"{length} {depth}"
            items.append(Item(f"needle {group} {repeat}", context, question, (value,), ("contains",), group))
    return items


class _Sentence(NamedTuple):
    text: str
    tokens: int
    passage: int  # number of the passage that it is in


def _sentences(essay: str, count: Callable[[str], int]) -> list[list[tuple[str, int]]]:
    """Return the sentences of each passage of an essay, with their tokens. Lines are joined: they may be wrapped."""
    text = " ".join(essay.split())
    passages = [_SENTENCE_END.split(text[start:stop].strip()) for start, stop in split_passages(text)]
    return [
        [(first, count("\n" + first)), *((sentence, count(" " + sentence)) for sentence in others)]
        for first, *others in passages
    ]


def _cut(hay: Sequence[_Sentence], length: int, needle: int) -> Sequence[_Sentence]:
    """Return as many of the first sentences as fit beside the needle's tokens."""
    ends = list(accumulate(sentence.tokens for sentence in hay))
    kept = bisect_right(ends, length - needle)
    if not kept or (kept == len(hay) and ends[-1] < length - needle):
        reason = "the haystack is too short; give more texts" if kept else "no sentence fits beside the needle"
        raise InputError(f"lengths: {length} tokens, {needle} of them for the needle, cannot be filled: {reason}")
    return hay[:kept]


def _hide(fact: str, hay: Sequence[_Sentence], depth: float) -> tuple[str, ...]:
    """Return the passages, with the fact after the sentence whose end is nearest to `depth`."""
    ends = list(accumulate((sentence.tokens for sentence in hay), initial=0))
    place = min(range(len(ends)), key=lambda end: abs(ends[end] - depth * ends[-1]))
    needle = _Sentence(fact, 0, hay[max(place - 1, 0)].passage)
    passages = groupby([*hay[:place], needle, *hay[place:]], key=lambda sentence: sentence.passage)
    return tuple(" ".join(sentence.text for sentence in passage) for _, passage in passages)
