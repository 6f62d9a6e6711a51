"""`select`: K/V of the tokens that each head needs; no training, on any supported model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from typing import cast

from torch import Tensor

from beacon_memory.compression.scoring import ExpectedAttention, ProbeFit, repeated
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.modeling.attention import Watch
from beacon_memory.modeling.probe import Probe

from .method import Reader
from .scored import ReadWindow, ScoredMethod

__all__ = ["Select", "Studied"]


class Select(ScoredMethod):
    """Keep the tokens that heads look up while the window is repeated, or those that a probe tells (`scoring`)."""

    @property
    def parameters(self) -> Mapping[str, str | int]:
        """The score that tokens are chosen by, and which probe tells it, if that comes with the adapter."""
        probe = self.model.probe if self.reader.score == "expected" else None
        return {"score": self.reader.score} if probe is None else {"score": self.reader.score, "probe": probe.digest}

    def watch(self, tokens: int) -> Watch | None:
        """Return what works out the expected attention, where a probe is asked."""
        return ExpectedAttention(self.model.rope, tokens) if self.reader.score == "expected" else None

    def scores(self, windows: Sequence[ReadWindow]) -> list[Tensor]:
        """Return what each token of each window contributes to its head, or the logarithm of that."""
        if self.reader.score == "repeat":
            return repeated(self.model, windows)
        return [self.probe(one.kv, one.watch.scores) for one in windows if isinstance(one.watch, ExpectedAttention)]

    @cached_property
    def probe(self) -> Probe:
        """The probe of the adapter; where there is none, one that is fitted to the text that is kept for this."""
        if self.model.probe is not None:
            return self.model.probe
        text = files("beacon_memory.compression").joinpath("calibration.txt").read_text(encoding="utf-8")
        ids = self.reader.tokenize(text).ids[: self.model.config.beacon_window]
        fit = ProbeFit()
        Studied(self.reader, fit.take).read_windows([(self.model.prefix(MemoryKV.of(self.reader.sink)), ids, 1)])
        return fit.probe()


class Studied(Select):
    """Choose by repeating windows, and show what one reading told of each beside what was found.

    show: called with the K/V of a window, its expected attention, and its scores.
    """

    def __init__(self, reader: Reader, show: Callable[[BeaconKV, Tensor, Tensor], None]) -> None:
        super().__init__(reader)
        self.show = show

    def watch(self, tokens: int) -> ExpectedAttention:
        """Return what works out the expected attention."""
        return ExpectedAttention(self.model.rope, tokens)

    def scores(self, windows: Sequence[ReadWindow]) -> list[Tensor]:
        """Return what each token of each window contributes to its head."""
        found = repeated(self.model, windows)
        for window, scores in zip(windows, found, strict=True):
            self.show(window.kv, cast(ExpectedAttention, window.watch).scores, scores)
        return found
