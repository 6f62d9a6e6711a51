from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kv_samples import TEXT, memory, same, sample, stack, write_kv_file
from old_formats import write_format_1, write_format_2, write_format_3

from beacon_memory.errors import CorruptFileError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.storage.files.header import DocumentHeader, WindowSpan
from beacon_memory.storage.files.kv_file import read_header, read_kv_file
from beacon_memory.storage.files.stored_kv import stored_bytes


def as_first_format(header: DocumentHeader) -> DocumentHeader:
    """What a header reads as that was written when all were of beacons, and windows had no span of their own."""
    windows = tuple(replace(window, span=window.slots) for window in header.windows)
    return replace(header, compression="beacon", span=header.slots, windows=windows, method=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_stack_of_beacons_in_the_first_format_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    kv = stack(6, dtype=dtype)
    header, _ = sample()
    write_format_1(path, header, kv)
    read = read_kv_file(path)
    assert read.header == as_first_format(header) == read_header(path)
    assert same(read.kv, MemoryKV.of(kv))
    assert read.text_bytes is None
    with pytest.raises(CorruptFileError, match="file of 'doc' is of a format that does not keep the text"):
        _ = read.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_memory_in_the_second_format_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    header, kv = sample(dtype=dtype)
    write_format_2(path, header, kv)
    read = read_kv_file(path)
    assert read.header == replace(header, method=None) == read_header(path)
    assert same(read.kv, kv)
    assert read.text_bytes is None


@pytest.mark.parametrize(
    ("compression", "span", "spans"),
    [("beacon", 6, (4, 2)), ("select", 13, (8, 5)), ("hybrid", 13, (0, 13)), ("hybrid", 9, (0, 9))],
)
def test_windows_of_the_second_format_get_the_spans_that_they_had(
    tmp_path: Path, compression: str, span: int, spans: tuple[int, int]
) -> None:
    header, _ = sample()
    written = replace(header, compression=compression, span=13)
    object.__setattr__(written, "span", span)  # what only the new windows forbid
    write_format_2(tmp_path / "a.safetensors", written, memory(span, 36))
    read = read_kv_file(tmp_path / "a.safetensors")
    assert tuple(window.span for window in read.header.windows) == spans
    assert (read.header.compression, read.header.span, read.kv.span) == (compression, span, span)


def test_a_document_without_windows_is_read_in_the_second_format(tmp_path: Path) -> None:
    header = replace(sample()[0], tokens=0, span=0, windows=(), tail_ids=(), compression="hybrid")
    write_format_2(tmp_path / "a.safetensors", header, memory(0, 0))
    assert read_header(tmp_path / "a.safetensors") == replace(header, method=None)


def test_keys_in_4_bits_of_the_third_format_are_not_rotated_and_stay_as_they_are(tmp_path: Path) -> None:
    path, new = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    header, kv = sample(dtype=torch.float32)
    stored = write_format_3(path, header, kv)
    read = read_kv_file(path)
    assert read.header == header == read_header(path)
    assert same(read.memory(), stored.dequantized(torch.float32))
    assert (read.memory().keys - kv.keys).abs().max() <= 0.51 * stored.key_scales.max()  # type: ignore[operator]
    assert read.text == TEXT
    write_kv_file(new, read.header, read.kv)
    again = read_kv_file(new)
    assert isinstance(again.kv, QuantizedKV)
    assert not again.kv.rotated
    assert same(again.kv, stored)


@pytest.mark.parametrize("number", [1, 2])
def test_what_was_read_in_an_old_format_is_written_in_the_new_one(tmp_path: Path, number: int) -> None:
    path, new = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    header, kv = sample()
    if number == 1:
        write_format_1(path, header, stack(6, dtype=torch.bfloat16))
    else:
        write_format_2(path, header, kv)
    read = read_kv_file(path)
    write_kv_file(new, read.header, read.kv, TEXT)
    again = read_kv_file(new)
    assert again.header == read.header
    assert same(again.kv, read.kv)
    assert again.text == TEXT
    assert stored_bytes(read.kv) == stored_bytes(again.kv)


@pytest.mark.parametrize("number", [1, 2])
def test_no_flipped_byte_of_an_old_file_goes_unnoticed(tmp_path: Path, number: int) -> None:
    path = tmp_path / "a.safetensors"
    header, kv = sample()
    if number == 1:
        write_format_1(path, header, stack(6, dtype=torch.bfloat16))
    else:
        write_format_2(path, header, kv)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x11]) + whole[position + 1 :])
        with pytest.raises(CorruptFileError, match=r"a\.safetensors"):
            read_kv_file(path)


@pytest.mark.parametrize(
    ("slots", "change", "message"),
    [
        (5, {}, "span is 5, but the windows' are 6"),
        (6, {"shape": [2, 3, 7, 4]}, r"its header cannot be read|not .*\[2, 3, 7, 4\]"),
        (6, {"shape": [36, 4]}, "header cannot be read"),
        (6, {"dtype": "torch.float16"}, "not .*torch.float16"),
        (6, {"shape": None}, "header cannot be read"),
        (6, {"sha256": "0" * 64}, "their hash differs"),
    ],
)
def test_a_first_format_that_contradicts_itself_is_corrupt(
    tmp_path: Path, slots: int, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    write_format_1(path, sample()[0], stack(slots), **change)
    with pytest.raises(CorruptFileError, match=message):
        read_kv_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": {"dtype": "torch.float16", "shape": [36, 4]}}, "its keys are .*, not .*torch.float16"),
        ({"places": {"dtype": "torch.int16", "shape": [36]}}, "its places are .*, not .*torch.int16"),
        ({"counts": 3}, "its counts are .*, not 3"),
        ({"sha256": "0" * 64}, "their hash differs"),
    ],
)
def test_a_second_format_that_contradicts_itself_is_corrupt(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    write_format_2(path, *sample(), **change)
    with pytest.raises(CorruptFileError, match=message):
        read_kv_file(path)


def test_windows_are_read_as_they_were_counted(tmp_path: Path) -> None:
    header, _ = sample()
    kept_raw = replace(header, windows=(WindowSpan(13, 0, 0, 9, 13),), tail_ids=())
    write_format_1(tmp_path / "a.safetensors", kept_raw, stack(13))
    assert read_kv_file(tmp_path / "a.safetensors").header.windows == (WindowSpan(13, 0, 0, 9, 13),)
