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
_SAMPLING = ("temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Values that transformers would refuse only in the middle of generating, or not at all: type, least and most.
_RANGES: dict[str, tuple[Any, float, float]] = {
    "max_new_tokens": (int, 1, math.inf),
    "min_new_tokens": (int, 0, math.inf),
    "num_beams": (int, 1, math.inf),
    "num_return_sequences": (int, 1, math.inf),
    "no_repeat_ngram_size": (int, 0, math.inf),
    "temperature": (int | float, 0, math.inf),
    "top_k": (int, 0, math.inf),
    **dict.fromkeys(("top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), (int | float, 0, 1)),
}
_FLAGS = ("do_sample", "remove_invalid_values", "renormalize_logits")
_TOKENS = ("bos_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id", "pad_token_id")
# The options of transformers that decide which tokens are generated and where an answer ends. The others are about how
# it is computed and in what form it comes: they cannot be combined with a memory, which is the cache, or change the
# model, and are neither taken nor read from the files of a checkpoint.
_OPTIONS = frozenset(
    [
        *_RANGES,
        *_FLAGS,
        *_TOKENS,
        "bad_words_ids",
        "begin_suppress_tokens",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "exponential_decay_length_penalty",
        "guidance_scale",
        "length_penalty",
        "max_time",
        "repetition_penalty",
        "sequence_bias",
        "stop_strings",
        "suppress_tokens",
        "watermarking_config",
    ]
)


class _Settled(GenerationConfig):
    """Settings that `generate` does not fill up from those of the model: what they leave out stays so."""

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Update as the base class, but for the call by which `generate` fills up."""
        if defaults_only and allow_custom_entries:
            return kwargs
        unused: dict[str, Any] = super().update(defaults_only, allow_custom_entries, **kwargs)  # type: ignore[no-untyped-call]
        return unused


def generation_config(
    model: BeaconModel, stop: str | Sequence[str] | None, options: Mapping[str, Any]
) -> GenerationConfig:
    """Return the model's own generation settings, changed by `options`, which are named as in transformers.

    stop: text, or texts, that end the answer. A sampling option (temperature, top_p, top_k, min_p, ...) switches
    sampling on unless `do_sample` is given; temperature 0 means greedy decoding. Raises InputError for an unknown
    option, and for a value that cannot be used.
    """
    chosen = {name: value for name, value in options.items() if value is not None or name != "max_new_tokens"}
    chosen = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, **chosen}
    for stops in (chosen.pop("stop_strings", None), stop):
        if stops is not None and (checked := _checked_stops(stops)):
            chosen["stop_strings"] = checked
    if chosen.get("temperature") == 0:
        chosen |= {"temperature": None, "do_sample": False}
    elif any(chosen.get(name) is not None for name in _SAMPLING):
        chosen.setdefault("do_sample", True)
    _check_values(chosen)
    if unknown := chosen.keys() - _OPTIONS:
        named = ", ".join(f"{name}={chosen[name]!r}" for name in sorted(unknown))
        raise InputError(
            f"unknown generation options: {named}; known are those of transformers that decide which tokens come and "
            "where an answer ends"
        )
    own = {name: value for name, value in model.base.generation_config.to_dict().items() if name in _OPTIONS}
    try:
        settings = {**own, **chosen, "use_cache": True, "return_dict_in_generate": False}
        config = _Settled(**settings)  # type: ignore[no-untyped-call]  # as the base class is
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"these generation options cannot be used: {error}") from error
    if isinstance(config.stop_strings, str):  # as a checkpoint's own settings may name one
        config.stop_strings = [config.stop_strings]
    return config


def _check_values(chosen: Mapping[str, Any]) -> None:
    """Raise InputError for a value that transformers would refuse late, or take for another."""
    given = {name: value for name, value in chosen.items() if value is not None}
    for name, (kind, least, most) in _RANGES.items():
        value = given.get(name, least)
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            raise InputError(
                f"{name}={value!r} must be {'a whole number' if kind is int else 'a number'} from {least} to {most}"
            )
    for name in given.keys() & {*_FLAGS}:
        if not isinstance(given[name], bool):
            raise InputError(f"{name}={given[name]!r} must be True or False")
    for name in given.keys() & {*_TOKENS}:
        ids = given[name] if name == "eos_token_id" and isinstance(given[name], list) else [given[name]]
        if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
            raise InputError(f"{name}={given[name]!r} must be the number of a token")


def _checked_stops(stop: object) -> list[str]:
    """Return stop strings as a list; raises InputError for what is none."""
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(one, str) and one for one in stops):
        raise InputError(f"stop={stop!r} must be a text, or texts, at which the answer ends; none of them empty")
    check_utf8(stops, "stop")
    return list(stops)
