"""`beacon` where `beacon_dense_ratio` is set: many beacons, of which each head keeps those that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from beacon_memory.compression.scoring import repeated
from beacon_memory.kv.memory_kv import BeaconKV
from beacon_memory.modeling.layout import slots_of

from .method import Reader
from .scored import ReadWindow, ScoredMethod

__all__ = ["DenseBeacon"]


class DenseBeacon(ScoredMethod):
    """Read a window with beacons at `beacon_dense_ratio`, and keep those that heads look up while it is repeated.

    Raises ConfigError for a model whose raw tokens see the beacons of their window.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self.require_hidden("beacon_dense_ratio")

    @property
    def parameters(self) -> Mapping[str, str | int]:
        """The ratio of the beacons that are chosen among."""
        return {"dense_ratio": self.model.config.beacon_dense_ratio}

    def beacon_ratio(self, ratio: int) -> int:
        """Return the ratio of the beacons that are chosen among."""
        return min(ratio, self.model.config.beacon_dense_ratio)

    def candidates(self, raw: BeaconKV, beacons: BeaconKV) -> tuple[BeaconKV, BeaconKV]:
        """Return the beacons, and nothing behind them: no token is kept."""
        return beacons, raw[:0]

    def span(self, tokens: int, ratio: int) -> int:
        """Return the positions that a window takes: those of all its beacons, whichever are kept."""
        return slots_of(tokens, self.beacon_ratio(ratio))

    def scores(self, windows: Sequence[ReadWindow]) -> list[Tensor]:
        """Return what each beacon contributes to its head while the window is repeated behind its beacons."""
        return repeated(self.model, windows)
