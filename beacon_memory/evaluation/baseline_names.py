"""The baselines by their names.

    full           the whole text, uncompressed
    none           no text
    base           the whole text in a prompt of the base model without LoRA
    truncated:R    the first 1/R of the text (where a continuation is scored: the last)
    bm25:R         the passages that match the question best, up to 1/R of the text, uncompressed; bm25 alone: R = 4
    beacon:R       beacons at ratio R
    select:R       K/V of the tokens that each head needs, 1/R of all
    select-expected:R   the same, chosen in one reading, by a probe
    hybrid:R       both, beacons and K/V of chosen tokens
    NAME:R         another compression method, by its registered name
    zoom:R         K/V of the passages that match the question best, up to 1/R of all, out of what `add` makes at ratio
                   2; they were read in their text, and stand one behind another, the best match last
    look:R         as zoom:R; where words do not tell, passages are found by the model's attention, too
    slice:R        as zoom:R, out of the K/V of all tokens
    nested:R       what select would have kept at ratio R, out of that memory; blind to the question
    beacon:R:N     beacon:R of a text cut into N documents, which are compressed one by one and then joined; likewise
                   all others that compress the text, from beacon:R to nested:R
    beacon:R@int8, beacon:R@int4   beacon:R with quantized K/V; likewise select, select-expected and hybrid, also with N
    expected:R, snapkv:R, kvzip:R   1/R of the text's K/V, selected by ExpectedAttention, SnapKV or KVzip of the package
                   kvpress
    cskv:R         K/V of all tokens in 1/R of the numbers, by low rank as in CSKV, at its best

R is the number of tokens of the text for each slot of K/V, so all baselines with the same R have the same K/V budget,
except those that are quantized.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial

from transformers import PreTrainedModel

from beacon_memory.compression.methods.registry import names as method_names
from beacon_memory.documents import Precision
from beacon_memory.errors import InputError
from beacon_memory.modeling.model import BeaconModel

from .baselines import Baseline, Compressed, NoText, Retrieved, Truncated, Zoomed
from .low_rank import LowRank
from .presses import PRESSES, Selected, stock_model
from .untouched import Untouched

__all__ = ["baselines"]

_PLAIN = ("full", "none", "base", "truncated:R", "bm25", "bm25:R", "cskv:R")
_ZOOMED = ("zoom", "look", "slice", "nested")
_BITS = {one.value: one.bits for one in Precision if one.quantized}


def baselines(names: Sequence[str], model: BeaconModel) -> list[Baseline]:
    """Make the baselines with these names, on one model.

    Raises InputError, before anything is loaded, if there are no names, or if a name is unknown or occurs twice.
    """
    parsed = {name: _parse(name) for name in names}
    if not 0 < len(names) == len(parsed):
        raise InputError(f"baselines {list(names)!r}: name one or more, each once, of {', '.join(_names())}")
    stock = cache(lambda: stock_model(model))  # loaded once for all presses, and only if there is one
    found = [_baseline(name, *parts, model, stock) for name, parts in parsed.items()]
    by_reading = defaultdict(list)
    for one in found:
        if isinstance(one, Compressed):
            by_reading[one.reads].append(one)
    for group in by_reading.values():
        if len(group) > 1:
            Compressed.share_reading(group)
    return found


def _compressed() -> tuple[str, ...]:
    """Return the baselines that compress a text: one for each method."""
    return (*method_names(), "select-expected")


def _names() -> tuple[str, ...]:
    compressed = (f"{name}{numbers}" for name in (*_compressed(), *_ZOOMED) for numbers in (":R", ":R:N"))
    return (*_PLAIN, *compressed, *(f"{name}:R" for name in PRESSES))


def _parse(name: str) -> tuple[str, list[int], int | None]:
    """Split a name into kind, numbers and bits."""
    plain, at, precision = name.partition("@")
    kind, *texts = plain.split(":")
    forms = [form.split(":") for form in _names()]
    numbers = [int(text) for text in texts if text.isascii() and text.isdigit() and int(text)]
    if (
        len(numbers) < len(texts)
        or not any(form[0] == kind and len(form) == 1 + len(texts) for form in forms)
        or (at and (precision not in _BITS or kind not in _compressed()))
    ):
        raise InputError(
            f"baseline {name!r} must be one of {', '.join(_names())}, with whole numbers for R and N; "
            f"{', '.join(_compressed())} may be followed by @{' or @'.join(_BITS)}"
        )
    return kind, numbers, _BITS.get(precision)


def _baseline(
    name: str,
    kind: str,
    numbers: list[int],
    bits: int | None,
    model: BeaconModel,
    stock: Callable[[], PreTrainedModel],
) -> Baseline:
    if kind in PRESSES:
        return Selected(name, model, stock(), kind, *numbers)
    by_kind: dict[str, Callable[..., Baseline]] = {
        **{one: partial(Compressed, name, model, one, bits=bits) for one in method_names()},
        "select-expected": partial(Compressed, name, model, "select", bits=bits, score="expected"),
        "full": lambda: Truncated(name, model, 1),
        "none": lambda: NoText(name, model),
        "base": lambda: Untouched(name, model),
        "truncated": lambda ratio: Truncated(name, model, ratio),
        "bm25": lambda ratio=4: Retrieved(name, model, ratio),
        "cskv": partial(LowRank, name, model),
        "zoom": partial(Zoomed, name, model),
        "look": partial(Zoomed, name, model, looks=True),
        "slice": partial(Zoomed, name, model, rich=1),
        "nested": partial(Zoomed, name, model, blind=True),
    }
    return by_kind[kind](*numbers)
