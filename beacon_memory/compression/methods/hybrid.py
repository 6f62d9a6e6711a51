"""`hybrid`: beacons, and K/V of chosen tokens in the slots that are left."""

from __future__ import annotations

from collections.abc import Mapping

from .method import Reader
from .select import Select

__all__ = ["Hybrid"]


class Hybrid(Select):
    """Choose tokens as `select` does, with beacons at `beacon_hybrid_factor` times the ratio behind them.

    Raises ConfigError for a model whose raw tokens see the beacons of their window.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self.require_hidden("compression='hybrid'")

    @property
    def parameters(self) -> Mapping[str, str | int]:
        """The score that tokens are chosen by, and how many beacons there are."""
        return {**super().parameters, "hybrid_factor": self.model.config.beacon_hybrid_factor}

    def beacon_ratio(self, ratio: int) -> int:
        """Return the ratio of the beacons."""
        return ratio * self.model.config.beacon_hybrid_factor
