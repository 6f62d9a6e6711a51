"""Levels: how soon an entry of a memory is part of a stronger compressed one.

A method that scores the entries of a window ranks them. With level l and above, they make up the memory that the same
scores would have left at ratio 2 ** (l / 2), so a memory is nested: that of any higher ratio is a part of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LEVELS", "TOP_LEVEL", "kept_from", "level_of", "levels_of"]

LEVELS = 14  # part of the stored form, as the two that follow
TOP_LEVEL = LEVELS - 1  # that of ratio 90 and above, and of entries that are never left out, such as beacons
_STEPS = 2  # levels for each doubling of the ratio


def level_of(ratio: int) -> int:
    """Return the lowest level that belongs to the memory at a ratio; 0 for ratios 0 and 1, which keep everything."""
    return min(TOP_LEVEL, round(_STEPS * math.log2(max(1, ratio))))


def kept_from(level: int, tokens: int) -> int:
    """Return how many entries of each head of a window have a level or a higher one, in the mean over heads."""
    return math.ceil(tokens / 2 ** (level / _STEPS))


def levels_of(scores: Tensor, tokens: int) -> Tensor:
    """Return the level of each entry of a window by its rank among all of them, the highest score first.

    scores: [layers, kv_heads, slots]; the result is uint8 of the same shape. At ratio r a window of so many tokens
    keeps tokens / r entries for each head, rounded up, in the mean over all heads, or all that there are.
    """
    import torch  # here, so that ratios and levels are known without it

    heads = scores[..., 0].numel()
    ranked = torch.zeros(scores.numel(), dtype=torch.uint8, device=scores.device)
    for level in range(1, LEVELS):
        ranked[: heads * kept_from(level, tokens)] = level
    levels = torch.empty_like(ranked)
    levels[scores.flatten().argsort(descending=True, stable=True)] = ranked
    return levels.view(scores.shape)
