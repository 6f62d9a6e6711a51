import pytest
import torch
from kv_samples import memory, stack

from beacon_memory.compression.selection import best
from beacon_memory.kv.levels import LEVELS, TOP_LEVEL, level_of, levels_of
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.layout import slots_of


@pytest.mark.parametrize("ratio", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 7, 64, 100])
def test_entries_from_a_level_on_are_those_that_the_scores_leave_at_its_ratio(ratio, tokens):
    scores = torch.randn(2, 3, tokens)

    levels = levels_of(scores, tokens)

    assert torch.equal(levels >= level_of(ratio), best(scores, slots_of(tokens, ratio)))


@pytest.mark.parametrize("ratio", [2, 4, 8, 32])
def test_where_there_are_fewer_entries_than_tokens_the_ratio_is_that_of_the_tokens(ratio):
    scores = torch.randn(2, 3, 32)

    levels = levels_of(scores, 64)

    assert torch.equal(levels >= level_of(ratio), best(scores, slots_of(64, ratio)))


def test_equal_scores_are_ranked_in_the_order_of_layers_heads_and_tokens():
    levels = levels_of(torch.zeros(1, 2, 64), 64).flatten().tolist()

    assert levels == sorted(levels, reverse=True)
    assert (levels[0], levels[-1]) == (TOP_LEVEL, 0)


def test_level_of_a_ratio_is_bounded():
    assert [level_of(ratio) for ratio in (0, 1, 2, 4, 1 << 20)] == [0, 0, 2, 4, LEVELS - 1]


def test_levels_go_with_their_entries():
    whole, scores = stack(10), torch.randn(2, 3, 10)
    kept, levels = best(scores, 5), levels_of(scores, 10)
    chosen = MemoryKV.chosen(whole, kept, levels)

    assert torch.equal(chosen.levels, levels[kept])
    parts = [chosen.between(0, 4), chosen.between(4, 10)]
    assert torch.equal(MemoryKV.concat(parts).levels, chosen.levels)
    assert chosen.to(dtype=torch.bfloat16).interpolated(5).levels is chosen.levels


def test_entries_without_levels_are_never_left_out():
    scores = torch.randn(2, 3, 10)
    chosen, plain = MemoryKV.chosen(stack(10), best(scores, 5), levels_of(scores, 10)), memory(4, 12)

    joined = MemoryKV.concat([chosen, plain])

    assert torch.equal(joined.between(0, 10).levels, chosen.levels)
    assert joined.between(10, 14).levels.tolist() == [TOP_LEVEL] * 12
    assert MemoryKV.concat([plain, plain]).levels is None
