from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_samples import memory, same, stack
from torch import Tensor

from beacon_memory.errors import InputError
from beacon_memory.kv.levels import LEVELS
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import BITS, GROUP, QuantizedKV, group_numbers, quantized

TENSORS = ("keys", "values", "key_scales", "key_zeros", "value_scales", "value_zeros", "positions", "counts")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_width = pytest.mark.parametrize("bits", BITS)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix over sqrt(size), by its formula: the sign at i, j is that of the bits that both have."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


def as_coded(keys: Tensor, rotated: bool) -> Tensor:
    """Keys [entries, 4] as their codes have them."""
    return (keys.double() @ hadamard(4)).float() if rotated else keys


def ragged(counts: list[int], scale: float = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> MemoryKV:
    """Random K/V of one layer whose heads have so many entries, every channel with a size and a middle of its own."""
    torch.manual_seed(seed)
    entries, span = sum(counts), max([1, *counts])
    shape, positions = (entries, 4), [torch.arange(count, dtype=torch.int32) for count in counts]
    keys, values = (scale * (torch.randn(shape) * torch.rand(4) * 2 + torch.randn(4) * 8) for _ in range(2))
    return MemoryKV(keys.to(dtype), values.to(dtype), torch.cat(positions), torch.tensor([counts]), span)


memories = st.builds(
    ragged,
    st.lists(st.sampled_from([0, 1, 2, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP, 3 * GROUP + 5]), min_size=1, max_size=5),
    st.sampled_from([1e-9, 1e-6, 1e-3, 1, 300]),
    st.integers(0, 99),
    st.sampled_from(DTYPES),
)


def half(number: float) -> float:
    """The float16 next to a number."""
    (rounded,) = struct.unpack("e", struct.pack("e", number))
    return float(rounded)


def grid(numbers: list[float], bits: int) -> tuple[float, float]:
    """Scale and zero of numbers that share them."""
    zero = half(min(numbers))
    return half(max((max(numbers) - zero) / (2**bits - 1), abs(zero) / 1000, 2**-14)), zero


def runs(kv: MemoryKV | QuantizedKV) -> Iterator[tuple[int, int, int]]:
    """Each group's number, its first entry, and the one behind its last."""
    start = group = 0
    for count in kv.counts.flatten().tolist():
        for first in range(start, start + count, GROUP):
            yield group, first, min(first + GROUP, start + count)
            group += 1
        start += count


@given(memories, st.sampled_from(BITS))
@settings(max_examples=30, deadline=None)
def test_every_number_is_off_by_half_a_scale_at_most_and_scales_are_those_of_a_slow_reference(
    kv: MemoryKV, bits: int
) -> None:
    packed = quantized(kv, bits)
    back = packed.dequantized(torch.float32)
    keys, keys_back = as_coded(kv.keys, bits == 4), as_coded(back.keys, bits == 4)
    rounded = 1e-6 * max(keys.abs().flatten().tolist(), default=0) if bits == 4 else 0  # by rotating there and back
    groups = list(runs(kv))
    assert len(packed.key_scales) == len(packed.key_zeros) == len(groups)
    for group, first, stop in groups:
        for channel in range(4):
            scale = packed.key_scales[group, channel]
            near(keys[first:stop, channel], keys_back[first:stop, channel], bits, scale, rounded)
    for entry in range(len(kv.values)):
        near(kv.values[entry], back.values[entry], bits, packed.value_scales[entry])


def near(numbers: Tensor, back: Tensor, bits: int, stored: Tensor, rounded: float = 0) -> None:
    scale, _ = grid(numbers.tolist(), bits)
    assert stored.item() == pytest.approx(scale, rel=2**-10, abs=rounded)
    assert (numbers.double() - back.double()).abs().max().item() <= scale / 2 * (1 + 2**-9) + rounded


@every_width
def test_codes_are_those_of_a_slow_reference(bits: int) -> None:
    kv = ragged([3, 0, GROUP + 2])
    packed = quantized(kv, bits)
    keys = as_coded(kv.keys, bits == 4)
    for group, first, stop in runs(kv):
        for channel in range(4):
            scale, zero = grid(keys[first:stop, channel].tolist(), bits)
            assert (packed.key_scales[group, channel].item(), packed.key_zeros[group, channel].item()) == (scale, zero)
            for entry in range(first, stop):
                code = min(max(round((keys[entry, channel].item() - zero) / scale), 0), 2**bits - 1)
                byte = packed.keys[entry, channel % (bits // 2)].item()  # of 4 bits the later half is the high one
                assert (byte >> 4 * (channel // 2) & 15 if bits == 4 else byte) == code


@pytest.mark.parametrize("head_dim", [2, 4, 6, 64, 80, 96, 256, 512])
def test_any_even_number_of_channels_is_rotated_in_blocks_of_a_power_of_two(head_dim: int) -> None:
    size = min(head_dim & -head_dim, 256)
    kv = replace(ragged([GROUP + 3]), keys=torch.randn(GROUP + 3, head_dim), values=torch.randn(GROUP + 3, head_dim))
    kv.keys[:, 0] += 30  # a channel that is large in every token
    rotation = torch.block_diag(*[hadamard(size)] * (head_dim // size))
    packed = quantized(kv, 4)
    codes = torch.cat([packed.keys & 15, packed.keys >> 4], dim=1)
    coded = packed.key_zeros[packed.groups].double() + codes * packed.key_scales[packed.groups].double()
    off = coded - kv.keys.double() @ rotation
    assert (off.abs() <= 0.51 * packed.key_scales.double().repeat_interleave(torch.tensor([GROUP, 3]), 0) + 1e-4).all()
    assert torch.allclose(packed.dequantized().keys.double(), coded @ rotation, atol=1e-4)


def test_rotation_spreads_what_one_channel_would_lose() -> None:
    kv = replace(ragged([GROUP]), keys=torch.randn(GROUP, 64), values=torch.randn(GROUP, 64))
    kv.keys[:, 5] *= 40
    ours = quantized(kv, 4)
    lost = (ours.dequantized().keys - kv.keys).square().mean(0)
    assert lost.max() < 4 * lost.mean()
    eight = (quantized(kv, 8).dequantized().keys - kv.keys).square().mean(0)  # not rotated
    assert eight.max() > 20 * eight.mean()


def test_in_eight_bits_what_was_dequantized_is_quantized_to_the_same_bits() -> None:
    packed = quantized(ragged([3, 0, GROUP + 2]), 8)
    again = quantized(packed.dequantized(torch.float32), 8)
    assert all(torch.equal(getattr(packed, name), getattr(again, name)) for name in TENSORS)


STEPS = st.lists(st.lists(st.sampled_from([0, 1, 5, GROUP, 70]), min_size=3, max_size=3), min_size=1, max_size=4)


@given(STEPS, st.sampled_from(BITS), st.sampled_from(DTYPES), st.sampled_from([1e-7, 1e-2, 1, 300]))
@settings(max_examples=50, deadline=None)
def test_codes_stay_as_they_are_while_a_memory_grows(
    steps: list[list[int]], bits: int, dtype: torch.dtype, scale: float
) -> None:
    packed, rotated, windows = quantized(ragged([2 * GROUP + 3, 0, 7], scale), bits), bits == 4, [0]
    for seed, counts in enumerate(steps):
        before, new = packed, ragged(counts, 3 * scale, seed, dtype)
        windows += [before.span, before.span + 3][: 1 + (new.span > 3)]  # two windows at a time
        packed = before.grown(before.span, new, windows)
        assert (packed.bits, packed.span) == (bits, before.span + new.span)
        assert torch.equal(packed.groups, group_numbers(packed.positions, packed.counts, None, windows))
        assert packed.counts.tolist() == [[a + b for a, b in zip(before.counts[0].tolist(), counts, strict=True)]]
        kept_as_it_was(before, packed, before.counts.flatten().tolist())
        whole = MemoryKV.concat([before.dequantized(torch.float32), new])
        assert torch.equal(packed.positions, whole.positions)
        back = packed.dequantized(torch.float32)
        off = (as_coded(back.keys, rotated) - as_coded(whole.keys, rotated)).abs()
        assert (off <= 0.51 * packed.key_scales[packed.groups].float() + 1e-6 * whole.keys.abs().max()).all()
        off = (back.values - whole.values).abs()
        assert (off <= 0.51 * packed.value_scales[:, None].float() + 1e-6 * whole.values.abs().max()).all()


def test_codes_stay_where_rotating_there_and_back_would_change_them() -> None:
    sizes = [GROUP] * 9
    kv = ragged(sizes)
    as_rotated = torch.randn(len(kv.keys), 4) * torch.tensor([1e4, 1e-3, 1e-3, 1e-3])
    packed = quantized(replace(kv, keys=as_coded(as_rotated, True)), 4)
    kept_as_it_was(packed, packed.grown(packed.span, ragged([5] * 9)), sizes)
    again = quantized(packed.dequantized(torch.float32), 4)
    assert not torch.equal(again.key_zeros, packed.key_zeros)


@every_width
def test_what_stands_behind_the_start_gives_way_to_the_new(bits: int) -> None:
    kv = memory(5 * GROUP, 12 * GROUP)
    start = 3 * GROUP
    old, new = quantized(kv, bits, [0, start]), memory(40, 90)
    before = [int((part.positions[part.positions < start]).numel()) for part in heads_of(kv)]
    packed = old.grown(start, new)
    assert packed.counts.flatten().tolist() == [a + b for a, b in zip(before, new.counts.flatten(), strict=True)]
    assert packed.span == start + 40
    kept_as_it_was(old, packed, before)
    rest = packed.dequantized().between(start, start + 40)
    assert torch.equal(rest.positions, new.positions)
    assert (rest.values - new.values).abs().max() < 0.3
    assert (rest.keys - new.keys).abs().max() < 0.6


def test_entries_out_of_order_grow_to_no_others() -> None:
    kv = ragged([GROUP, GROUP + 9])
    kv = replace(kv, positions=kv.positions.flip(0) % kv.span)
    start, new = GROUP // 2, ragged([3, 4], seed=1)
    grown = quantized(kv, 4).grown(start, new).dequantized()
    wanted = kv.grown(start, new)
    assert torch.equal(grown.positions, wanted.positions)
    assert grown.counts.tolist() == wanted.counts.tolist()
    assert (grown.keys - wanted.keys).abs().max() < 4
    assert (grown.values - wanted.values).abs().max() < 2


def heads_of(kv: MemoryKV | QuantizedKV) -> list[MemoryKV]:
    """The memory of each head alone, dequantized."""
    plain = kv if isinstance(kv, MemoryKV) else kv.dequantized(torch.float32)
    parts = [part for number in range(len(plain.counts)) for part in plain.layer(number)]
    return [MemoryKV(*part, torch.tensor([[len(part[0])]]), plain.span) for part in parts]


def kept_as_it_was(before: QuantizedKV, after: QuantizedKV, sizes: list[int]) -> None:
    """Each head begins with so many of the entries that it had, bit for bit."""
    for old, new, size in zip(by_head(before), by_head(after), sizes, strict=True):
        for name in TENSORS[:-1]:
            assert torch.equal(new[name][:size], old[name][:size])


def by_head(packed: QuantizedKV) -> Iterator[dict[str, Tensor]]:
    """What each head has of every entry, the scales and zeros of its keys among them."""
    entries = packed.counts.flatten().tolist()
    of_entries = {name: getattr(packed, name) for name in TENSORS[:-1]}
    of_entries |= {name: of_entries[name][packed.groups] for name in ("key_scales", "key_zeros")}
    split = {name: one.split(entries) for name, one in of_entries.items()}
    for head in range(len(entries)):
        yield {name: parts[head] for name, parts in split.items()}


@every_width
def test_a_channel_far_from_zero_is_as_exact_as_bfloat16(bits: int) -> None:
    kv = ragged([GROUP])
    channel = 100 + torch.rand(GROUP, 1) * 2 - 1
    for keys in (channel.expand(-1, 4), channel.bfloat16().expand(-1, 4)):
        off = (quantized(replace(kv, keys=keys), bits).dequantized(torch.float32).keys - keys).abs().max()
        assert off <= 1.001 * max(2 / (2**bits - 1), 101 / 1000) / 2
    exact = replace(kv, keys=channel.bfloat16().expand(-1, 4), values=kv.values.bfloat16())
    assert torch.equal(quantized(exact, 8).dequantized().keys, exact.keys)


@every_width
def test_alone_in_its_group_or_always_the_same_a_bfloat16_is_kept_exactly_or_rotated_nearly(bits: int) -> None:
    for kv in (ragged([1, 1, 1], dtype=torch.bfloat16), ragged([GROUP], dtype=torch.bfloat16)):
        same_in_all = replace(kv, keys=kv.keys[:1].expand_as(kv.keys) if kv.counts.numel() == 1 else kv.keys)
        off = (quantized(same_in_all, bits).dequantized(torch.float32).keys - same_in_all.keys.float()).abs()
        assert (off <= (0 if bits == 8 else 2**-10 * same_in_all.keys.abs().max())).all()


@pytest.mark.parametrize("windows", [[], [0, 70], [0, 1, 150, 299]])
@pytest.mark.parametrize("with_levels", [True, False])
def test_groups_are_those_of_a_slow_reference(windows: list[int], with_levels: bool) -> None:
    kv = memory(300, 1200)
    levels = torch.randint(0, LEVELS, (1200,), dtype=torch.uint8) if with_levels else None
    found = group_numbers(kv.positions, kv.counts, levels, windows)
    heads = torch.arange(6).repeat_interleave(kv.counts.flatten()).tolist()
    depths = [0] * 1200 if levels is None else (-levels.int()).tolist()
    which = [sum(start <= position for start in windows if start) for position in kv.positions.tolist()]
    expected, number = [0] * 1200, -1
    for window in range(len([start for start in windows if start]) + 1):
        for head in range(6):
            own = [n for n in range(1200) if (which[n], heads[n]) == (window, head)]
            for rank, entry in enumerate(sorted(own, key=lambda n: (depths[n], kv.positions[n].item()))):
                number += rank % GROUP == 0
                expected[entry] = number
    assert found.tolist() == expected
    assert found.dtype == torch.int32
    packed = quantized(replace(kv, levels=levels), 8, windows)
    assert torch.equal(packed.groups, found)
    assert len(packed.key_scales) == number + 1


@every_width
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_is_kept_and_another_may_be_asked_for(bits: int, dtype: torch.dtype) -> None:
    kv = memory(150, 400, dtype=dtype)
    packed = quantized(kv, bits)
    assert packed.dtype == dtype
    assert {packed.dequantized().keys.dtype, packed.dequantized().values.dtype} == {dtype}
    wide = packed.dequantized(torch.float32)
    assert same(packed.dequantized(), wide.to(dtype=dtype))
    assert (wide.span, packed.slots) == (kv.span, kv.slots)
    assert torch.equal(wide.positions, kv.positions)
    assert torch.equal(wide.counts, kv.counts)


@every_width
@pytest.mark.parametrize("kv", [memory(5, 0), MemoryKV.of(stack(0)), ragged([0, 3, 0]), ragged([0])], ids=str)
def test_heads_without_entries_and_no_entries_at_all_are_fine(bits: int, kv: MemoryKV) -> None:
    packed = quantized(kv, bits)
    for back in (packed.dequantized(), packed.grown(kv.span, kv).dequantized().between(0, kv.span)):
        assert (back.keys.shape, back.span) == (kv.keys.shape, kv.span)
        assert back.counts.tolist() == kv.counts.tolist()
        assert torch.equal(back.positions, kv.positions)


@every_width
def test_an_interpolated_memory_keeps_its_positions(bits: int) -> None:
    kv = memory(100, 300).interpolated(60)
    assert torch.equal(quantized(kv, bits).dequantized().positions, kv.positions)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.54), (4, 0.29)])
def test_bytes_are_about_a_half_and_less_than_a_third(bits: int, share: float) -> None:
    heads, slots, head_dim = 3, 5 * GROUP, 64
    shape = (heads * slots, head_dim)
    positions = torch.arange(slots, dtype=torch.int32).repeat(heads)
    numbers = torch.randn(shape).bfloat16()
    kv = MemoryKV(numbers, numbers, positions, torch.full((1, heads), slots), slots)
    packed = quantized(kv, bits)
    assert packed.nbytes - positions.nbytes <= share * (kv.nbytes - positions.nbytes)
    tensors = (packed.keys, packed.values, packed.key_scales, packed.key_zeros, packed.value_scales, packed.value_zeros)
    assert packed.nbytes == sum(tensor.nbytes for tensor in (*tensors, packed.positions))


@every_width
def test_counts_stay_on_the_cpu_when_all_else_moves_and_is_dequantized_there(bits: int) -> None:
    packed = quantized(memory(150, 400), bits).to("meta")
    assert {getattr(packed, name).device.type for name in TENSORS[:-1]} == {"meta"}
    back = packed.dequantized(torch.bfloat16)
    assert {part.device.type for part in (back.keys, back.values, back.positions)} == {"meta"}
    assert (back.keys.dtype, back.keys.shape) == (torch.bfloat16, (400, 4))
    assert packed.counts.device.type == back.counts.device.type == "cpu"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"bits": 2}, "bits is 2, but must be one of 8, 4"),
    ({"bits": 8.0}, "bits is 8.0"),
    ({"bits": 8}, r"key_scales must be \[\d+, 2\] torch.float16, got \[\d+, 4\]"),
    ({"keys": torch.zeros(20, dtype=torch.uint8)}, r"keys must be \[20, 20\] torch.uint8, got \[20\]"),
    ({"keys": torch.tensor(0, dtype=torch.uint8)}, r"keys must be \[20, 0\] torch.uint8, got \[\]"),
    ({"keys": torch.zeros(20, 2)}, r"keys must be \[20, 2\] torch.uint8, got \[20, 2\] torch.float32"),
    ({"keys": torch.zeros(21, 2, dtype=torch.uint8)}, r"got \[21, 2\]"),
    ({"values": torch.zeros(20, 4, dtype=torch.uint8)}, r"values must be \[20, 2\] torch.uint8, got \[20, 4\]"),
    ({"key_scales": torch.zeros(0, 4).half()}, r"key_zeros must be \[0, 4\] torch.float16, got \[6, 4\]"),
    ({"groups": torch.zeros(20)}, r"groups must be \[20\] torch.int32, got \[20\] torch.float32"),
    ({"groups": torch.full((20,), 6, dtype=torch.int32)}, "groups must be numbers from 0 to 5, got 6 to 6"),
    ({"groups": torch.arange(-1, 19, dtype=torch.int32)}, "groups must be numbers from 0 to 5, got -1 to 18"),
    ({"levels": torch.zeros(19, dtype=torch.uint8)}, r"levels must be \[20\] torch.uint8, got \[19\]"),
    ({"key_zeros": torch.zeros(6, 4)}, r"key_zeros must be \[6, 4\] torch.float16, got \[6, 4\] torch.float32"),
    ({"value_scales": torch.zeros(20, 1).half()}, r"value_scales must be \[20\] torch.float16, got \[20, 1\]"),
    ({"value_zeros": torch.zeros(19).half()}, r"value_zeros must be \[20\] torch.float16, got \[19\]"),
    ({"positions": torch.zeros(20)[:4]}, r"positions must be \[20\] torch.int32 or torch.float32, got \[4\]"),
    ({"positions": torch.zeros(20, dtype=torch.int16)}, "got .* torch.int16"),
    ({"counts": torch.tensor([[9, 9, 2]], dtype=torch.int32)}, r"counts must be .* int64 .*got \[1, 3\] torch.int32"),
    ({"counts": torch.tensor([9, 9, 2])}, r"counts must be \[layers, kv_heads\]"),
    ({"counts": torch.tensor([[21, -1, 0]])}, r"of at least 0, got .*\[21, -1, 0\]"),
    ({"counts": torch.tensor([[2**40, 0, 0]])}, r"keys must be \[1099511627776, 2\]"),
    ({"dtype": torch.int8}, "dtype must be one of floating point, got torch.int8"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_tensors_that_do_not_fit_each_other_are_refused_and_named(change: dict[str, Any], message: str) -> None:
    packed = quantized(ragged([5, 3, 4, 3, 2, 3]), 4)
    with pytest.raises(InputError, match=message):
        replace(packed, **change)


@every_width
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), -2e5, 7e7])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_numbers_beyond_float16_are_refused_and_named(bits: int, number: float, name: str) -> None:
    kv = ragged([3, 4])
    getattr(kv, name)[5, 2] = number
    with pytest.raises(InputError, match=rf"{name} from .* cannot be quantized: not all are within float16"):
        quantized(kv, bits)


def test_an_odd_head_dim_is_refused_in_four_bits_alone() -> None:
    kv = memory(9, 20)
    odd = replace(kv, keys=kv.keys[:, :3], values=kv.values[:, :3])
    assert quantized(odd, 8).dequantized().keys.shape == (20, 3)
    with pytest.raises(InputError, match="head_dim is 3, but must be even for 4 bits"):
        quantized(odd, 4)


@pytest.mark.parametrize("bits", [0, 2, 16, True, "8"])
def test_other_widths_are_refused(bits: Any) -> None:
    with pytest.raises(InputError, match=r"bits is .*, but must be one of 8, 4"):
        quantized(memory(9, 20), bits)
