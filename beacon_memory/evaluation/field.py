"""The field of baselines: who is called what.

    full           the whole text, uncompressed
    none           no text
    base           the whole text in a prompt of the base model without LoRA
    truncated:R    the first 1/R of the text (where a continuation is scored: the last)
    bm25:R         the passages that match the question best, up to 1/R of the text, uncompressed; bm25 alone: R = 4
    beacon:R       beacons at ratio R
    select:R       K/V of the tokens that each head needs, 1/R of all
    select-expected:R   the same, chosen by the cheaper score
    hybrid:R       both, beacons and K/V of chosen tokens
    beacon:R:N     the same, the text cut into N documents that are compressed alone and composed; so for the others
    beacon:R@int8, beacon:R@int4   the same, the K/V of each document quantized; so for the others, also with N
    expected:R, snapkv:R, kvzip:R   1/R of the text's K/V, selected by ExpectedAttention, SnapKV or KVzip as the package
                   kvpress has them

R counts tokens of text for each slot of K/V, so all baselines with one R have the same K/V budget, but for those that
are quantized.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial

from transformers import PreTrainedModel

from beacon_memory.config import COMPRESSIONS
from beacon_memory.documents import Precision
from beacon_memory.errors import InputError
from beacon_memory.modeling.model import BeaconModel

from .baselines import Baseline, Compressed, NoText, Retrieved, Truncated
from .presses import PRESSES, Selected, stock_model
from .untouched import Untouched

__all__ = ["baselines"]

_COMPRESSED = (*COMPRESSIONS, "select-expected")
_NAMES = (
    *("full", "none", "base", "truncated:R", "bm25", "bm25:R"),
    *(f"{name}{numbers}" for name in _COMPRESSED for numbers in (":R", ":R:N")),
    *(f"{name}:R" for name in PRESSES),
)
_BITS = {one.value: one.bits for one in Precision if one.quantized}


def baselines(names: Sequence[str], model: BeaconModel) -> list[Baseline]:
    """The baselines of these names, on one model.

    Raises InputError, before anything is loaded, if there are none, or for a name that is not known or there twice.
    """
    parsed = {name: _parse(name) for name in names}
    if not 0 < len(names) == len(parsed):
        raise InputError(f"baselines {list(names)!r}: name one or more, each once, of {', '.join(_NAMES)}")
    stock = cache(lambda: stock_model(model))  # one for all presses, and only if there is one
    field = [_baseline(name, *parts, model, stock) for name, parts in parsed.items()]
    alike = defaultdict(list)
    for one in field:
        if isinstance(one, Compressed):
            alike[one.name.partition("@")[0]].append(one)
    for group in alike.values():
        if len(group) > 1:
            Compressed.share_reading(group)
    return field


def _parse(name: str) -> tuple[str, list[int], int | None]:
    """Kind, numbers and bits."""
    plain, at, precision = name.partition("@")
    kind, *texts = plain.split(":")
    forms = [form.split(":") for form in _NAMES]
    numbers = [int(text) for text in texts if text.isascii() and text.isdigit() and int(text)]
    if (
        len(numbers) < len(texts)
        or not any(form[0] == kind and len(form) == 1 + len(texts) for form in forms)
        or (at and (precision not in _BITS or kind not in _COMPRESSED))
    ):
        raise InputError(
            f"baseline {name!r} must be one of {', '.join(_NAMES)}, with whole numbers for R and N; "
            f"{', '.join(_COMPRESSED)} may be followed by @{' or @'.join(_BITS)}"
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
    made: dict[str, Callable[..., Baseline]] = {
        "full": lambda: Truncated(name, model, 1),
        "none": lambda: NoText(name, model),
        "base": lambda: Untouched(name, model),
        "truncated": lambda ratio: Truncated(name, model, ratio),
        "bm25": lambda ratio=4: Retrieved(name, model, ratio),
        **{one: partial(Compressed, name, model, one, bits=bits) for one in COMPRESSIONS},
        "select-expected": partial(Compressed, name, model, "select", bits=bits, score="expected"),
    }
    return made[kind](*numbers)
