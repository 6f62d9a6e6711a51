"""Which ratio each window takes while a sequence is read in the published way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import cycle, repeat

from beacon_memory.config import BeaconConfig

__all__ = ["adaptive_ratio", "mixed_ratios"]


def adaptive_ratio(config: BeaconConfig, tokens: int, max_positions: int) -> int:
    """The ratio that `adapt-N` takes for a sequence of `tokens` (N included).

    The smallest capacity that is enough, where ratio r has capacity (max_positions - window) r + window, and no
    compression (r = 0) has max_positions; if none is enough, the largest ratio.
    """

    def capacity(ratio: int) -> int:
        return (max_positions - config.beacon_window) * ratio + config.beacon_window if ratio else max_positions

    enough = [ratio for ratio in config.usable_ratios if capacity(ratio) >= tokens]
    return min(enough, key=capacity) if enough else max(config.usable_ratios)


def mixed_ratios(config: BeaconConfig, tokens: int, max_positions: int, seed: int | None = None) -> Iterator[int]:
    """Endless ratios, one for each new window, as `config.beacon_ratio_mix` says; `tokens` are at hand already.

    Without a `seed`, random ones are drawn from Python's global generator, which `random.seed` makes repeatable.
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
