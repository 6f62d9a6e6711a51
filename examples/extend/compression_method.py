"""A compression method of your own: keep the entries whose keys have the smallest norm.

Such keys draw the most attention (Devoto et al., arXiv 2406.11430). A package offers it by an entry point:

    [project.entry-points."beacon_memory.compression"]
    knorm = "compression_method:KeyNorm"

This script registers it instead: python examples/extend/compression_method.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from torch import Tensor

from beacon_memory import BeaconMemory, ReadWindow, ScoredMethod
from beacon_memory.compression.methods.registry import register


class KeyNorm(ScoredMethod):
    """Rank the entries of each head: norms of different heads cannot be compared, so each keeps equally many."""

    def scores(self, windows: Sequence[ReadWindow]) -> list[Tensor]:
        """Return for each entry how many of its head have a larger norm, [layers, kv_heads, tokens] of each window."""
        norms = [window.kv.keys.norm(dim=-1) for window in windows]
        return [one.argsort(dim=-1, descending=True).argsort(dim=-1) for one in norms]


if __name__ == "__main__":
    register("knorm", KeyNorm)
    with tempfile.TemporaryDirectory() as folder, BeaconMemory(folder) as memory:
        print(memory.add("well", "The key of the well lies under the blue stone.", ratio=2, compression="knorm"))
        print(memory.ask("Where is the key of the well?", "well", max_new_tokens=20))
