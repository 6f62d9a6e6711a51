"""`select`: K/V of the tokens that each head needs; no training, on any supported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.resources import files

from torch import Tensor

from beacon_memory.compression.scoring import ExpectedAttention, repeated, spread
from beacon_memory.compression.selection import read_raw
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.attention import Watch

from .scored import ReadWindow, ScoredMethod

__all__ = ["Select"]


class Select(ScoredMethod):
    """Keep the tokens that heads look up while the window is repeated, or that they are expected to (`scoring`)."""

    @property
    def parameters(self) -> Mapping[str, str | int]:
        """The score that tokens are chosen by."""
        return {"score": self.reader.score}

    def watch(self, tokens: int) -> Watch | None:
        """Return what works out the expected attention, where that is the score."""
        return ExpectedAttention(self.model.rope, tokens) if self.reader.score == "expected" else None

    def scores(self, windows: Sequence[ReadWindow]) -> list[Tensor]:
        """Return what each token of each window contributes to its head, [layers, kv_heads, tokens]."""
        if self.reader.score == "repeat":
            return repeated(self.model, windows)
        return [spread(self.measured, one.watch.scores) for one in windows if isinstance(one.watch, ExpectedAttention)]

    @cached_property
    def measured(self) -> Tensor:
        """How much heads need of the text that is kept for this, which `expected` cannot tell; measured once."""
        text = files("beacon_memory.compression").joinpath("calibration.txt").read_text(encoding="utf-8")
        ids = self.reader.tokenize(text).ids[: self.model.config.beacon_window]
        prefix = self.model.prefix(MemoryKV.of(self.reader.sink))
        window = ReadWindow(self.model, prefix, ids, read_raw(self.model, prefix, ids), None)
        (measured,) = repeated(self.model, [window])
        return measured
