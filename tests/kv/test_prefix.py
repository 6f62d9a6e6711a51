"""A memory keeps one rotation wherever it stands; several of them are at their places without being copied."""

from __future__ import annotations

import torch
from kv_samples import memory, stack
from torch import Tensor

from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.kv.prefix import Prefix, Section
from beacon_memory.kv.rope import Rope, apply_rotation

ROPES = [Rope(torch.tensor([1.0, 0.01])), Rope(torch.tensor([1.0, 0.01]), scaling=1.3)]


def assert_blocks(prefix: Prefix, expected: MemoryKV, rope: Rope) -> None:
    """The blocks of each layer are the entries of each head, rotated to positions that end at -1."""
    for layer in range(2):
        heads = [(keys, values) for _, *block in prefix.blocks(layer) for keys, values in zip(*block, strict=True)]
        for (keys, values), (theirs, held, positions) in zip(heads, expected.layer(layer), strict=True):
            table = rope.table(positions.float() - expected.span)
            torch.testing.assert_close(keys, apply_rotation(theirs, *table), atol=1e-5, rtol=0)
            assert torch.equal(values, held)


def test_the_last_position_of_a_section_is_minus_one() -> None:
    for rope in ROPES:
        for one in (memory(9, 31), memory(9, 31).interpolated(4), MemoryKV.of(stack(5))):
            assert_blocks(Prefix([Section.of(one, rope)], rope), one, rope)


def test_neighbouring_heads_of_equal_length_are_one_block() -> None:
    kept = torch.ones(2, 3, 5, dtype=torch.bool)
    kept[1, 0, 2] = False
    section = Section.of(MemoryKV.chosen(stack(5), kept), ROPES[0])
    even, ragged = section.blocks
    assert [(heads, tuple(keys.shape)) for heads, keys, _ in even] == [(slice(0, 3), (3, 5, 4))]
    assert [(heads, tuple(values.shape)) for heads, _, values in ragged] == [
        (slice(0, 1), (1, 4, 4)),
        (slice(1, 3), (2, 5, 4)),
    ]


def test_blocks_and_layers_are_views_and_values_are_not_copied() -> None:
    one = memory(9, 31)
    section = Section.of(one, ROPES[0])

    def storage(part: Tensor) -> int:
        return part.untyped_storage().data_ptr()

    assert storage(section.values) == storage(one.values)
    for layer in range(2):
        parts = [*section.layer(layer), *(part for _, *block in section.blocks[layer] for part in block)]
        assert {storage(part) for part in parts} <= {storage(section.keys), storage(section.values)}


def test_sections_behind_one_another_are_the_joined_memory() -> None:
    parts = [MemoryKV.of(stack(1)), memory(19, 71), memory(4, 0), memory(22, 61), MemoryKV.of(stack(0))]
    for rope in ROPES:
        prefix = Prefix([Section.of(part, rope) for part in parts], rope)
        joined = MemoryKV.concat(parts)
        assert (prefix.span, prefix.slots) == (joined.span, joined.slots)
        assert prefix.behind == (0, 26, 0)  # the first, of one slot, is moved
        assert_blocks(prefix, joined, rope)


def test_a_prefix_of_nothing_has_nothing_to_attend_to() -> None:
    empty = Section.of(MemoryKV.of(BeaconKV.empty(2, 3, 4)), ROPES[0])
    for prefix in (Prefix([], ROPES[0]), Prefix([empty], ROPES[0])):
        assert (bool(prefix), prefix.span, prefix.slots) == (False, 0, 0)
