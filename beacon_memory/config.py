"""The settings of a beacon adapter, under the key names of the published checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError

__all__ = ["METHOD_NAME", "BeaconConfig"]

# How a compression method may be called; `auto` is left to the choice among them. Whether there is a method of this
# name is known where a text is compressed: what it compressed can be read without it.
METHOD_NAME = re.compile(r"(?!auto$)[a-z][a-z0-9_.-]{0,63}", re.ASCII)

PROJECTIONS = ("q", "k", "v", "o")

# Values of keys that a published checkpoint leaves out, and keys that can have only one value.
_PUBLISHED_DEFAULTS: dict[str, Any] = {
    "beacon_attn": "full-coverage",
    "beacon_embed": "learned",
    "beacon_placement": "end",
    "beacon_param": [],
    "beacon_sink_size": 0,
}
_FIXED: dict[str, Any] = {"beacon_pos": "interleave"}
# Keys of the published code that have no effect here: how it groups windows, and a switch that full coverage ignores.
_WITHOUT_EFFECT: dict[str, Any] = {"beacon_parallel_window": 1, "beacon_attend_prev": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class BeaconConfig:
    """The settings by which a text is cut into windows and compressed into beacons.

    beacon_window:    length of a window, in raw tokens; tokens of one window attend to each other.
    beacon_ratio:     the ratios (raw tokens per beacon) the adapter was trained with; 0 keeps the raw tokens' K/V.
    beacon_ratio_mix: how windows choose among these ratios in training: `step-random` (at random for each window),
                      `instance-random` (at random, the same for all windows of a sequence), `sequence` (one after the
                      other) or `adapt-N` (the smallest with which the sequence and N more tokens fit the model's
                      positions).
    beacon_param:     the projections that beacons have of their own, among q, k, v, o.
    beacon_attn:      `hidden`: raw tokens do not see the beacons of their own window and positions count raw tokens;
                      `full-coverage` (the paper): they do, and beacons count too.
    beacon_embed:     `last-token`: a beacon's input is the embedding of the token before it plus a trained offset;
                      `learned` (the paper): one trained vector.
    beacon_embed_init: the token whose embedding a `learned` vector starts from, `eos` or `bos`.
    beacon_placement: `end`: a beacon comes after its unit; `salient`: after the most informative token of its unit;
                      `salient-words`: there are as many beacons as units, but they come after the tokens of the most
                      informative words of the whole window.
    beacon_sink_size: number of first tokens whose K/V are kept uncompressed, before the rest of the memory.
    beacon_compression: the method by which a text is compressed where nobody says otherwise: `beacon`, `select` (K/V
                      of chosen tokens), `hybrid` (both), the name of an installed one, or `auto`: `beacon` with trained
                      beacons, `select` without.
    beacon_dense_ratio: a `beacon` memory at this ratio or a higher one is read with beacons at this one, of which each
                      head keeps those that it needs; 0 for beacons at the ratio itself, all of them in every head, as
                      in the paper.
    beacon_hybrid_factor: a `hybrid` memory at ratio r has beacons at this multiple of r, and chosen tokens in the
                      slots that are left.

    Raises ConfigError, which names key and value, for a value that is not allowed.
    """

    beacon_window: int = 1024
    beacon_ratio: tuple[int, ...] = (2, 4, 8, 16, 32)
    beacon_ratio_mix: str = "step-random"
    beacon_param: tuple[str, ...] = ("q", "k", "v")
    beacon_attn: str = "hidden"
    beacon_embed: str = "last-token"
    beacon_embed_init: str = "eos"
    beacon_placement: str = "end"
    beacon_sink_size: int = 1
    beacon_compression: str = "auto"
    beacon_dense_ratio: int = 0
    beacon_hybrid_factor: int = 4

    def __post_init__(self) -> None:
        _require_int("beacon_window", self.beacon_window, least=1)
        _require_int("beacon_sink_size", self.beacon_sink_size, least=0)
        _require_int("beacon_dense_ratio", self.beacon_dense_ratio, least=0)
        _require_int("beacon_hybrid_factor", self.beacon_hybrid_factor, least=2)
        if self.beacon_sink_size > self.beacon_window:
            raise ConfigError(
                f"beacon_sink_size={self.beacon_sink_size} must not exceed beacon_window={self.beacon_window}"
            )
        object.__setattr__(self, "beacon_ratio", _as_tuple("beacon_ratio", self.beacon_ratio))
        object.__setattr__(self, "beacon_param", _as_tuple("beacon_param", self.beacon_param))
        if not self.beacon_ratio:
            raise ConfigError("beacon_ratio=() must name at least one ratio, for example [2, 4, 8, 16, 32]")
        for ratio in self.beacon_ratio:
            self.require_ratio(ratio)
        if any(self.beacon_param.count(one) > 1 or one not in PROJECTIONS for one in self.beacon_param):
            raise ConfigError(f"beacon_param={list(self.beacon_param)!r} must hold each of q, k, v, o at most once")
        for name, choices in {
            "beacon_attn": ("hidden", "full-coverage"),
            "beacon_embed": ("last-token", "learned"),
            "beacon_embed_init": ("eos", "bos"),
            "beacon_placement": ("end", "salient", "salient-words"),
        }.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, choices))}")
        compression = self.beacon_compression
        if compression != "auto" and not METHOD_NAME.fullmatch(str(compression)):
            raise ConfigError(
                f"beacon_compression={compression!r} must be 'auto' or the name of a method, such as 'select': "
                "lower-case letters, digits, '_', '.' and '-' after a letter"
            )
        mix = self.beacon_ratio_mix
        if mix not in ("step-random", "instance-random", "sequence") and not re.fullmatch(r"adapt-\d+", str(mix)):
            raise ConfigError(
                f"beacon_ratio_mix={mix!r} must be 'step-random', 'instance-random', 'sequence' or 'adapt-N' "
                "with a number of tokens N"
            )

    def require_ratio(self, ratio: object) -> int:
        """Return `ratio`; raises ConfigError if it is none. A ratio above the window gives one beacon per window."""
        return _require_int("beacon_ratio", ratio, least=0)

    @property
    def usable_ratios(self) -> tuple[int, ...]:
        """Return the ratios that a mix can choose: those that divide the window; a single ratio always can be."""
        if len(self.beacon_ratio) == 1:
            return self.beacon_ratio
        dividing = tuple(r for r in self.beacon_ratio if r == 0 or self.beacon_window % r == 0)
        if not dividing:
            raise ConfigError(
                f"beacon_ratio={list(self.beacon_ratio)} has no ratio that divides beacon_window={self.beacon_window}"
            )
        return dividing

    def to_dict(self) -> dict[str, Any]:
        """Return all settings under their published names, as values that can be written as JSON."""
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        settings |= {"beacon_ratio": list(self.beacon_ratio), "beacon_param": list(self.beacon_param)}
        return settings | {"beacon_stride": self.beacon_window} | _FIXED | _WITHOUT_EFFECT

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> BeaconConfig:
        """Read the `beacon_*` keys of a config.json or beacon.json; other keys are ignored.

        A missing key has the default of the published checkpoints (`full-coverage`, `learned`, no own projections, no
        sink). Raises ConfigError for an unknown `beacon_*` key and for a value that is not allowed.
        """
        given = {k: v for k, v in settings.items() if k.startswith("beacon_") and k not in _WITHOUT_EFFECT}
        stride = given.pop("beacon_stride", None)
        for key, value in _FIXED.items():
            if given.pop(key, value) != value:
                raise ConfigError(f"{key}={settings[key]!r} is not supported, only {value!r} is")
        known = {f.name for f in fields(cls)}
        for key in sorted(given.keys() - known):
            if given.pop(key) is not None:  # a switch that is off asks for nothing
                raise ConfigError(f"unknown key {key!r} with value {settings[key]!r}")
        config = cls(**(_PUBLISHED_DEFAULTS | given))
        if stride not in (None, config.beacon_window):
            raise ConfigError(
                f"beacon_stride={stride!r} must equal beacon_window={config.beacon_window}: overlapping windows "
                "are not supported"
            )
        return config


def _require_int(name: str, value: object, *, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
    return value


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name}={value!r} must be a list")
    return tuple(value)
