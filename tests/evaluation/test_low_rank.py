from __future__ import annotations

import pytest
import torch

from beacon_memory.evaluation.low_rank import low_rank
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV

LAYERS, HEADS, TOKENS, DIM = 2, 3, 200, 8
WIDTH = HEADS * DIM


def memory(rank: int, seed: int = 0) -> MemoryKV:
    """K/V that are of a rank in each layer; keys of layer 1 weigh more, which must not matter."""
    draw = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(2):
        codes = torch.randn(LAYERS, TOKENS, rank, generator=draw)
        joined = codes @ torch.randn(LAYERS, rank, WIDTH, generator=draw)
        parts.append(joined.view(LAYERS, TOKENS, HEADS, DIM).transpose(1, 2))
    return MemoryKV.of(BeaconKV(parts[0] * torch.tensor([1.0, 50.0])[:, None, None, None], parts[1]))


def error(found: MemoryKV, whole: MemoryKV) -> float:
    pairs = ((found.keys, whole.keys), (found.values, whole.values))
    return sum(((one - other).square().sum() / other.square().sum()).item() for one, other in pairs)


@pytest.mark.parametrize("slots", [40, 100, TOKENS])
def test_what_has_a_low_rank_is_given_back(slots: int) -> None:
    whole = memory(rank=3)
    found, numbers = low_rank(whole, slots)
    assert error(found, whole) < 1e-6
    assert numbers <= slots * LAYERS * 2 * WIDTH


def test_the_whole_budget_gives_everything_back_and_less_of_it_less() -> None:
    whole = memory(rank=WIDTH)
    errors = [error(low_rank(whole, slots)[0], whole) for slots in (TOKENS, 100, 50, 20)]
    assert errors[0] < 1e-6
    assert errors == sorted(errors)
    assert errors[1] > 0.01
    assert low_rank(whole, TOKENS)[1] == TOKENS * LAYERS * 2 * WIDTH


def test_the_last_tokens_are_kept_whole() -> None:
    whole = memory(rank=WIDTH)
    found, _ = low_rank(whole, 60)
    same = (found.keys == whole.keys).all(1).view(LAYERS, HEADS, TOKENS).all(0).all(0)
    assert same.tolist() == [False] * (TOKENS - 15) + [True] * 15


def test_no_matrix_of_the_same_rank_loses_less() -> None:
    whole, slots = memory(rank=WIDTH), 100
    found, numbers = low_rank(whole, slots)
    of_another, _ = low_rank(memory(rank=WIDTH, seed=1), slots)
    ranks = (numbers // LAYERS - 25 * 2 * WIDTH) // (TOKENS - 25)
    values = whole.values.view(LAYERS, HEADS, TOKENS, DIM).transpose(1, 2).flatten(2)
    other = of_another.values.view(LAYERS, HEADS, TOKENS, DIM).transpose(1, 2).flatten(2)
    _, bases = torch.linalg.eigh(other.mT @ other)
    lost = values - values @ bases[..., -ranks:] @ bases[..., -ranks:].mT
    own = (found.values - whole.values).view(LAYERS, HEADS, TOKENS, DIM).square().sum((1, 2, 3))
    assert (own < lost.square().sum((1, 2))).all()
