"""The protocol of a compression method. It is provisional: a later version may ask for more.

Most methods choose tokens by a score: derive those from `ScoredMethod`, which asks for the score alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from beacon_memory.compression.work import CompressedWindow, TokenizedText, WindowMemories
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.modeling.model import BeaconModel

__all__ = ["CompressionMethod", "MakeMethod", "Plan", "Reader"]

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A document that a method is to compress.

    ids:     token ids of the whole document.
    windows: all its windows, in the order of the text.
    parts:   the memory of each of the first windows, as many as an earlier compression read; they are not read again.
             What the method yields is put behind them by who called it.
    """

    ids: Sequence[int]
    windows: Sequence[CompressedWindow]
    parts: WindowMemories

    @property
    def unread(self) -> Sequence[CompressedWindow]:
        """The windows that are still to be read."""
        return self.windows[len(self.parts) :]


class Reader(Protocol):
    """The compressor that a method works for."""

    @property
    def model(self) -> BeaconModel:
        """The model that reads."""

    @property
    def sink(self) -> BeaconKV:
        """K/V that stand in front of every memory; of no slots where the model has no sink."""

    @property
    def score(self) -> str:
        """How `select` and `hybrid` choose tokens, `repeat` or `expected`; other methods need not heed it."""

    @property
    def rows_per_pass(self) -> int:
        """Rows that one forward pass over several windows may have."""

    def tokenize(self, text: str) -> TokenizedText:
        """Return the token ids of a text."""


class CompressionMethod(Protocol):
    """A way to make memory slots of a text, for one model."""

    @property
    def parameters(self) -> Mapping[str, str | int]:
        """Settings that change the result, by name: stored with each document, and compared before it is continued."""

    @property
    def any_length(self) -> bool:
        """Whether it reads texts whose memory is larger than the model has positions for: a part is loaded later."""

    def span(self, tokens: int, ratio: int) -> int:
        """Return the positions that the memory of a window of so many tokens takes."""

    def compress(
        self, documents: Iterable[tuple[Key, Plan]], progress: Callable[[int], None]
    ) -> Iterator[tuple[Key, Sequence[MemoryKV]]]:
        """Yield after each pass, for each document that it read of, the key and the memories of the windows it read.

        They come in the order of the windows, without the sink. A document of which all was read before is yielded,
        too, with none. Take no more documents than the next pass needs. Call `progress` with the raw tokens that were
        read since the last call. A window at ratio r must leave tokens / r slots, rounded up, in the mean over all
        heads.
        """


MakeMethod = Callable[[Reader], CompressionMethod]
