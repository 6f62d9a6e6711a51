"""Documents on their way through a compressor: token ids in, memories out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from beacon_memory.kv.memory_kv import MemoryKV

__all__ = ["CompressedDocument", "CompressedWindow", "TokenizedText", "Work"]
Ratio = int | str | Sequence[int]


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A text as the model reads it.

    ids:     token ids.
    offsets: for each token where it starts and stops in the text, in characters.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A document to compress, from its start or from where an earlier compression stopped.

    ids:     token ids of the whole document.
    ratios:  the ratio of each window; `BeaconCompressor.ratios` gives them.
    read:    the memory, without the sink, of the first `windows` windows, which are not read again.
    windows: how many windows that is, all of them full.

    An earlier compression by the same method, with the same parameters and model, must have read these very ids at
    these very ratios into `read`: of this only the sizes are checked.
    """

    ids: Sequence[int]
    ratios: Sequence[int]
    read: MemoryKV | None = None
    windows: int = 0


@dataclass(frozen=True, slots=True)
class CompressedWindow:
    """A window of a compressed document.

    first:  where it starts among the document's tokens.
    tokens: its raw tokens.
    ratio:  raw tokens per slot.
    span:   positions that it takes of the document's memory; those of all windows, in their order, make up the whole.
    """

    first: int
    tokens: int
    ratio: int
    span: int


@dataclass(frozen=True, slots=True, eq=False)
class CompressedDocument:
    """A document that was compressed: its memory, without the sink, and its windows."""

    kv: MemoryKV
    tokens: int
    windows: tuple[CompressedWindow, ...]
