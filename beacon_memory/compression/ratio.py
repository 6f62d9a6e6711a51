"""How strongly a window, or a whole document, is compressed."""

from __future__ import annotations

from collections.abc import Sequence

from beacon_memory.config import BeaconConfig
from beacon_memory.errors import CapacityError, ConfigError, InputError
from beacon_memory.modeling.layout import slots_of

__all__ = ["AUTO_RATIOS", "auto_ratio", "positions_needed"]

AUTO_RATIOS = (2, 4, 8, 16, 32)


def window_ratios(tokens: int, ratio: int | Sequence[int], config: BeaconConfig) -> list[int]:
    """Return the ratio of each window of a document: one number for all, or a list with one for each.

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
    """Count the positions that a document takes: its slots, sink and `reserve`, or those to read a window."""
    slots, reading = config.beacon_sink_size, 0
    for number, ratio in enumerate(ratios):
        raw = min(config.beacon_window, tokens - config.beacon_window * number)
        own = slots_of(raw, ratio)
        # with full coverage a window's own beacons have positions among its raw tokens
        reading = max(reading, slots + raw + (own if ratio and config.beacon_attn == "full-coverage" else 0))
        slots += own
    return max(slots + reserve, reading)


def auto_ratio(tokens: int, config: BeaconConfig, max_positions: int, reserve: int) -> int:
    """Return the smallest ratio of 2 to 32 with which a document and `reserve` positions fit the model.

    Raises CapacityError, with the numbers, if not even 32 is enough.
    """
    ratios = [ratio for ratio in AUTO_RATIOS if ratio <= config.beacon_window] or [config.beacon_window]
    for ratio in ratios:
        if positions_needed(tokens, window_ratios(tokens, ratio, config), config, reserve) <= max_positions:
            return ratio
    raise CapacityError(too_long(tokens, ratios[-1], config, max_positions, reserve))


def too_long(tokens: int, ratio: int | Sequence[int], config: BeaconConfig, max_positions: int, reserve: int) -> str:
    """Say why a document does not fit, with the numbers, and what to do."""
    need = positions_needed(tokens, window_ratios(tokens, ratio, config), config, reserve)
    return (
        f"{tokens} tokens at ratio {ratio} need {need} positions ({reserve} of them for the conversation), but the "
        f"model has {max_positions}; use a higher ratio, or split the document"
    )
