from __future__ import annotations

import pytest
import torch
from kv_samples import sample

from beacon_memory.documents import Precision
from beacon_memory.errors import InputError
from beacon_memory.storage.files.stored_kv import not_finite, precision_of, stored_bytes, with_precision


@pytest.mark.parametrize(("now", "wanted"), [(now, wanted) for now in Precision for wanted in Precision])
def test_kv_are_kept_in_any_precision_that_they_still_have(now: str, wanted: str) -> None:
    kv = with_precision(sample(dtype=torch.float32)[1], now)
    bits = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}
    if now.startswith("int") and bits[wanted] > bits[now]:
        with pytest.raises(InputError, match=f"{now} K/V hold no more than that: to keep them as {wanted}, compress"):
            with_precision(kv, wanted)
        return
    converted = with_precision(kv, wanted)
    assert precision_of(converted) == wanted
    assert (converted is kv) == (now == wanted)
    assert torch.equal(converted.positions, kv.positions)
    assert (stored_bytes(converted) < stored_bytes(kv)) == (bits[wanted] < bits[now])
    with pytest.raises(InputError, match="precision='int2' must be one of"):
        with_precision(kv, "int2")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])  # others cannot be made of them
@pytest.mark.parametrize("tensor", ["keys", "values"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_found_in_any_precision(precision: str, tensor: str, value: float) -> None:
    kv = sample(dtype=torch.float32)[1]
    assert not_finite(with_precision(kv, precision)) is None
    getattr(kv, tensor)[7, 2] = value
    flaw = not_finite(with_precision(kv, precision))
    assert flaw is not None
    assert tensor[:-1] in flaw
    assert f"kept in {precision}, hold NaN or infinity" in flaw
