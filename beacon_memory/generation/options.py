"""Generation options, checked before anything is generated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig

from beacon_memory.documents import check_utf8
from beacon_memory.errors import InputError
from beacon_memory.modeling.model import BeaconModel

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "generation_config"]
DEFAULT_MAX_NEW_TOKENS = 256
# Values that transformers would refuse only in the middle of generating, or not at all: type, least and most.
_RANGES: dict[str, tuple[Any, float, float]] = {
    "max_new_tokens": (int, 1, math.inf),
    "num_beams": (int, 1, math.inf),
    "num_return_sequences": (int, 1, math.inf),
    "temperature": (int | float, 0, math.inf),
    "top_k": (int, 0, math.inf),
    "top_p": (int | float, 0, 1),
}


def generation_config(
    model: BeaconModel, stop: str | Sequence[str] | None, options: Mapping[str, Any]
) -> GenerationConfig:
    """Return the model's own generation settings, changed by `options`, which are named as in transformers.

    stop: text, or texts, that end the answer. A sampling option (temperature, top_p, top_k, min_p, typical_p) switches
    sampling on unless `do_sample` is given; temperature 0 means greedy decoding. Raises InputError for an unknown
    option, and for a value that cannot be used.
    """
    chosen = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, **options}
    for stops in (chosen.pop("stop_strings", None), stop):
        if stops is not None and (checked := _checked_stops(stops)):
            chosen["stop_strings"] = checked
    if chosen.get("temperature") == 0:
        chosen |= {"temperature": None, "do_sample": False}
    elif any(chosen.get(name) is not None for name in ("temperature", "top_p", "top_k", "min_p", "typical_p")):
        chosen.setdefault("do_sample", True)
    for name, (kind, least, most) in _RANGES.items():
        value = chosen.get(name)
        if value is not None and not (isinstance(value, kind) and least <= value <= most):
            raise InputError(
                f"{name}={value!r} must be {'a whole number' if kind is int else 'a number'} from {least} to {most}"
            )
    config = GenerationConfig.from_dict(model.base.generation_config.to_dict())
    try:
        unknown = config.update(**chosen)
        config.validate()
    except ValueError as error:
        raise InputError(f"these generation options cannot be used: {error}") from error
    if unknown:
        raise InputError(f"unknown generation options: {', '.join(f'{k}={v!r}' for k, v in unknown.items())}")
    if isinstance(config.stop_strings, str):  # as a checkpoint's own settings may name one
        config.stop_strings = [config.stop_strings]
    return config


def _checked_stops(stop: object) -> list[str]:
    """Return stop strings as a list; raises InputError for what is none."""
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(one, str) and one for one in stops):
        raise InputError(f"stop={stop!r} must be a text, or texts, at which the answer ends; none of them empty")
    check_utf8(stops, "stop")
    return list(stops)
