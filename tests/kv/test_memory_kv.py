from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TypeAlias

import pytest
import torch
from kv_samples import memory, same, stack
from torch import Tensor

from beacon_memory.errors import InputError
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV

Entry: TypeAlias = tuple[float, list[float], list[float]]


def listed(kv: MemoryKV) -> dict[tuple[int, int], list[Entry]]:
    """Place, key and value of each entry by layer and kv head, in plain numbers."""
    entries = list(zip(kv.positions.tolist(), kv.keys.tolist(), kv.values.tolist(), strict=True))
    heads: dict[tuple[int, int], list[Entry]] = {}
    for layer, counts in enumerate(kv.counts.tolist()):
        for head, count in enumerate(counts):
            heads[layer, head], entries = entries[:count], entries[count:]
    assert not entries
    return heads


class TestBeaconKV:
    def test_parts_are_put_one_after_another(self) -> None:
        parts = [stack(2), BeaconKV.empty(2, 3, 4), stack(5)]
        whole = BeaconKV.concat(parts)
        assert whole.slots == 7
        assert torch.equal(whole[:2].keys, parts[0].keys)
        assert torch.equal(whole[2:].values, parts[2].values)

    def test_slots_are_chosen_by_slice_or_by_number(self) -> None:
        kv = stack(6)
        assert torch.equal(kv[1:5:2].keys, kv.keys[:, :, [1, 3]])
        assert torch.equal(kv[torch.tensor([5, 0])].values, kv.values[:, :, [5, 0]])
        assert kv[:0].slots == 0

    def test_one_part_is_handed_back_as_it_is(self) -> None:
        kv = stack(3)
        assert BeaconKV.concat([kv]) is kv

    def test_no_part_at_all_is_refused(self) -> None:
        with pytest.raises(InputError, match="at least one"):
            BeaconKV.concat([])

    @pytest.mark.parametrize(("keys", "values"), [((2, 3, 4), (2, 3, 4)), ((2, 3, 5, 4), (2, 3, 6, 4))])
    def test_other_shapes_are_refused_and_named(self, keys: tuple[int, ...], values: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match=r"\(2, 3, .*\) and \(2, 3, "):
            BeaconKV(torch.ones(keys), torch.ones(values))

    def test_bytes_are_those_of_keys_and_values(self) -> None:
        assert stack(5).nbytes == 2 * (2 * 3 * 5 * 4) * 4
        assert stack(5).to(dtype=torch.bfloat16).nbytes == 2 * (2 * 3 * 5 * 4) * 2
        assert BeaconKV.empty(2, 3, 4).nbytes == 0


class TestWhatAMemoryIsMadeOf:
    def test_a_stack_has_the_same_positions_in_every_head(self) -> None:
        kv = stack(4)
        made = MemoryKV.of(kv)
        assert (made.slots, made.span, made.positions.dtype) == (4, 4, torch.int32)
        for (layer, head), entries in listed(made).items():
            assert [place for place, _, _ in entries] == [0, 1, 2, 3]
            assert [key for _, key, _ in entries] == kv.keys[layer, head].tolist()
            assert [value for _, _, value in entries] == kv.values[layer, head].tolist()

    def test_each_head_keeps_what_was_chosen_for_it(self) -> None:
        kv, kept = stack(9), torch.rand(2, 3, 9) < 0.4
        kept[0, 1], kept[1, 2] = False, True
        made = MemoryKV.chosen(kv, kept)
        assert (made.span, made.positions.dtype, made.counts.tolist()) == (9, torch.int32, kept.sum(-1).tolist())
        for (layer, head), entries in listed(made).items():
            assert entries == [
                (slot, kv.keys[layer, head, slot].tolist(), kv.values[layer, head, slot].tolist())
                for slot in range(9)
                if kept[layer, head, slot]
            ]

    def test_all_chosen_is_the_stack(self) -> None:
        kv = stack(5)
        assert same(MemoryKV.chosen(kv, torch.ones(2, 3, 5, dtype=torch.bool)), MemoryKV.of(kv))

    @pytest.mark.parametrize(("entries", "slots"), [(0, 0), (1, 1), (6, 1), (7, 2), (54, 9)])
    def test_slots_are_the_mean_over_heads_rounded_up(self, entries: int, slots: int) -> None:
        kv = memory(9, entries)
        assert (kv.slots, kv.least_span) == (slots, slots)
        assert kv.nbytes == entries * (2 * 4 * 4 + 4)

    def test_least_span_is_never_above_the_span(self) -> None:
        assert MemoryKV.of(stack(5)).interpolated(3).least_span == 3

    def test_a_layer_is_handed_out_head_by_head_without_a_copy(self) -> None:
        kv = memory(7, 20)
        heads = listed(kv)
        for number in range(2):
            for head, parts in enumerate(kv.layer(number)):
                keys, values, positions = (part.tolist() for part in parts)
                assert list(zip(positions, keys, values, strict=True)) == heads[number, head]
        for part, whole in zip(kv.layer(1)[2], (kv.keys, kv.values, kv.positions), strict=True):
            assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()

    def test_another_dtype_is_one_of_keys_and_values_alone(self) -> None:
        kv = memory(7, 20)
        other = kv.to(dtype=torch.bfloat16)
        assert same(other, replace(kv, keys=kv.keys.bfloat16(), values=kv.values.bfloat16()))

    def test_counts_stay_on_the_cpu_when_all_else_moves(self) -> None:
        moved = memory(7, 20).to("meta")
        assert {part.device.type for part in (moved.keys, moved.values, moved.positions)} == {"meta"}
        assert moved.counts.device.type == "cpu"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"keys": torch.ones(19, 4)}, r"\[20 entries, head_dim\], got \(19, 4\) and \(20, 4\)"),
            ({"values": torch.ones(20, 5)}, r"got \(20, 4\) and \(20, 5\)"),
            ({"keys": torch.ones(20, 2, 2), "values": torch.ones(20, 2, 2)}, r"got \(20, 2, 2\)"),
            ({"positions": torch.ones(20, 1)}, r"positions must be \[20 entries\].*got \(20, 1\) and \(2, 3\)"),
            ({"counts": torch.tensor([[9, 9, 3]])}, r"\[21 entries, head_dim\], got \(20, 4\)"),
            ({"counts": torch.tensor([9, 9, 2])}, r"counts \[layers, kv_heads\], got \(20,\) and \(3,\)"),
        ],
    )
    def test_other_shapes_are_refused_and_named(self, change: dict[str, Tensor], message: str) -> None:
        kv = memory(7, 20)
        with pytest.raises(InputError, match=message):
            replace(kv, **change)  # type: ignore[arg-type]  # by field name


def twice_at_one_place() -> MemoryKV:
    """A stack but for one entry."""
    kv = MemoryKV.of(stack(5))
    kv.positions[1] = 0
    return kv


class TestTakingApart:
    @pytest.mark.parametrize(("start", "stop"), [(0, 9), (0, 4), (4, 9), (3, 5), (5, 5), (0, 0)])
    def test_between_two_positions_every_head_has_its_entries_there(self, start: int, stop: int) -> None:
        kv = memory(9, 30)
        part = kv.between(start, stop)
        assert (part.span, part.positions.dtype, part.counts.dtype) == (stop - start, torch.int32, torch.int64)
        for head, entries in listed(kv).items():
            there = [(place - start, key, value) for place, key, value in entries if start <= place < stop]
            assert listed(part)[head] == there

    def test_what_was_put_together_is_found_again(self) -> None:
        parts = [memory(6, 12), memory(10, 24), MemoryKV.of(stack(3)), memory(4, 0), memory(4, 9)]
        whole, start = MemoryKV.concat(parts), 0
        for part in parts:
            assert same(whole.between(start, start := start + part.span), part)

    def test_parts_are_put_together_again(self) -> None:
        kv = memory(20, 60)
        bounds = [0, 3, 3, 11, 20]
        assert same(MemoryKV.concat([kv.between(*bound) for bound in pairwise(bounds)]), kv)

    def test_a_part_of_a_interpolated_memory_stays_interpolated(self) -> None:
        part = memory(12, 60).interpolated(8).between(2, 6)
        assert (part.span, part.positions.dtype) == (4, torch.float32)
        assert 0 <= part.positions.min() <= part.positions.max() < 4

    @pytest.mark.parametrize("slots", [0, 1, 5])
    def test_a_stack_is_found_again(self, slots: int) -> None:
        kv = stack(slots)
        again = MemoryKV.of(kv).stack()
        assert torch.equal(again.keys, kv.keys)
        assert torch.equal(again.values, kv.values)

    @pytest.mark.parametrize(
        "kv", [memory(7, 20), memory(7, 0), MemoryKV.of(stack(5)).interpolated(3), twice_at_one_place()]
    )
    def test_a_memory_without_an_entry_at_every_place_of_every_head_is_no_stack(self, kv: MemoryKV) -> None:
        least, most = int(kv.counts.min()), int(kv.counts.max())
        with pytest.raises(InputError, match=f"of {kv.span} positions with {least} to {most} entries in a head"):
            kv.stack()


class TestInterpolation:
    def test_positions_are_scaled_evenly_and_nothing_else_changes(self) -> None:
        kv = memory(12, 30)
        less = kv.interpolated(8)
        assert (less.span, less.positions.dtype) == (8, torch.float32)
        assert torch.allclose(less.positions, kv.positions * (8 / 12))
        assert less.positions.max() < 8
        assert same(replace(less, positions=kv.positions, span=12), kv)

    def test_interpolating_twice_is_interpolating_once(self) -> None:
        kv = memory(12, 30)
        twice, once = kv.interpolated(9).interpolated(7), kv.interpolated(7)
        assert twice.span == once.span == 7
        assert torch.allclose(twice.positions, once.positions)

    @pytest.mark.parametrize("span", [12, 13, 100])
    def test_nothing_is_stretched(self, span: int) -> None:
        kv = memory(12, 30)
        assert kv.interpolated(span) is kv


def slow_concat(parts: list[MemoryKV]) -> dict[tuple[int, int], list[Entry]]:
    """The entries of each head if the parts follow one another."""
    heads: dict[tuple[int, int], list[Entry]] = {}
    offset = 0
    for part in parts:
        for head, entries in listed(part).items():
            heads.setdefault(head, []).extend((place + offset, key, value) for place, key, value in entries)
        offset += part.span
    return heads


class TestConcat:
    @pytest.mark.parametrize("sizes", [[(5, 12), (9, 20)], [(5, 12), (4, 0), (0, 0), (7, 42)], [(3, 1)] * 5], ids=str)
    def test_every_head_has_its_entries_of_all_parts(self, sizes: list[tuple[int, int]]) -> None:
        parts = [memory(*size) for size in sizes]
        whole = MemoryKV.concat(parts)
        assert (whole.span, whole.positions.dtype) == (sum(span for span, _ in sizes), torch.int32)
        assert listed(whole) == slow_concat(parts)

    def test_a_interpolated_part_stands_among_whole_ones(self) -> None:
        parts = [memory(6, 12), memory(10, 24).interpolated(5), memory(4, 9)]
        whole = MemoryKV.concat(parts)
        assert (whole.span, whole.positions.dtype) == (15, torch.float32)
        heads = slow_concat(parts)
        for head, entries in listed(whole).items():
            assert [entry[1:] for entry in entries] == [entry[1:] for entry in heads[head]]
            assert [place for place, *_ in entries] == pytest.approx([place for place, *_ in heads[head]])

    def test_one_part_is_handed_back_as_it_is(self) -> None:
        kv = memory(5, 12)
        assert MemoryKV.concat([kv]) is kv
        assert MemoryKV.concat([kv], room=5) is kv

    def test_no_part_at_all_is_refused(self) -> None:
        with pytest.raises(InputError, match="at least one"):
            MemoryKV.concat([])

    def test_what_fits_is_not_interpolated(self) -> None:
        parts = [memory(5, 12), memory(9, 20)]
        assert same(MemoryKV.concat(parts, room=14), MemoryKV.concat(parts))

    @pytest.mark.parametrize("room", range(21, 40))
    def test_what_does_not_fit_is_interpolated_into_the_room(self, room: int) -> None:
        parts = [memory(10, 30), memory(20, 60), MemoryKV.of(stack(6)), memory(4, 0)]  # 21 slots, a span of 40
        whole = MemoryKV.concat(parts, room=room)
        assert room - len(parts) < whole.span <= room
        spans = [round(part.least_span + (room - 21) / 19 * (part.span - part.least_span), 9) for part in parts]
        starts = [0]
        for part, span in zip(parts, spans, strict=True):
            starts.append(starts[-1] + int(span))
            assert part.least_span <= int(span) <= part.span
        assert whole.span == starts[-1]
        for head, entries in listed(whole).items():
            at = 0
            for part, (start, stop) in zip(parts, pairwise(starts), strict=True):
                for place, key, value in listed(part)[head]:
                    assert entries[at][0] == pytest.approx(start + place * (stop - start) / part.span)
                    assert start <= entries[at][0] < stop
                    assert entries[at][1:] == (key, value)
                    at += 1
            assert at == len(entries)

    def test_alone_it_is_interpolated_too(self) -> None:
        kv = memory(20, 60)
        assert same(MemoryKV.concat([kv], room=15), kv.interpolated(15))

    @pytest.mark.parametrize("room", [0, 5, 15])
    def test_no_part_goes_below_one_position_for_a_slot(self, room: int) -> None:
        parts = [memory(10, 30), memory(20, 60)]
        whole = MemoryKV.concat(parts, room=room)
        assert whole.span == 15
        assert same(whole, MemoryKV.concat([part.interpolated(part.least_span) for part in parts]))

    def test_stacks_that_do_not_fit_stay_as_they_are(self) -> None:
        parts = [MemoryKV.of(stack(3)), MemoryKV.of(stack(4))]
        assert same(MemoryKV.concat(parts, room=5), MemoryKV.concat(parts))
