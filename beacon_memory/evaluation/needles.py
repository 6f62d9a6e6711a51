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

__all__ = ["needle_document", "needle_items"]

_NEEDLES = (
    ("The magic number of {place} is {value}.", "What is the magic number of {place}?"),
    ("The old lighthouse of {place} has the secret code {value}.", "Which code has the old lighthouse of {place}?"),
    ("To open the vault of {place}, one must dial {value}.", "What must one dial to open the vault of {place}?"),
)
# No word of such a question stands in its fact, but for stop words.
_IN_OTHER_WORDS = (
    ("The combination of the green safe is {value}.", "Which digits open the strongbox?"),
    ("Whoever dials {value} reaches the fire brigade.", "What is the telephone number of the firemen?"),
    ("The bicycle in the cellar cost {value} crowns.", "How much money was paid for the two-wheeler?"),
    ("The violin lies in locker {value} at the station.", "In which compartment is the fiddle kept?"),
    ("The ship's doctor signed the letter as agent {value}.", "Which code name did the physician use?"),
    ("In the drawer lay a passport with the serial number {value}.", "What does the identity document read?"),
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
    other_words: bool = False,
) -> list[Item]:
    """Hide a made-up fact (the needle) in essays, for each pair of a length and a depth.

    lengths: most tokens of a text, the needle included; `count` counts them, sentence by sentence.
    depths:  share of the essays that comes before the needle, 0 to 1. It goes to the nearest end of a sentence.
    repeats: number of items for each pair, each with another needle and another order of the essays.
    other_words: ask for the facts in words that do not stand in them.

    The essays are cut after the last whole sentence that fits. Passages are those that `split_passages` cuts; the group
    is `{length} {depth}`. Raises InputError for a depth outside 0 to 1, for a length with no room for a sentence, and
    for too few essays.
    """
    _check_depths(depths)
    essays = [_sentences(essay, count) for essay in haystack]
    items = []
    for repeat in range(1, repeats + 1):
        order = random.Random(f"{seed} {repeat}").sample(essays, len(essays))
        hay = [_Sentence(*one, number) for number, passage in enumerate(chain(*order)) for one in passage]
        for length, depth in product(lengths, depths):
            rng = random.Random(f"{seed} {length} {depth} {repeat}")
            place, value = rng.choice(_PLACES), str(rng.randrange(1_000_000, 10_000_000))
            form = rng.choice(_IN_OTHER_WORDS if other_words else _NEEDLES)
            fact, question = (text.format(place=place, value=value) for text in form)
            context = _hide([(fact, depth)], _cut(hay, length, count(" " + fact)))
            group = f"{length} {depth}"
            items.append(Item(f"needle {group} {repeat}", context, question, (value,), ("contains",), group))
    return items


def needle_document(
    haystack: Sequence[str], *, tokens: int, depths: Sequence[float], count: Callable[[str], int], seed: int = 0
) -> list[Item]:
    """Hide a made-up fact at each depth of one text; returns the questions, all of them on this text.

    The essays follow each other in an order by chance, and again and again in others, until `tokens` are reached. For
    depths and `count` see `needle_items`; the group is the depth. Raises InputError for a depth outside 0 to 1, for
    more depths than there are facts, and for a haystack without a sentence.
    """
    _check_depths(depths)
    rng = random.Random(f"{seed} {tokens}")
    forms = list(product(_PLACES, _NEEDLES))
    if len(depths) > len(forms):
        raise InputError(f"depths: {len(depths)} of them, but there are only {len(forms)} different facts to hide")
    if not any(essay.split() for essay in haystack):
        raise InputError("the haystack has no sentence; give texts")
    values = rng.sample(range(1_000_000, 10_000_000), len(depths))
    facts = [
        [text.format(place=place, value=value) for text in texts]
        for (place, texts), value in zip(rng.sample(forms, len(depths)), values, strict=True)
    ]
    room = tokens - sum(count(" " + fact) for fact, _ in facts)
    passages: list[list[tuple[str, int]]] = []
    taken = 0
    while taken < room:
        for essay in rng.sample(haystack, len(haystack)):
            if taken < room:
                passages += _sentences(essay, count)
                taken = sum(tokens for passage in passages for _, tokens in passage)
    hay = [_Sentence(*one, number) for number, passage in enumerate(passages) for one in passage]
    hidden = [(fact, depth) for (fact, _), depth in zip(facts, depths, strict=True)]
    context = _hide(hidden, _cut(hay, room, 0))
    return [
        Item(f"needle {depth}", context, question, (str(value),), ("contains",), str(depth))
        for (_, question), depth, value in zip(facts, depths, values, strict=True)
    ]


def _check_depths(depths: Sequence[float]) -> None:
    if outside := [depth for depth in depths if not 0 <= depth <= 1]:
        raise InputError(f"depths={outside!r}, but must be from 0 (the beginning) to 1 (the end)")


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


def _hide(facts: Sequence[tuple[str, float]], hay: Sequence[_Sentence]) -> tuple[str, ...]:
    """Return the passages, with each fact after the sentence whose end is nearest to its depth."""
    ends = list(accumulate((sentence.tokens for sentence in hay), initial=0))
    needles: dict[int, list[_Sentence]] = {}
    for fact, depth in facts:
        distances = [abs(end - depth * ends[-1]) for end in ends]
        place = distances.index(min(distances))
        needles.setdefault(place, []).append(_Sentence(fact, 0, hay[max(place - 1, 0)].passage))
    sentences = [*needles.get(0, ()), *chain(*((one, *needles.get(at, ())) for at, one in enumerate(hay, start=1)))]
    passages = groupby(sentences, key=lambda sentence: sentence.passage)
    return tuple(" ".join(sentence.text for sentence in passage) for _, passage in passages)
