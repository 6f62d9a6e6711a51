"""How strongly a window, or a whole document, is compressed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import cycle, repeat

from .config import BeaconConfig
from .errors import CapacityError, ConfigError, InputError
from .layout import slots_of

__all__ = ["AUTO_RATIOS", "adaptive_ratio", "auto_ratio", "mixed_ratios", "positions_needed"]

AUTO_RATIOS = (2, 4, 8, 16, 32)


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


def window_ratios(tokens: int, ratio: int | Sequence[int], config: BeaconConfig) -> list[int]:
    """The ratio of each window of a document: one number for all, or a list with one for each.

    Raises InputError for a document without tokens, ConfigError for ratios that it cannot have.
    """
    if tokens == 0:
        raise InputError("the document is empty: there is nothing to compress")
    windows = -(-tokens // config.beacon_window)
    if not isinstance(ratio, Sequence):
        return [config.require_ratio(ratio)] * windows
    ratios = [config.require_ratio(one) for one in ratio]
    if len(ratios) != windows:
        raise ConfigError(
            f"ratio={list(ratio)!r} names {len(ratios)} windows, but {tokens} tokens make {windows} windows of "
            f"{config.beacon_window}"
        )
    return ratios


def positions_needed(tokens: int, ratios: Sequence[int], config: BeaconConfig, reserve: int) -> int:
    """Positions that a document takes: its slots with the sink and `reserve` behind them, or those to read a window."""
    slots, reading = config.beacon_sink_size, 0
    for number, ratio in enumerate(ratios):
        raw = min(config.beacon_window, tokens - config.beacon_window * number)
        own = slots_of(raw, ratio)
        # with full coverage a window's own beacons have positions among its raw tokens
        reading = max(reading, slots + raw + (own if ratio and config.beacon_attn == "full-coverage" else 0))
        slots += own
    return max(slots + reserve, reading)


def auto_ratio(tokens: int, config: BeaconConfig, max_positions: int, reserve: int) -> int:
    """The smallest ratio of 2 to 32 with which a document fits the model beside `reserve` positions for a conversation.

    Raises CapacityError, with the numbers, if not even 32 is enough.
    """
    ratios = [ratio for ratio in AUTO_RATIOS if ratio <= config.beacon_window] or [config.beacon_window]
    for ratio in ratios:
        if positions_needed(tokens, window_ratios(tokens, ratio, config), config, reserve) <= max_positions:
            return ratio
    raise CapacityError(too_long(tokens, ratios[-1], config, max_positions, reserve))


def too_long(tokens: int, ratio: int | Sequence[int], config: BeaconConfig, max_positions: int, reserve: int) -> str:
    """What to tell a user whose document does not fit."""
    need = positions_needed(tokens, window_ratios(tokens, ratio, config), config, reserve)
    return (
        f"{tokens} tokens at ratio {ratio} need {need} positions ({reserve} of them for the conversation), but the "
        f"model has {max_positions}; use a higher ratio, or split the document"
    )
