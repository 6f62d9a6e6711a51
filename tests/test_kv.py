from __future__ import annotations

import pytest
import torch

from beacon_memory.errors import InputError
from beacon_memory.kv import BeaconKV


def some_kv(slots: int, *, dtype: torch.dtype = torch.float32) -> BeaconKV:
    return BeaconKV(torch.randn(2, 3, slots, 4).to(dtype), torch.randn(2, 3, slots, 4).to(dtype))


def test_parts_are_put_one_after_another() -> None:
    parts = [some_kv(2), BeaconKV.empty(2, 3, 4), some_kv(5)]
    whole = BeaconKV.concat(parts)
    assert whole.slots == 7
    assert torch.equal(whole[:2].keys, parts[0].keys)
    assert torch.equal(whole[2:].values, parts[2].values)


def test_slots_are_chosen_by_slice_or_by_number() -> None:
    kv = some_kv(6)
    assert torch.equal(kv[1:5:2].keys, kv.keys[:, :, [1, 3]])
    assert torch.equal(kv[torch.tensor([5, 0])].values, kv.values[:, :, [5, 0]])
    assert kv[:0].slots == 0


def test_one_part_is_handed_back_as_it_is() -> None:
    kv = some_kv(3)
    assert BeaconKV.concat([kv]) is kv


def test_no_part_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        BeaconKV.concat([])


@pytest.mark.parametrize(("keys", "values"), [((2, 3, 4), (2, 3, 4)), ((2, 3, 5, 4), (2, 3, 6, 4))])
def test_other_shapes_are_refused_and_named(keys: tuple[int, ...], values: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(2, 3, .*\) and \(2, 3, "):
        BeaconKV(torch.ones(keys), torch.ones(values))


def test_bytes_are_those_of_keys_and_values() -> None:
    assert some_kv(5).nbytes == 2 * (2 * 3 * 5 * 4) * 4
    assert some_kv(5).to(dtype=torch.bfloat16).nbytes == 2 * (2 * 3 * 5 * 4) * 2
    assert BeaconKV.empty(2, 3, 4).nbytes == 0
