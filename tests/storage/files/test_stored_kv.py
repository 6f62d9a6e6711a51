from __future__ import annotations

import pytest
import torch
from kv_samples import sample

from beacon_memory.documents import Precision
from beacon_memory.errors import InputError
from beacon_memory.storage.files.stored_kv import precision_of, stored_bytes, with_precision


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
