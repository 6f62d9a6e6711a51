"""Cut a text into passages, the units that full-text search finds and ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

__all__ = ["PASSAGE_LENGTH", "split_passages"]

PASSAGE_LENGTH = 300  # characters that a passage aims at: some 64 tokens
_SLACK = PASSAGE_LENGTH // 4  # shortest passage worth a cut, and how far the last one may run over

# Where a passage may end, best first: after a paragraph, a sentence or line, a word. Each matches up to the first
# character of what follows.
_BOUNDARIES = (
    re.compile(r"\n[ \t\r]*\n\s*"),
    re.compile(r"[.!?…][\"'’”)\]»]*\s+|[。！？]+\s*|\n\s*"),  # noqa: RUF001 -- these marks are meant
    re.compile(r"\s+"),
)

_EXCHANGE = re.compile(r"\n(?=User: )")  # as `Session` writes the turns that it folds


def split_passages(text: str, start: int = 0) -> list[tuple[int, int]]:
    """Cut `text` into passages: (start, stop) in characters, covering it without gap or overlap; [] for no text.

    start: where to begin. If a passage of the text begins there, those from there on are the same as of the whole text;
           and where a text grows at its end, all of its passages but the last stay as they are.

    Short paragraphs are joined and long ones divided to about `PASSAGE_LENGTH` characters: no passage is longer than
    five quarters of that, and, unless it is the whole text, none is shorter than a quarter of it. In a conversation,
    however, each turn of the user begins a passage, however short.
    """
    exchanges = [start, *(match.end() for match in _EXCHANGE.finditer(text, start)), len(text)]
    return [cut for begin, end in pairwise(exchanges) for cut in _cut(text, begin, end)]


def _cut(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while end - start > PASSAGE_LENGTH + _SLACK:
        stop = _last_boundary(text, start + _SLACK, start + PASSAGE_LENGTH)
        yield start, stop
        start = stop
    if start < end:
        yield start, end


def _last_boundary(text: str, low: int, high: int) -> int:
    """Return the last place in [low, high] to cut at, of the best kind there is; `high` if there is none."""
    for boundary in _BOUNDARIES:
        # A look beyond `high` would let one match swallow unbounded white space; cutting inside it does no harm.
        cuts = [match.end() for match in boundary.finditer(text, low, high)]
        if cuts:
            return cuts[-1]
    return high
