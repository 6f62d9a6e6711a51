"""Devices: what their makers promise, how much of that is reached, and what an hour costs."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from beacon_memory.errors import ConfigError

from .estimates import Estimate

__all__ = ["Device", "Reach", "Speed", "devices", "uncalibrated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Describe a device; raises ConfigError for values that it cannot have.

    kind:      `gpu` or `cpu`: how much of the peak is assumed to be reached.
    flops:     FLOP/s of dense 16-bit matrix products, at most.
    bandwidth: bytes/s of its memory, at most.
    memory:    bytes.
    price:     of an hour, in whatever currency; None if it is not known.
    source:    of these numbers.
    """

    title: str
    kind: str
    flops: float
    bandwidth: float
    memory: float
    price: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _ASSUMED:
            raise ConfigError(f"kind={self.kind!r} of {self.title!r} must be one of {', '.join(_ASSUMED)}")
        for name in ("flops", "bandwidth", "memory"):
            value: object = getattr(self, name)  # of a file, so of any type
            if not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"{name}={value!r} of {self.title!r} must be a number above 0")
        price: object = self.price
        if price is not None and (not isinstance(price, (int, float)) or price < 0):
            raise ConfigError(f"price={price!r} of {self.title!r} must be a number of at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Say what a device reaches with this program.

    linear:    FLOP/s of products with weights, many tokens at a time.
    attention: FLOP/s of attention while a text is read.
    repeated:  the same while it is repeated to score its tokens, where the weights of attention are written out.
    moving:    numbers/s in and out of what is computed between products.
    bandwidth: bytes/s of weights and K/V while a token is generated.
    layer:     seconds of each layer in each pass, whatever it computes: starting kernels, and Python.
    load:      bytes/s of a stored memory, read, compared with its hashes, and brought to the device.
    """

    linear: float
    attention: float
    repeated: float
    moving: float
    bandwidth: float
    layer: float
    load: float


@dataclass(frozen=True, slots=True)
class Reach:
    """Hold the speeds of a device at best, likely, and at worst; weight_bytes: of a weight, as it computes."""

    best: Speed
    likely: Speed
    worst: Speed
    weight_bytes: int = 2

    def estimate(self, formula: Callable[[Speed], float]) -> Estimate:
        """Return a formula of the speed as an estimate."""
        likely, *others = (formula(speed) for speed in (self.likely, self.best, self.worst))
        return Estimate(min(likely, *others), likely, max(likely, *others))


# Assumptions, at best, likely and at worst, where nothing was measured: shares of the peak, seconds, bytes/s. Those of
# products with weights on GPUs are in the range of what is published (46 % of the peak in training PaLM,
# arXiv 2204.02311, and up to 76 % in its prefill, arXiv 2211.05102), lower for one request by stock modules.
_ASSUMED: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "gpu": {
        "linear": (0.6, 0.4, 0.2),
        "attention": (0.4, 0.2, 0.05),
        "repeated": (0.2, 0.08, 0.03),
        "moving": (0.85, 0.6, 0.4),
        "bandwidth": (0.85, 0.6, 0.4),
        "layer": (50e-6, 100e-6, 250e-6),
        "load": (3e9, 1e9, 0.4e9),
    },
    "cpu": {
        "linear": (0.6, 0.3, 0.1),
        "attention": (0.3, 0.1, 0.03),
        "repeated": (0.1, 0.04, 0.015),
        "moving": (0.8, 0.5, 0.25),
        "bandwidth": (0.8, 0.5, 0.25),
        "layer": (50e-6, 150e-6, 400e-6),
        "load": (2e9, 1e9, 0.4e9),
    },
}


_NUMBER = 2  # bytes of a number that is computed with


def uncalibrated(device: Device) -> Reach:
    """Return what a device may reach that was not measured: assumed shares of its peak."""
    assumed = _ASSUMED[device.kind]
    peaks = {"linear": device.flops, "attention": device.flops, "repeated": device.flops, "bandwidth": device.bandwidth}
    peaks["moving"] = device.bandwidth / _NUMBER
    best, likely, worst = (
        Speed(**{name: shares[which] * peaks.get(name, 1.0) for name, shares in assumed.items()}) for which in range(3)
    )
    return Reach(best, likely, worst)


def devices(file: Path | None = None) -> dict[str, Device]:
    """Return the devices that are known by their short names; file: TOML that adds some, or replaces them.

    Raises ConfigError, naming the device and what is wrong, for a file that cannot be read.
    """
    shipped = (files("beacon_memory.planning") / "hardware.toml").read_text(encoding="utf-8")
    found: dict[str, Any] = tomllib.loads(shipped)
    if file is not None:
        try:
            found |= tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read as TOML: {error}") from error
    return {name: _device(name, numbers) for name, numbers in found.items()}


def _device(name: str, numbers: object) -> Device:
    known = [one.name for one in fields(Device)]
    if not isinstance(numbers, dict) or not {"kind", "flops", "bandwidth", "memory"} <= numbers.keys() <= {*known}:
        raise ConfigError(f"the device {name!r} must be a table of {', '.join(known)}, got {numbers!r}")
    return Device(**{"title": name, **numbers})
