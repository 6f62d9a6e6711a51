"""The speeds that this machine was measured to reach, in a small file that later plans use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs

from beacon_memory.errors import ConfigError, InputError

from .hardware import Device, Reach, Speed

__all__ = ["Calibration", "calibration_file", "read_calibration", "write_calibration"]

_FORMAT = 1
_OFF = 1.3  # by which factor a prediction for another model is expected to be off at most, see docs/planning.md


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Hold what was measured on a machine.

    machine:      which one, and with which versions.
    device:       where it computed, `cpu` or another.
    memory:       bytes of the device, or of RAM.
    weight_bytes: bytes of a weight, as it computed.
    waited:       seconds by the clock over those that the threads computed; well above 1, others were using the
                  machine, and it seems as many times slower. 1 of a device that is no processor.
    seconds:      that measuring took.
    measured_at:  ISO 8601, UTC.
    """

    speed: Speed
    machine: str
    device: str
    memory: float
    weight_bytes: int
    waited: float
    seconds: float
    measured_at: str

    @property
    def reach(self) -> Reach:
        """The speeds that plans take: as measured, and off by as much as another model may differ."""
        return Reach(_scaled(self.speed, _OFF), self.speed, _scaled(self.speed, 1 / _OFF), self.weight_bytes)

    def described(self, price: float | None) -> Device:
        """Return the machine as a device; its peaks are what was reached."""
        return Device(
            title=f"this machine ({self.machine})",
            kind="cpu" if self.device == "cpu" else "gpu",
            flops=self.speed.linear,
            bandwidth=self.speed.bandwidth,
            memory=self.memory,
            price=price,
            source=f"measured {self.measured_at}",
        )


def _scaled(speed: Speed, factor: float) -> Speed:
    values = {name: value * factor for name, value in asdict(speed).items() if name != "layer"}
    return replace(speed, **values, layer=speed.layer / factor)


def calibration_file() -> Path:
    """Return where the last calibration lies, in the user's cache folder."""
    return platformdirs.user_cache_path("beacon-memory") / "calibration.json"


def write_calibration(calibration: Calibration) -> Path:
    """Keep a calibration in place of the last one; returns its file."""
    file = calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"format": _FORMAT, **asdict(calibration)}, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
    return file


def read_calibration() -> Calibration:
    """Return the last calibration; raises InputError if there is none, ConfigError if its file cannot be read."""
    file = calibration_file()
    try:
        fields: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if fields["format"] != _FORMAT:
            raise ValueError(f"its format is {fields['format']}, not {_FORMAT}")
        known = {name: value for name, value in fields.items() if name not in ("format", "speed")}
        return Calibration(speed=Speed(**fields["speed"]), **known)
    except FileNotFoundError:
        raise InputError(
            "this machine was not measured yet: run `beacon-memory plan --calibrate`, or name a device with --hardware"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error!r}); `beacon-memory plan --calibrate` writes it anew"
        ) from error
