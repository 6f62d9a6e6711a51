from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damage import parts
from kv_samples import FINGERPRINT, memory, same, write_kv_file
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory.config import BeaconConfig
from beacon_memory.documents import content_hash
from beacon_memory.errors import CorruptFileError, InputError
from beacon_memory.kv.levels import LEVELS, TOP_LEVEL, level_of
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import QuantizedKV, group_numbers
from beacon_memory.memory import BeaconMemory
from beacon_memory.storage.files.header import DocumentHeader, SectionSpan, WindowSpan
from beacon_memory.storage.files.kv_file import StoredIndex, read_index, read_kv_file
from beacon_memory.storage.files.nesting import file_order, groups_of, rows_of
from beacon_memory.storage.files.stored_kv import StoredKV, precision_of, with_precision

TEXT = "The red house stands on the hill. " * 20
SPANS = (200, 64, 0, 65, 7)  # of the windows, which make 3, 2, 0, 2 and 1 sections
SLOTS = 40
every_precision = pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])


def document(precision: str = "float32", *, levels: bool = True) -> tuple[DocumentHeader, StoredKV]:
    """A document of several windows, whose heads have very different numbers of entries, of all levels."""
    torch.manual_seed(0)
    windows, at = [], 0
    for span in SPANS:
        windows.append(WindowSpan(SLOTS // 5, 0, at, at + max(1, span), span))
        at += max(1, span)
    span = sum(SPANS)
    header = DocumentHeader("doc", content_hash(TEXT), SLOTS, tuple(windows), (), "select", span, FINGERPRINT)
    kv = memory(span, 6 * SLOTS)
    if levels:
        kv = replace(kv, levels=torch.randint(0, LEVELS, (6 * SLOTS,)).to(torch.uint8))
    return header, with_precision(kv, precision, header.window_starts)


def expected_part(header: DocumentHeader, kv: MemoryKV, lowest: Sequence[int]) -> MemoryKV:
    """The entries whose level is at least the lowest one of their section, one by one."""
    heads = torch.arange(6).repeat_interleave(kv.counts.flatten()).tolist()
    kept = []
    for n, position in enumerate(kv.positions.tolist()):
        (section,) = (
            number for number, one in enumerate(header.sections) if one.first <= position < one.first + one.size
        )
        level = TOP_LEVEL if kv.levels is None else int(kv.levels[n])
        kept += [n] if level >= lowest[section] else []
    counts = torch.tensor([heads[n] for n in kept], dtype=torch.int64).bincount(minlength=6).view(2, 3)
    chosen = torch.tensor(kept, dtype=torch.int64)
    levels = None if kv.levels is None else kv.levels[chosen]
    return MemoryKV(kv.keys[chosen], kv.values[chosen], kv.positions[chosen], counts, kv.span, levels)


CHOICES = {
    "all": [0] * 8,
    "none": [LEVELS] * 8,
    "the top": [TOP_LEVEL] * 8,
    "some levels": [6] * 8,
    "some sections": [0, LEVELS, LEVELS, 0, LEVELS, 0, LEVELS, 0],
    "of each its own": [13, 0, 5, 14, 9, 1, 7, 2],
}


@every_precision
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("levels", [True, False])
def test_a_part_has_exactly_the_entries_of_the_chosen_levels(
    tmp_path: Path, precision: str, choice: str, levels: bool
) -> None:
    header, kv = document(precision, levels=levels)
    path, lowest = tmp_path / "a.safetensors", CHOICES[choice]
    write_kv_file(path, header, kv, TEXT)
    seen: list[StoredIndex] = []

    def choose(index: StoredIndex) -> list[int]:
        seen.append(index)
        return lowest

    part, whole = read_kv_file(path, choose), read_kv_file(path)
    assert same(whole.kv, kv)
    assert same(part.memory(), expected_part(header, whole.memory(), lowest))
    assert precision_of(part.kv) == precision
    assert (part.header, part.text, part.root) == (header, TEXT, whole.root)
    assert (part.lowest, whole.lowest) == (lowest, None)
    (told,) = seen
    for index in (told, read_index(path)):
        assert (index.header, index.root) == (header, whole.root)
        assert index.counts.shape == (8, LEVELS if levels else 1, 2, 3)
        assert index.counts.sum() == 6 * SLOTS


@pytest.mark.parametrize("levels", [True, False])
def test_groups_follow_from_the_counts(levels: bool) -> None:
    header, kv = document(levels=levels)
    _, places, counts = file_order(kv, header.sections)
    rows = rows_of(counts, places, header.sections)
    expected = group_numbers(kv.positions, kv.counts, kv.levels, header.window_starts)
    assert torch.equal(groups_of(counts, header.sections, rows), expected)
    lowest = CHOICES["of each its own"]
    part = rows_of(counts, places, header.sections, lowest)
    chosen = [n for n, row in enumerate(rows.numbers.tolist()) if row in set(part.numbers.tolist())]
    assert torch.equal(groups_of(counts, header.sections, part), expected[chosen])


def test_large_groups_of_many_sections_follow_from_the_counts() -> None:
    """More than one group for each head and window."""
    windows = (WindowSpan(900, 2, 0, 9, 900), WindowSpan(500, 2, 9, 12, 500))
    header = replace(document()[0], tokens=1400, span=1400, windows=windows)
    kv = memory(1400, 5000)
    kv = replace(kv, levels=torch.randint(0, LEVELS, (5000,)).to(torch.uint8))
    order, places, counts = file_order(kv, header.sections)
    rows = rows_of(counts, places, header.sections)
    expected = group_numbers(kv.positions, kv.counts, kv.levels, header.window_starts)
    assert int(expected.max()) > 70
    assert torch.equal(groups_of(counts, header.sections, rows), expected)
    assert torch.equal(order[rows.numbers], torch.arange(5000))
    assert isinstance(kv, MemoryKV)
    assert torch.equal(rows.positions, kv.positions)
    assert kv.levels is not None
    assert torch.equal(rows.levels, kv.levels)


def test_a_file_has_sections_and_in_them_levels_one_behind_another(tmp_path: Path) -> None:
    header, kv = document()
    order, places, counts = file_order(kv, header.sections)
    assert kv.levels is not None
    section = [next(n for n, one in enumerate(header.sections) if one.first <= at < one.first + one.size)
               for at in kv.positions.tolist()]  # fmt: skip
    heads = torch.arange(6).repeat_interleave(kv.counts.flatten()).tolist()
    keys = [(section[n], -int(kv.levels[n]), heads[n], int(kv.positions[n])) for n in range(6 * SLOTS)]
    assert order.tolist() == sorted(range(6 * SLOTS), key=keys.__getitem__)
    assert places.tolist() == [int(kv.positions[n]) - header.sections[section[n]].first for n in order.tolist()]
    for n in range(6 * SLOTS):
        counts[section[n], TOP_LEVEL - int(kv.levels[n]), heads[n] // 3, heads[n] % 3] -= 1
    assert not counts.any()


@every_precision
def test_what_is_read_is_checked_and_what_is_not_is_left_alone(tmp_path: Path, precision: str) -> None:
    header, kv = document(precision)
    path, lowest = tmp_path / "a.safetensors", CHOICES["of each its own"]
    write_kv_file(path, header, kv, TEXT)
    whole = path.read_bytes()
    head, _, data = parts(whole)
    start = len(whole) - len(data)
    _, places, counts = file_order(kv, header.sections)
    loaded = set(rows_of(counts, places, header.sections, lowest).numbers.tolist())
    assert 0 < len(loaded) < len(places)
    rng = torch.Generator().manual_seed(1)
    for name, said in head.items():
        if name == "__metadata__":
            continue
        first, last = said["data_offsets"]
        width = (last - first) // said["shape"][0]
        for at in torch.randint(first, last, (12,), generator=rng).tolist():
            row = (at - first) // width
            flipped = bytearray(whole)
            flipped[start + at] ^= 0x10
            path.write_bytes(flipped)
            of_rows = name in ("keys", "values", "places", "value_scales", "value_zeros")
            if name == "text":
                for choose in (None, lambda _: lowest):
                    with pytest.raises(CorruptFileError, match="the text in the file of 'doc' is not the one"):
                        _ = read_kv_file(path, choose).text
                continue
            with pytest.raises(CorruptFileError, match="hash differs"):
                read_kv_file(path)
            if of_rows and row not in loaded:
                part = read_kv_file(path, lambda _: lowest)
                path.write_bytes(whole)
                assert same(part.kv, read_kv_file(path, lambda _: lowest).kv)
            else:
                with pytest.raises(CorruptFileError, match="hash differs"):
                    read_kv_file(path, lambda _: lowest)


@pytest.mark.parametrize("lowest", [[0] * 7, [0] * 9, [], [-1] * 8, [15] * 8, [0.5] * 8])
def test_a_choice_that_cannot_be_is_the_fault_of_who_chooses(tmp_path: Path, lowest: list[int]) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *document(), TEXT)
    with pytest.raises(InputError, match="a level from 0 to 14 for each of 8 sections"):
        read_kv_file(path, lambda _: lowest)


def test_a_part_cannot_be_stored_as_the_document(tmp_path: Path) -> None:
    header, kv = document()
    write_kv_file(tmp_path / "a.safetensors", header, kv, TEXT)
    part = read_kv_file(tmp_path / "a.safetensors", lambda _: CHOICES["some levels"])
    with pytest.raises(InputError, match="entries, but its windows take"):
        write_kv_file(tmp_path / "b.safetensors", header, part.kv, TEXT)


def test_keys_that_were_quantized_across_windows_are_refused(tmp_path: Path) -> None:
    header, kv = document()
    packed = with_precision(kv, "int8")
    assert isinstance(packed, QuantizedKV)
    with pytest.raises(InputError, match="were not quantized window by window"):
        write_kv_file(tmp_path / "a.safetensors", header, packed, TEXT)


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_a_document_read_in_part_is_the_one_compressed_more(tmp_path: Path, precision: str) -> None:
    """At ratio 8 each window would have kept the entries of these levels, and no others."""
    model = tiny_model("llama", BeaconConfig(beacon_window=64), tokenizer=tiny_tokenizer())
    memory = BeaconMemory(tmp_path, model, reserve=100)
    memory.add("doc", TEXT, ratio=2, compression="select", precision=precision)
    path = memory.store.folder / memory.show("doc").file
    whole = read_kv_file(path)
    lowest = [level_of(8)] * whole.header.section_count
    part = read_kv_file(path, lambda _: lowest).memory()
    kv = whole.memory()
    assert kv.levels is not None
    chosen = (kv.levels >= level_of(8)).nonzero().flatten()
    for name in ("keys", "values", "positions", "levels"):
        assert torch.equal(getattr(part, name), getattr(kv, name)[chosen])
    wanted = sum(-(-window.tokens // 8) for window in whole.header.windows)
    heads = kv.counts.numel()
    assert abs(len(part.keys) - heads * wanted) <= heads * len(whole.header.windows)
    memory.add("eighth", TEXT, ratio=8, compression="select", precision="float32")
    eighth = memory.store.get("eighth").kv
    ours = part.between(0, whole.header.windows[0].span)
    theirs = eighth.between(0, whole.header.windows[0].span)
    assert torch.equal(ours.positions, theirs.positions)  # the first window was read behind nothing either way
    assert torch.equal(ours.counts, theirs.counts)


@pytest.mark.parametrize("first", [0, 2**30])
def test_rows_stand_in_the_order_of_a_memory_however_far_a_section_is_from_the_start(first: int) -> None:
    counts = torch.tensor([[[[2, 1, 0, 2]]]], dtype=torch.uint8)
    places = torch.tensor([3, 9, 4, 0, 255], dtype=torch.uint8)
    rows = rows_of(counts, places, [SectionSpan(0, first, 256, 0, 0)])
    assert rows.numbers.tolist() == [0, 1, 2, 3, 4]
    assert rows.positions.tolist() == [first + place for place in places.tolist()]


def test_sections_beyond_what_a_position_can_tell_are_refused() -> None:
    counts, places = torch.ones(1, 1, 1, 1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(InputError, match="a position is at most 2147483647"):
        rows_of(counts, places, [SectionSpan(0, 2**31 - 100, 256, 0, 0)])
