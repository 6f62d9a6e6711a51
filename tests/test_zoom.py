from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kv_samples import same, stack
from torch import Tensor

from beacon_memory.compression.selection import best
from beacon_memory.errors import InputError
from beacon_memory.kv.levels import LEVELS, level_of, levels_of
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import quantized
from beacon_memory.modeling.layout import slots_of
from beacon_memory.zoom import allocate, section_counts, zoomed

Entry = tuple[int, tuple[float, ...]]
HEADS = 6
TOKENS = 100
BOUNDS = [0, 30, 64, 81, 100]
SECTIONS = 4
RELEVANCE = [0.0, 3.0, 1.0, 2.0]  # the second section matches best, the first not at all


def rich(tokens: int = TOKENS, ratio: int = 1) -> MemoryKV:
    scores = torch.randn(2, 3, tokens)
    return MemoryKV.chosen(stack(tokens), best(scores, slots_of(tokens, ratio)), levels_of(scores, tokens))


def in_order(memory: MemoryKV) -> list[Entry]:
    """Every entry, told by its head and its key, which no other has."""
    heads = torch.arange(memory.counts.numel()).repeat_interleave(memory.counts.flatten())
    return [(int(head), tuple(key.tolist())) for head, key in zip(heads, memory.keys, strict=True)]


def entries(memory: MemoryKV) -> set[Entry]:
    return set(in_order(memory))


def zoom(memory: MemoryKV, relevance: list[float], budget: int, bounds: list[int] = BOUNDS) -> MemoryKV:
    return zoomed(memory, bounds, allocate(sizes(memory, bounds), relevance, budget), relevance)


def sizes(memory: MemoryKV, bounds: list[int] = BOUNDS) -> Tensor:
    return section_counts(memory, bounds).sum((2, 3))


def test_every_entry_counts_once_where_it_is() -> None:
    memory = rich(ratio=2)
    counts = section_counts(memory, BOUNDS)

    assert counts.shape == (SECTIONS, LEVELS, *memory.counts.shape)
    for number, (start, stop) in enumerate(pairwise(BOUNDS)):
        own = memory.between(start, stop)
        assert own.levels is not None
        for level in range(LEVELS):
            assert torch.equal(counts[number, level], own.only(own.levels == level).counts)


@pytest.mark.parametrize("relevance", [RELEVANCE, [0.0] * SECTIONS, [1.0, 1.0, 0.0, 0.0]])
def test_the_budget_is_kept_and_used_but_for_less_than_a_level_of_one_section(relevance: list[float]) -> None:
    memory = rich()
    largest = int(sizes(memory).max())
    for budget in range(0, HEADS * TOKENS + 50, 7):
        left = budget - len(zoom(memory, relevance, budget).keys)
        assert 0 <= left < largest or budget > HEADS * TOKENS


def test_a_smaller_budget_loads_a_part_of_what_a_larger_one_does() -> None:
    memory = rich()
    before: set[Entry] = set()
    for budget in range(0, HEADS * TOKENS + 1, 20):
        now = entries(zoom(memory, RELEVANCE, budget))
        assert before <= now
        before = now
    assert before == entries(memory)


@pytest.mark.parametrize("relevance", [0.0, 2.5])
@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_where_all_is_equally_relevant_it_is_blind_selection(ratio: int, relevance: float) -> None:
    torch.manual_seed(ratio)
    memory = rich()
    blind = zoom(memory, [relevance] * SECTIONS, HEADS * slots_of(TOKENS, ratio))
    assert memory.levels is not None

    kept = memory.levels >= level_of(ratio)
    assert entries(blind) == {one for one, its in zip(in_order(memory), kept.tolist(), strict=True) if its}
    assert blind.span == TOKENS
    assert torch.equal(blind.positions, memory.positions[kept])


def test_the_most_relevant_sections_are_loaded_whole_and_the_next_by_its_levels() -> None:
    memory = rich()
    lowest = allocate(sizes(memory), RELEVANCE, HEADS * (34 + 19 + 8))
    first, second, third, fourth = lowest

    assert (second, fourth) == (0, 0)
    assert 0 < third < LEVELS
    assert first == LEVELS
    assert allocate(sizes(memory), RELEVANCE, HEADS * 34) == [LEVELS, 0, LEVELS, LEVELS]


def test_loaded_sections_stand_closed_up_with_the_best_match_last() -> None:
    memory = rich()
    prefix = zoom(memory, RELEVANCE, HEADS * (34 + 19))
    parts = [memory.between(81, 100), memory.between(30, 64)]
    joined = MemoryKV.concat(parts)

    assert prefix.span == joined.span == 19 + 34
    for part, other in zip(
        (prefix.keys, prefix.values, prefix.positions, prefix.counts, prefix.levels),
        (joined.keys, joined.values, joined.positions, joined.counts, joined.levels),
        strict=True,
    ):
        assert part is not None
        assert other is not None
        assert torch.equal(part, other)


def test_sections_of_several_documents_compete_for_one_budget() -> None:
    documents = [rich(50), rich(70), rich(60)]
    memory, bounds = MemoryKV.concat(documents), [0, 25, 50, 90, 120, 180]
    prefix = zoom(memory, [0.0, 1.0, 0.0, 2.0, 0.0], HEADS * (25 + 30), bounds)

    assert entries(prefix) == entries(documents[0].between(25, 50)) | entries(documents[1].between(40, 70))
    assert torch.equal(prefix.between(25, 55).keys, documents[1].between(40, 70).keys)


def test_entries_without_levels_are_loaded_with_their_section_or_not_at_all() -> None:
    memory = MemoryKV.of(stack(TOKENS))
    budget = HEADS * 40

    assert entries(zoom(memory, RELEVANCE, budget)) == entries(memory.between(30, 64))


def test_nothing_is_loaded_without_a_budget() -> None:
    prefix = zoom(rich(), RELEVANCE, 0)
    assert (len(prefix.keys), prefix.span, prefix.counts.tolist()) == (0, 0, [[0] * 3] * 2)


@pytest.mark.parametrize("bounds", [[0, 50], [1, 100], [0, 60, 40, 100], [0, 50, 50, 100], [0, 50, 101]])
def test_bounds_that_are_not_of_the_memory_are_refused(bounds: list[int]) -> None:
    with pytest.raises(InputError, match=r"must rise from 0 to the memory's span of 100 positions"):
        section_counts(rich(), bounds)


def test_an_interpolated_memory_is_refused() -> None:
    with pytest.raises(InputError, match="an interpolated memory has no sections"):
        section_counts(rich().interpolated(50), [0, 50])


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_loaded_of_a_quantized_memory_is_what_is_loaded_of_its_numbers(bits: int) -> None:
    packed = quantized(rich(), bits)
    plain = packed.dequantized()
    lowest = allocate(sizes(plain), RELEVANCE, HEADS * TOKENS // 3)
    part = zoomed(packed, BOUNDS, lowest, RELEVANCE)
    assert part.bits == bits
    assert same(part.dequantized(), zoomed(plain, BOUNDS, lowest, RELEVANCE))
