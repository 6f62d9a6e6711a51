"""How long the documents are: given as numbers, or measured on texts."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

from beacon_memory.errors import InputError
from beacon_memory.storage.catalog.passages import PASSAGE_LENGTH, split_passages

__all__ = [
    "CHARACTERS_PER_TOKEN",
    "Measured",
    "PlannedText",
    "TextMeasure",
    "by_characters",
    "by_tokenizer",
    "evenly",
    "made_up",
    "measured",
    "planned",
    "read_rows",
    "shares",
]

CHARACTERS_PER_TOKEN = 4.0  # of English prose, roughly; 4.3 to 4.8 with the tokenizers of these models
_ID = 10000  # a token id with as many digits as most have


@dataclass(frozen=True)
class PlannedText:
    """A text as far as its file depends on it; what is made up stands for texts of this length.

    ids, offsets: its tokens, and where each starts and stops in characters.
    breaks:       where its passages begin.
    """

    id: str
    text_bytes: int
    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]
    breaks: Sequence[int]

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Measured:
    """The tokens of a text, and where each starts and stops in characters."""

    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]


class TextMeasure(Protocol):
    """A way to count the tokens of a text."""

    def __call__(self, text: str, /) -> Measured:
        """Return the tokens of a text."""


def by_tokenizer(file: Path) -> TextMeasure:
    """Count as the model's tokenizer does; file: its tokenizer.json. Control tokens in a text count as text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True

    def measure(text: str) -> Measured:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        return Measured(encoded.ids, encoded.offsets)

    return measure


def by_characters(per_token: float) -> TextMeasure:
    """Take so many characters for a token; raises InputError for a number that they cannot be."""
    if not (math.isfinite(per_token) and per_token > 0):
        raise InputError(f"--chars-per-token is {per_token}, but must be a number above 0")

    def measure(text: str) -> Measured:
        return _evenly(math.ceil(len(text) / per_token), len(text))

    return measure


def planned(id: str, text: str, measure: TextMeasure) -> PlannedText:
    """Measure one text; raises InputError for one without tokens."""
    found = measure(text)
    if not found.ids:
        raise InputError(f"{id!r} is empty: there is nothing to compress")
    breaks = [start for start, _ in split_passages(text)]
    return PlannedText(id, len(text.encode()), found.ids, found.offsets, breaks)


@lru_cache(maxsize=256)
def made_up(tokens: int, characters_per_token: float = CHARACTERS_PER_TOKEN) -> PlannedText:
    """Return a text of so many tokens as it is in the mean: passages of equal length, one byte a character."""
    if tokens < 1:
        raise InputError(f"a document has {tokens} tokens, but must have 1 at least")
    length = max(tokens, round(tokens * characters_per_token))
    found = _evenly(tokens, length)
    return PlannedText("documents/0000000.txt", length, found.ids, found.offsets, range(0, length, PASSAGE_LENGTH))


def _evenly(tokens: int, length: int) -> Measured:
    bounds = [length * number // max(1, tokens) for number in range(tokens + 1)]
    return Measured([_ID] * tokens, list(pairwise(bounds)))


def shares(lengths: str, documents: int) -> list[tuple[int, int]]:
    """Return how many documents there are of each length, in tokens.

    lengths: `4000`, or several with their weights, `1000:6,4000:3,16000:1`; without a weight, 1.

    Raises InputError for a text that says nothing of the kind.
    """
    try:
        parts = [part.partition(":") for part in lengths.split(",")]
        given = [(int(tokens), float(weight or 1)) for tokens, _, weight in parts]
        if not all(tokens >= 1 and math.isfinite(weight) and weight > 0 for tokens, weight in given):
            raise ValueError("lengths and weights must be above 0")
    except ValueError as error:
        raise InputError(
            f"--lengths is {lengths!r}, but must be tokens, as 4000, or several with weights, as 1000:6,4000:3: {error}"
        ) from error
    if documents < 1:
        raise InputError(f"--documents is {documents}, but must be 1 at least")
    weights = [weight for _, weight in given]
    return [(tokens, count) for (tokens, _), count in zip(given, _shared(documents, weights), strict=True) if count]


def evenly(documents: int, sample: int) -> list[int]:
    """Return how many documents stand for each one of a sample; raises InputError for no sample."""
    if not sample:
        raise InputError("there is nothing to measure: no text was found")
    return _shared(documents, [1.0] * sample)


def _shared(documents: int, weights: Sequence[float]) -> list[int]:
    """Share documents out by weights, so that all of them are."""
    ends = [round(documents * upto / sum(weights)) for upto in accumulate(weights)]
    return [end - start for start, end in pairwise([0, *ends])]


def read_rows(file: Path) -> Iterator[tuple[str, str]]:
    """Yield id and text of each row of a file of JSON lines, plain or gzipped: objects with `text`, and perhaps `id`.

    Raises InputError, naming the line, for any other.
    """
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line) if line.strip() else None
                if row is None:
                    continue
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise InputError(f"line {number} of {file} must be an object with a text under 'text'")
                yield str(row.get("id", f"{file.name}:{number}")), row["text"]
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} cannot be read as JSON lines: {error}") from error


def measured(texts: Iterable[tuple[str, str]], measure: TextMeasure) -> Iterator[PlannedText]:
    """Measure texts, given with their ids, one after another; those that are empty are left out."""
    return (planned(id, text, measure) for id, text in texts if text)
