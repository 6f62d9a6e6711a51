"""Results of a BeaconMemory: documents that were added, answers, progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Added", "Answer", "Progress", "Source", "Status", "Usage"]

Status = Literal["added", "replaced", "unchanged", "appended", "recompressed"]
# Where a document's memory was: in its file, or ready for attention, in RAM or on the model's device.
Source = Literal["cold", "ram", "device"]


@dataclass(frozen=True, slots=True)
class Added:
    """The result of adding a document.

    status:  `added`, `replaced`, `appended`, `recompressed`, or `unchanged` if the same text was stored already,
             compressed in the same way.
    tokens:  raw tokens. slots: memory slots they were compressed to. bytes: of its K/V.
    ratios:  raw tokens per memory slot, each value that occurs.
    compression: the name of the method, such as `beacon`, `select` or `hybrid`.
    precision:   in which its K/V are kept.
    seconds: since the document before it was done.
    evicted: ids of documents that had to go to keep the quota.
    """

    id: str
    status: Status
    tokens: int
    slots: int
    bytes: int
    ratios: tuple[int, ...]
    compression: str
    precision: str
    seconds: float
    evicted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """Count the tokens that were compressed, and those of all documents that were begun."""

    tokens: int
    begun: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Count the memory slots loaded (sink included, the mean over heads), and the tokens of prompt and answer.

    sources: where the memory of each document was, in the order of the answer's ids.
    """

    slots: int
    prompt_tokens: int
    generated_tokens: int
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, with the documents that it was given from.

    ids: documents in the order in which they were loaded.
    time_to_first_token, seconds: from the question on, loading K/V from disk included, loading the model not.
    """

    text: str
    ids: tuple[str, ...]
    usage: Usage
    time_to_first_token: float
    seconds: float

    def __str__(self) -> str:
        return self.text
