from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import forged
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_samples import FINGERPRINT, TEXT, finish, memory, same, sample, stack, start, write_kv_file
from safetensors import safe_open
from safetensors.torch import save_file

from beacon_memory.documents import Precision, Text, content_hash
from beacon_memory.errors import CorruptFileError, InputError
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.storage.files.header import LONGEST_SECTION, DocumentHeader, WindowSpan
from beacon_memory.storage.files.kv_file import read_header, read_kv_file, stage_kv_file
from beacon_memory.storage.files.kv_metadata import FORMAT_VERSION
from beacon_memory.storage.files.stored_kv import WindowedKV, precision_of, stored_bytes, with_precision

# What a file says of the tensors of `sample`: two sections, of all levels.
FORMS: dict[str, Any] = {
    "keys": {"dtype": "torch.bfloat16", "shape": [36, 4]},
    "values": {"dtype": "torch.bfloat16", "shape": [36, 4]},
    "places": {"dtype": "torch.uint8", "shape": [36]},
    "counts": {"dtype": "torch.uint8", "shape": [2, 14, 2, 3]},
    "hashes": {"dtype": "torch.uint8", "shape": [2, 14, 16]},
    "text": {"dtype": "torch.uint8", "shape": [len(TEXT)]},
}


@pytest.mark.parametrize("precision", Precision)
def test_what_was_written_is_read_back_bit_for_bit(tmp_path: Path, precision: str) -> None:
    header, kv = sample()
    stored = with_precision(kv, precision, header.window_starts)
    write_kv_file(tmp_path / "a.safetensors", header, stored)
    read = read_kv_file(tmp_path / "a.safetensors")
    assert read.header == header == read_header(tmp_path / "a.safetensors")
    assert same(read.kv, stored)
    assert precision_of(read.kv) == precision
    assert read.text == TEXT
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("precision", Precision)
def test_kv_that_come_window_by_window_make_the_same_file(tmp_path: Path, precision: str) -> None:
    header, _ = sample()
    header = replace(header, windows=tuple(WindowSpan(w.tokens, 0, w.start, w.stop, w.span) for w in header.windows))
    windows = [MemoryKV.of(stack(one.span, dtype=torch.bfloat16)) for one in header.windows]
    windows[0] = replace(windows[0], levels=torch.randperm(6 * 8).remainder(9).to(torch.uint8) + 3)
    whole = with_precision(MemoryKV.concat(windows), precision, header.window_starts)
    write_kv_file(tmp_path / "whole", header, whole)
    write_kv_file(tmp_path / "windows", header, WindowedKV(windows, Precision(precision)))
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "windows").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kv: replace(kv, span=9), "spans 9 positions, but its header says 8"),
        (lambda kv: kv.between(0, 8).only(torch.arange(48) > 0), "47 entries, but its windows take 8 slots"),
        (lambda kv: replace(kv, keys=kv.keys * torch.inf), "hold NaN or infinity"),
    ],
)
def test_a_window_that_the_header_does_not_describe_is_refused(
    tmp_path: Path, change: Callable[[MemoryKV], MemoryKV], message: str
) -> None:
    header, _ = sample()
    header = replace(header, windows=tuple(WindowSpan(w.tokens, 0, w.start, w.stop, w.span) for w in header.windows))
    first, last = (MemoryKV.of(stack(one.span)) for one in header.windows)
    with pytest.raises(InputError, match=message):
        stage_kv_file(tmp_path, header, WindowedKV([change(first), last], Precision.FLOAT32), Text(TEXT))
    assert not list(tmp_path.iterdir())


@given(id=st.text(min_size=1), text=st.text(), tail=st.lists(st.integers(0, 2**31), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_header_of_any_id_and_any_text_survive(
    tmp_path_factory: pytest.TempPathFactory, id: str, text: str, tail: list[int]
) -> None:
    kv = MemoryKV.of(stack(len(tail)))
    window = WindowSpan(len(tail), 0, 0, len(text), len(tail))
    header = DocumentHeader(id, content_hash(text), len(tail), (window,), tuple(tail), "beacon", kv.span, FINGERPRINT)
    path = tmp_path_factory.mktemp("ids") / "a.safetensors"
    write_kv_file(path, header, kv, text)
    assert read_header(path) == header
    assert read_kv_file(path).text == text


def test_kv_of_no_slots_and_no_text_can_be_kept(tmp_path: Path) -> None:
    header = DocumentHeader("nothing", content_hash(""), 0, (), (), "beacon", 0, FINGERPRINT)
    empty = MemoryKV.of(BeaconKV.empty(2, 3, 4, dtype=torch.bfloat16))
    for precision in Precision:
        write_kv_file(tmp_path / "a.safetensors", header, with_precision(empty, precision), "")
        read = read_kv_file(tmp_path / "a.safetensors")
        assert (read.header, read.text, precision_of(read.kv)) == (header, "", precision)
        kv = read.memory()
        assert (kv.keys.shape, kv.counts.tolist(), kv.span) == ((0, 4), [[0, 0, 0]] * 2, 0)


@pytest.mark.parametrize("span", [13, 128, 129, 1 << 15, (1 << 20) + 1])
def test_places_take_one_byte_in_any_span(tmp_path: Path, span: int) -> None:
    kv = replace(memory(13, 36, dtype=torch.bfloat16), span=span)
    kv = replace(kv, positions=kv.positions.index_fill(0, torch.tensor([35]), span - 1))
    window = WindowSpan(36, 6, 0, 4, span)
    header = DocumentHeader("doc", content_hash("text"), 36, (window,), (), "select", span, FINGERPRINT)
    write_kv_file(tmp_path / "a.safetensors", header, kv, "text")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.get_tensor("places").dtype == torch.uint8
        assert file.get_tensor("counts").shape == (header.section_count, 1, 2, 3)
    assert header.section_count >= span / LONGEST_SECTION
    read = read_kv_file(tmp_path / "a.safetensors").kv
    assert same(read, kv)
    assert stored_bytes(kv) == stored_bytes(read) == 36 * (2 * 4 * 2 + 1)


def test_a_file_is_read_onto_a_device_in_a_dtype(tmp_path: Path) -> None:
    header, kv = sample()
    path = tmp_path / "a.safetensors"
    write_kv_file(path, header, kv)
    assert same(read_kv_file(path).memory("cpu"), kv)
    assert same(read_kv_file(path).memory(dtype=torch.float32), kv.to(dtype=torch.float32))
    quantized = with_precision(kv, "int8", header.window_starts)
    assert isinstance(quantized, QuantizedKV)
    write_kv_file(path, header, quantized)
    assert same(read_kv_file(path).memory(), quantized.dequantized(torch.float32))
    assert same(read_kv_file(path).memory(dtype=torch.float16), quantized.dequantized(torch.float16))


def test_slices_and_tensors_that_share_memory_are_written_as_they_look(tmp_path: Path) -> None:
    header, kv = sample()
    every_other = torch.randn(72, 4, requires_grad=True)[::2]
    for shared in (every_other, every_other.contiguous()):
        kv = replace(kv, keys=shared, values=shared, positions=kv.positions.repeat_interleave(2)[::2])
        write_kv_file(tmp_path / "a.safetensors", header, kv)
        assert same(read_kv_file(tmp_path / "a.safetensors").kv, kv)


def test_what_was_read_can_be_written_again(tmp_path: Path) -> None:
    header, kv = sample()
    write_kv_file(tmp_path / "a", header, kv)
    read = read_kv_file(tmp_path / "a")
    write_kv_file(tmp_path / "b", read.header, read.kv, read.text)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_is_as_readable_as_its_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    write_kv_file(tmp_path / "a.safetensors", *sample())
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_replaced_file_stays_whole_for_who_has_read_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header, kv = sample()
    write_kv_file(path, header, kv)
    before = read_kv_file(path)
    write_kv_file(path, *sample(text="another text"), "another text")
    assert same(before.kv, kv)
    assert before.text == TEXT


def test_a_staged_file_is_a_temporary_one_until_it_is_given_its_name(tmp_path: Path) -> None:
    temp = stage_kv_file(tmp_path / "new" / "folder", *sample(), Text(TEXT)).path
    assert temp.parent == tmp_path / "new" / "folder"
    assert temp.name.startswith(".tmp")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert read_kv_file(temp).header.id == "doc"


def test_a_text_that_is_not_that_of_the_header_is_refused(tmp_path: Path) -> None:
    for text, message in (("another text", "made for another text: its content_hash differs"), ("\ud800", "surrogate")):
        with pytest.raises(InputError, match=message):
            stage_kv_file(tmp_path, *sample(), Text(text))
    assert not list(tmp_path.iterdir())


def test_a_header_that_no_reader_would_take_is_refused(tmp_path: Path) -> None:
    header, kv = sample("x" * (9 << 20))
    with pytest.raises(InputError, match=r"would take 9\d+ bytes; split the document"):
        stage_kv_file(tmp_path, header, kv, Text(TEXT))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float64, torch.int8, torch.bool])
def test_kv_of_no_precision_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    header, kv = sample()
    with pytest.raises(InputError, match=r"must be one of float32|must be of floating point, or quantized"):
        stage_kv_file(tmp_path, header, kv.to(dtype=dtype), Text(TEXT))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_store_error_and_leaves_nothing(tmp_path: Path) -> None:
    child = start(
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # as a full disk: no file may grow over 64 bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        stage_kv_file(folder, *sample(), Text(TEXT))
        """,
        tmp_path,
    )
    assert "StoreError: the K/V of 'doc' could not be written" in finish(child)[2]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: memory(13, 35), "35 entries, but its windows take 6 slots of each of 6 heads"),
        (lambda _: memory(12, 36), "spans 12 positions, but its header says 13"),
        (lambda kv: kv.interpolated(7), "positions must be int32, got torch.float32; keep it before"),
        (lambda kv: replace(kv, positions=kv.positions.float()), "positions must be int32, got torch.float32"),
        (lambda kv: replace(kv, values=kv.values.float()), "one dtype, got torch.bfloat16 and torch.float32"),
        (lambda kv: replace(kv, positions=kv.positions + 1), "positions go from 1 to 13, but it spans 13 positions"),
        (lambda kv: replace(kv, positions=kv.positions - 1), "positions go from -1 to 11"),
        (lambda kv: replace(kv, counts=torch.tensor([[-1, 37, 0], [0, 0, 0]])), "one of its 6 heads has -1 entries"),
        (lambda kv: replace(kv, counts=torch.tensor([[36]])), "36 entries, but its windows take 6 slots of each of 1"),
    ],
)
def test_kv_that_the_header_does_not_describe_are_refused(
    tmp_path: Path, change: Callable[[MemoryKV], MemoryKV], message: str
) -> None:
    header, _ = sample()
    places = torch.tensor([0, 2, 4, 6, 8, 12], dtype=torch.int32).repeat(6)
    kv = replace(MemoryKV.of(stack(6, dtype=torch.bfloat16)), positions=places, span=13)
    stage_kv_file(tmp_path, header, kv, Text(TEXT)).path.unlink()
    with pytest.raises(InputError, match=f"the K/V of 'doc' cannot be stored: .*{message}"):
        stage_kv_file(tmp_path, header, change(kv), Text(TEXT))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "must not be empty"),
        ({"id": "\ud800"}, "surrogate"),
        ({"tokens": 12}, "the windows hold 13"),
        ({"tokens": True}, "must be an integer"),
        ({"tail_ids": (1, 2)}, "the last window holds 5"),
        ({"tail_ids": (1, 2, 3, 4, -5)}, "at least 0, got -5"),
        ({"content_hash": None}, "content_hash must be a text"),
        ({"compression": "auto"}, "compression is 'auto', but must be the name of a method"),
        ({"compression": None}, "compression is None"),
        ({"span": -1}, "span must be an integer of at least 0, got -1"),
        ({"span": 2.0}, "span must be an integer"),
        ({"span": 12}, "span is 12, but the windows' are 13"),
        ({"span": 1 << 63}, "below 2"),
        ({"method": {"score": None}}, "method must have texts or numbers under names"),
        ({"method": {3.5: "a"}}, "method must have texts or numbers"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(sample()[0], **change)  # type: ignore[arg-type]  # wrong on purpose


def test_windows_that_are_due_to_be_compressed_are_raw_and_the_last_ones() -> None:
    header = sample()[0]
    *first, last = header.windows
    due = replace(last, ratio=0, due=4)
    assert replace(header, windows=(*first, due)).settled == tuple(first)
    with pytest.raises(InputError, match="must be the last ones"):
        replace(header, windows=(due, *first))
    with pytest.raises(InputError, match="a window due at ratio 4 must be at ratio 0, got 8"):
        replace(due, ratio=8)
    with pytest.raises(InputError, match="due ratio must be an integer of at least 0, got -1"):
        replace(due, due=-1)


def test_a_window_counts_a_beacon_for_its_incomplete_unit() -> None:
    slots = [WindowSpan(tokens, ratio, 0, 0, 9).slots for tokens, ratio in [(8, 4), (9, 4), (0, 4), (5, 0)]]
    assert slots == [2, 3, 0, 5]
    with pytest.raises(InputError, match=r"start, cuts and stop must not fall, got \[2, 1\]"):
        WindowSpan(1, 1, 2, 1, 1)
    with pytest.raises(InputError, match="a window's span must be an integer of at least 0, got -1"):
        WindowSpan(1, 1, 0, 1, -1)


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    for read in (read_header, read_kv_file):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nowhere.safetensors")


def test_no_flipped_byte_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header, kv = sample()
    write_kv_file(path, header, kv)
    whole = path.read_bytes()
    text = whole.index(TEXT.encode())
    for position in range(len(whole)):
        in_text = text <= position < text + len(TEXT)
        path.write_bytes(
            whole[:position] + bytes([whole[position] ^ (0x01, 0xFF)[position % 2]]) + whole[position + 1 :]
        )
        with pytest.raises(CorruptFileError, match="text in the file of 'doc'" if in_text else r"a\.safetensors"):
            read_kv_file(path)


def test_a_header_that_is_read_is_the_one_that_was_written_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *sample())
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for position in range(0, end, 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x01]) + whole[position + 1 :])
        with pytest.raises(CorruptFileError):
            read_kv_file(path)


def test_a_cut_file_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *sample())
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        for read in (read_header, read_kv_file):
            with pytest.raises(CorruptFileError, match=r"not a whole safetensors file.*beacon-memory verify"):
                read(path)


def test_what_is_not_ours_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CorruptFileError, match="it is no plain file"):
        read_header(tmp_path)
    path.write_text("once upon a time " * 100)
    with pytest.raises(CorruptFileError, match="safetensors"):
        read_header(path)
    save_file({"keys": torch.zeros(2)}, path)
    with pytest.raises(CorruptFileError, match="no metadata entry 'beacon_memory'"):
        read_header(path)


def _rewrite(path: Path, change: dict[str, object], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write the file again with another metadata entry, sealed as a foreign writer would."""
    from beacon_memory.storage.files.checked_json import json_checksum

    with safe_open(path, framework="pt") as file:
        entry = json.loads(file.metadata()["beacon_memory"])
        tensors = tensors or {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    del entry["sha256"]
    entry |= change
    save_file(tensors, path, metadata={"beacon_memory": json.dumps({**entry, "sha256": json_checksum(entry)})})


def test_a_newer_format_says_to_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *sample())
    _rewrite(path, {"format": FORMAT_VERSION + 1, "header": "of another kind"})
    with pytest.raises(CorruptFileError, match=r"a\.safetensors has format 6.*newer.*upgrade beacon_memory"):
        read_header(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "1"}, "no format version"),
        ({"format": True}, "no format version"),
        ({"format": 0}, "no format version"),
        ({"header": None}, "header cannot be read"),
        ({"header": {}}, "header cannot be read"),
        ({"header": [1, 2]}, "header cannot be read"),
        ({"tensors": {}}, "it holds counts, hashes, keys, places, text, values, but should hold"),
        ({"tensors": [1, 2]}, "header cannot be read"),
        ({"tensors": FORMS | {"key_scales": FORMS["keys"]}}, "but should hold counts, hashes, key_scales, key_zeros"),
        ({"tensors": dict.fromkeys(FORMS, 3)}, "its counts are .*, not 3"),
        ({"tensors": FORMS | {"values": {"dtype": "torch.float32", "shape": [36, 4]}}}, "its values are"),
        ({"tensors": FORMS | {"places": {"dtype": "torch.uint8", "shape": [35]}}}, r"not .*\[35\]"),
        ({"tensors": FORMS | {"counts": {"dtype": "torch.int64", "shape": [2, 14, 2, 3]}}}, "not .*int64"),
        ({"index": ""}, "its index is not the one that was written"),
        ({"index": None}, "its index is not the one that was written"),
        ({"format": 4}, "has format 4 of an older beacon_memory.*`beacon-memory recompress` makes such files anew"),
        ({"format": 1, "tensors": FORMS["keys"]}, "has format 1 of an older beacon_memory"),
    ],
)
def test_a_sealed_header_of_wrong_types_is_corrupt(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *sample())
    _rewrite(path, change)
    with pytest.raises(CorruptFileError, match=message):
        read_kv_file(path)


@pytest.mark.parametrize("field", [field.name for field in fields(DocumentHeader)])
def test_a_header_without_one_of_its_fields_is_corrupt(tmp_path: Path, field: str) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *sample())
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["beacon_memory"])["header"]
    for wrong in ({**header, field: 3.5}, {name: value for name, value in header.items() if name != field}):
        _rewrite(path, {"header": wrong})
        with pytest.raises(CorruptFileError, match=r"header cannot be read|slots"):
            read_header(path)
        write_kv_file(path, *sample())


def _replace_tensors(path: Path, **changed: torch.Tensor | None) -> None:
    """Write other tensors into the file, None for one that is left out, and describe them as they are."""
    path.write_bytes(forged(path.read_bytes(), changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": torch.zeros(35, 4, dtype=torch.bfloat16)}, "its values are .* but its counts tell of 36 entries"),
        ({"values": torch.zeros(36, 3, dtype=torch.bfloat16)}, r"\(36, 4\) and \(36, 3\)"),
        ({"values": torch.zeros(36, 4)}, "one dtype, got torch.bfloat16 and torch.float32"),
        ({"keys": None, "values": None}, "it holds counts, hashes, places, text, but should hold counts, hashes, keys"),
        ({"places": None, "counts": None}, "it holds hashes, keys, text, values, but should hold counts, hashes, keys"),
        ({"text": None}, "but should hold counts, hashes, keys, places, text, values"),
        ({"more": torch.zeros(1)}, "it holds counts, hashes, keys, more, places, text, values, but should hold"),
        ({"places": torch.zeros(35, dtype=torch.uint8)}, "its places are .* but its counts tell of 36 entries"),
        ({"places": torch.zeros(36)}, "its places are .*torch.float32"),
        ({"places": torch.zeros(36, dtype=torch.int16)}, "its places are .*torch.int16"),
        ({"places": torch.zeros(36, 1, dtype=torch.uint8)}, r"its places are .*\[36, 1\]"),
        ({"text": torch.zeros(66)}, "its text is .*torch.float32.* and no bytes"),
        ({"text": torch.zeros(6, 11, dtype=torch.uint8)}, "its text is .* and no bytes"),
        ({"counts": torch.full((2, 1, 2, 3), 3)}, "its counts are .*torch.int64.*cannot be those of 2 sections"),
        ({"counts": torch.full((2, 3), 6, dtype=torch.uint8)}, "cannot be those of 2 sections"),
        ({"counts": torch.full((3, 1, 2, 3), 2, dtype=torch.uint8)}, "cannot be those of 2 sections"),
        ({"counts": torch.full((2, 15, 2, 3), 2, dtype=torch.uint8)}, "cannot be those of 2 sections"),
        ({"counts": torch.full((2, 1, 2, 3), 2, dtype=torch.uint8)}, "its counts tell of 24 entries"),
        (
            {"counts": torch.tensor([[[[9] * 2]], [[[9] * 2]]], dtype=torch.uint8)},
            "more entries in a section than that",
        ),
        ({"counts": torch.full((2, 1, 1, 4), 4.5).to(torch.uint8)}, "its counts tell of 32 entries"),
        ({"counts": torch.tensor([[[[5, 5, 4, 4]]], [[[5, 5, 4, 4]]]], dtype=torch.uint8)}, "6 slots of each of 4"),
        ({"hashes": torch.zeros(2, 14, 16, dtype=torch.uint8)}, "not those that were written: their hash differs"),
        ({"hashes": torch.zeros(2, 14, 8, dtype=torch.uint8)}, "cannot be those of 2 sections"),
        ({"hashes": torch.zeros(2, 14, 16)}, "cannot be those of 2 sections"),
    ],
)
def test_tensors_that_do_not_fit_each_other_or_the_header_are_corrupt(
    tmp_path: Path, changed: dict[str, torch.Tensor | None], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *sample())
    _replace_tensors(path)
    assert read_kv_file(path).text == TEXT
    _replace_tensors(path, **changed)
    with pytest.raises(CorruptFileError, match=rf"a\.safetensors cannot be used: .*{message}"):
        read_kv_file(path)
    assert read_header(path).id == "doc"


@pytest.mark.parametrize("text", [b"another text", b"", TEXT.encode() + b" ", b"\xff\xfe"])
def test_a_text_that_is_not_the_one_that_the_header_names_is_corrupt(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "a.safetensors"
    header, kv = sample()
    write_kv_file(path, header, kv)
    _replace_tensors(path, text=torch.tensor(list(text), dtype=torch.uint8))
    with pytest.raises(
        CorruptFileError, match=r"a\.safetensors .*text in the file of 'doc' is not the one that its head"
    ):
        read_kv_file(path)
    part = read_kv_file(path, lambda index: [0] * index.header.section_count)  # which is read without the text
    assert same(part.kv, kv)
    with pytest.raises(CorruptFileError, match="text in the file of 'doc' is not the one that its header names"):
        _ = part.text


def test_a_text_that_is_no_utf8_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header, kv = sample()
    write_kv_file(path, header, kv)
    data = b"\xff\xfe"
    _replace_tensors(path, text=torch.tensor(list(data), dtype=torch.uint8))
    _rewrite(path, {"header": asdict(replace(header, content_hash=hashlib.sha256(data).hexdigest()))})
    with pytest.raises(CorruptFileError, match="text in the file of 'doc' is not UTF-8"):
        _ = read_kv_file(path).text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"value_zeros": None}, "but should hold .* value_scales, value_zeros"),
        ({"key_scales": torch.zeros(6, 8, dtype=torch.float16)}, "bits is 4, but must be|must be"),
        ({"key_scales": torch.zeros(6, 3, dtype=torch.float16)}, "bits is 10"),
        ({"key_scales": torch.zeros((), dtype=torch.float16)}, "must be"),
        ({"key_zeros": torch.zeros(5, 4, dtype=torch.float16)}, "key_zeros must be"),
        ({"value_scales": torch.zeros(36)}, "value_scales must be"),
        ({"value_scales": torch.zeros(35).half()}, "its value_scales are .* but its counts tell of 36 entries"),
        ({"keys": torch.zeros(36, 4)}, "keys must be"),
        ({"key_scales": torch.zeros(3, 4).half(), "key_zeros": torch.zeros(3, 4).half()}, "groups must be numbers"),
    ],
)
def test_scales_that_do_not_fit_are_corrupt(
    tmp_path: Path, changed: dict[str, torch.Tensor | None], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    header, kv = sample()
    write_kv_file(path, header, with_precision(kv, "int8", header.window_starts))
    _replace_tensors(path)
    assert precision_of(read_kv_file(path).kv) == "int8"
    _replace_tensors(path, **changed)
    with pytest.raises(CorruptFileError, match=message):
        read_kv_file(path)


@pytest.mark.parametrize("place", [5, 8, 255])
def test_entries_behind_the_span_are_corrupt(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *sample())
    _replace_tensors(path, places=torch.full((36,), place, dtype=torch.uint8))
    with pytest.raises(CorruptFileError, match=f"positions go from {place} to {8 + place}, but it spans 13 positions"):
        read_kv_file(path)


def test_a_span_of_another_document_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header, _ = sample()
    places = torch.tensor([0, 2, 4, 6, 8, 12], dtype=torch.int32).repeat(6)
    write_kv_file(path, header, replace(MemoryKV.of(stack(6)), positions=places, span=13))
    first, last = header.windows
    one_less = asdict(replace(header, span=12, windows=(first, replace(last, span=4))))
    path.write_bytes(forged(path.read_bytes(), **one_less))
    with pytest.raises(CorruptFileError, match="to 12, but it spans 12 positions"):
        read_kv_file(path)
