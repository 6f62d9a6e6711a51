"""Documents on their way through a compressor: token ids in, memories out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from beacon_memory.kv.memory_kv import MemoryKV

__all__ = ["CompressedDocument", "CompressedWindow", "TokenizedText", "WindowMemories", "Work"]
Ratio = int | str | Sequence[int]


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A text as the model reads it.

    ids:     token ids.
    offsets: for each token where it starts and stops in the text, in characters.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class WindowMemories(Protocol):
    """Where the memories of a document's windows are put while it is read: a list, or what keeps them elsewhere."""

    def __len__(self) -> int:
        """Return how many windows there are."""

    def __getitem__(self, number: int, /) -> MemoryKV:
        """Return the memory of a window, at positions of its own."""

    def __iter__(self) -> Iterator[MemoryKV]:
        """Iterate over the memories of all windows."""

    def append(self, memory: MemoryKV, /) -> None:
        """Put the memory of the next window behind the others."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A document to compress, from its start or from where an earlier compression stopped.

    ids:     token ids of the whole document.
    ratios:  the ratio of each window; `BeaconCompressor.ratios` gives them.
    read:    the memory, without the sink, of the first `windows` windows, which are not read again.
    windows: how many windows that is, all of them full.
    parts:   where the memory of each window is put, in RAM by default. Given in place of `read`; what it has already is
             of the first windows, which are not read again.

    An earlier compression by the same method, with the same parameters and model, must have read these very ids at
    these very ratios into `read` or `parts`: of `read` only the sizes are checked.
    """

    ids: Sequence[int]
    ratios: Sequence[int]
    read: MemoryKV | None = None
    windows: int = 0
    parts: WindowMemories | None = None

    @property
    def windows_before(self) -> int:
        """Return how many windows are not read again."""
        return self.windows if self.parts is None else len(self.parts)


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
    """A document that was compressed: the memory of each of its windows, without the sink, and what these are."""

    parts: WindowMemories
    tokens: int
    windows: tuple[CompressedWindow, ...]

    @property
    def kv(self) -> MemoryKV:
        """The memory as a whole."""
        return MemoryKV.concat([*self.parts])
