"""Texts of words that come again and again, so that a model has something to look up."""

from __future__ import annotations

from random import Random

_TEXT = "the miller pays rent for a mill by the river and two barn owls nest above its hayloft in spring"


def some_prose(count: int, words: int) -> list[str]:
    """So many texts of so many words, always the same."""
    rng, known = Random(0), _TEXT.split()
    return [" ".join(rng.choices(known, k=words)) for _ in range(count)]
