"""The choice of a ratio for each window, for a sequence that is read as in training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import cycle, repeat

from beacon_memory.config import BeaconConfig

__all__ = ["adaptive_ratio", "mixed_ratios"]


def adaptive_ratio(config: BeaconConfig, tokens: int, max_positions: int) -> int:
    """Return the ratio that `adapt-N` takes for a sequence of `tokens` tokens, N included.

    It is the ratio with the smallest capacity that is enough, or the largest ratio if none is enough. The capacity of
    ratio r is (max_positions - window) r + window tokens, and that of no compression (r = 0) is max_positions.
    """

    def capacity(ratio: int) -> int:
        return (max_positions - config.beacon_window) * ratio + config.beacon_window if ratio else max_positions

    enough = [ratio for ratio in config.usable_ratios if capacity(ratio) >= tokens]
    return min(enough, key=capacity) if enough else max(config.usable_ratios)


def mixed_ratios(config: BeaconConfig, tokens: int, max_positions: int, seed: int | None = None) -> Iterator[int]:
    """Return an endless iterator of ratios, one for each new window, as `config.beacon_ratio_mix` says.

    tokens: length of the sequence. Without a `seed`, random ratios come from Python's global generator, so that
    `random.seed` makes them repeatable.
    """
    choices, mix = config.usable_ratios, config.beacon_ratio_mix
    if len(config.beacon_ratio) == 1:
        return repeat(choices[0])
    if mix == "sequence":
        return cycle(choices)
    if mix.startswith("adapt-"):
        return repeat(adaptive_ratio(config, tokens + int(mix.removeprefix("adapt-")), max_positions))
    choose = random.choice if seed is None else random.Random(seed).choice
    if mix == "instance-random":
        return repeat(choose(choices))
    return iter(lambda: choose(choices), None)
