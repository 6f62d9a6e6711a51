from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_samples import FINGERPRINT, finish, memory, same, sample, stack, start
from safetensors import safe_open
from safetensors.torch import save_file

from beacon_memory.errors import CorruptFileError, InputError
from beacon_memory.kv import BeaconKV, MemoryKV
from beacon_memory.kv_file import (
    FORMAT_VERSION,
    DocumentHeader,
    WindowSpan,
    check_kv_file,
    publish,
    read_header,
    read_kv_file,
    stage_kv_file,
    write_kv_file,
)

# What a file says of the tensors of `sample`, their digest apart.
FORMS: dict[str, Any] = {
    "keys": {"dtype": "torch.bfloat16", "shape": [36, 4]},
    "values": {"dtype": "torch.bfloat16", "shape": [36, 4]},
    "places": {"dtype": "torch.int32", "shape": [36]},
    "counts": {"dtype": "torch.int32", "shape": [2, 3]},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_was_written_is_read_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    header, kv = sample(dtype=dtype)
    write_kv_file(tmp_path / "a.safetensors", header, kv)
    read, read_kv = read_kv_file(tmp_path / "a.safetensors")
    assert read == header == read_header(tmp_path / "a.safetensors") == check_kv_file(tmp_path / "a.safetensors")
    assert same(read_kv, kv)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@given(id=st.text(min_size=1), tail=st.lists(st.integers(0, 2**31), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_header_of_any_id_survives(tmp_path_factory: pytest.TempPathFactory, id: str, tail: list[int]) -> None:
    kv = MemoryKV.of(stack(len(tail)))
    window = WindowSpan(len(tail), 0, 0, 9)
    header = DocumentHeader(id, "0" * 64, len(tail), (window,), tuple(tail), "beacon", kv.span, FINGERPRINT)
    path = tmp_path_factory.mktemp("ids") / "a.safetensors"
    write_kv_file(path, header, kv)
    assert read_header(path) == header


def test_kv_of_no_slots_can_be_kept(tmp_path: Path) -> None:
    header = DocumentHeader("nothing", "0" * 64, 0, (), (), "beacon", 0, FINGERPRINT)
    write_kv_file(tmp_path / "a.safetensors", header, MemoryKV.of(BeaconKV.empty(2, 3, 4, dtype=torch.bfloat16)))
    assert check_kv_file(tmp_path / "a.safetensors") == header
    kv = read_kv_file(tmp_path / "a.safetensors")[1]
    assert (kv.keys.shape, kv.counts.tolist(), kv.span) == ((0, 4), [[0, 0, 0]] * 2, 0)


def test_slices_and_tensors_that_share_memory_are_written_as_they_look(tmp_path: Path) -> None:
    header, kv = sample()
    every_other = torch.randn(72, 4, requires_grad=True)[::2]
    for shared in (every_other, every_other.contiguous()):
        kv = replace(kv, keys=shared, values=shared, places=kv.places.repeat_interleave(2)[::2])
        write_kv_file(tmp_path / "a.safetensors", header, kv)
        assert same(read_kv_file(tmp_path / "a.safetensors")[1], kv)


def test_what_was_read_can_be_written_again(tmp_path: Path) -> None:
    header, kv = sample()
    for name in ("a", "b"):
        write_kv_file(tmp_path / name, header, kv)
        header, kv = read_kv_file(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_is_as_readable_as_its_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    write_kv_file(tmp_path / "a.safetensors", *sample())
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_replaced_file_stays_whole_for_who_has_read_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header, kv = sample()
    write_kv_file(path, header, kv)
    _, before = read_kv_file(path)
    write_kv_file(path, *sample())
    assert same(before, kv)


def test_a_staged_file_is_not_seen_until_it_is_published(tmp_path: Path) -> None:
    temp = stage_kv_file(tmp_path / "new" / "folder", *sample())
    assert temp.parent == tmp_path / "new" / "folder"
    assert not list(tmp_path.rglob("*.safetensors"))
    publish(temp, temp.parent / "a.safetensors")
    assert check_kv_file(temp.parent / "a.safetensors").id == "doc"
    assert not temp.exists()


def test_a_failed_publish_removes_the_temporary_file(tmp_path: Path) -> None:
    temp = stage_kv_file(tmp_path, *sample())
    with pytest.raises(FileNotFoundError):
        publish(temp, tmp_path / "no such folder" / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_kv_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    header, kv = sample()
    with pytest.raises(Exception, match="complex128"):
        stage_kv_file(tmp_path, header, kv.to(dtype=torch.complex128))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_store_error_and_leaves_nothing(tmp_path: Path) -> None:
    child = start(
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # as a full disk: no file may grow over 64 bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        stage_kv_file(folder, *sample())
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
        (lambda kv: kv.squeezed(7), "places must be int32, got torch.float32; of a squeezed memory"),
        (lambda kv: replace(kv, places=kv.places.float()), "places must be int32, got torch.float32"),
        (lambda kv: replace(kv, values=kv.values.float()), "one dtype, got torch.bfloat16 and torch.float32"),
        (lambda kv: replace(kv, places=kv.places + 1), "places go from 1 to 13, but it spans 13 positions"),
        (lambda kv: replace(kv, places=kv.places - 1), "places go from -1 to 11"),
        (lambda kv: replace(kv, counts=torch.tensor([[-1, 37, 0], [0, 0, 0]])), "one of its heads has -1 entries"),
        (lambda kv: replace(kv, counts=torch.tensor([[36]])), "36 entries, but its windows take 6 slots of each of 1"),
    ],
)
def test_kv_that_the_header_does_not_describe_are_refused(
    tmp_path: Path, change: Callable[[MemoryKV], MemoryKV], message: str
) -> None:
    header, _ = sample()
    places = torch.tensor([0, 2, 4, 6, 8, 12], dtype=torch.int32).repeat(6)
    kv = replace(MemoryKV.of(stack(6, dtype=torch.bfloat16)), places=places, span=13)
    stage_kv_file(tmp_path, header, kv).unlink()
    with pytest.raises(InputError, match=f"the K/V of 'doc' cannot be stored: .*{message}"):
        stage_kv_file(tmp_path, header, change(kv))
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
        ({"compression": "auto"}, "compression is 'auto', but must be one of beacon, select, hybrid"),
        ({"compression": None}, "compression is None"),
        ({"span": -1}, "span must be an integer of at least 0, got -1"),
        ({"span": 2.0}, "span must be an integer"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(sample()[0], **change)  # type: ignore[arg-type]  # wrong on purpose


def test_a_window_counts_a_beacon_for_its_incomplete_unit() -> None:
    assert [WindowSpan(tokens, ratio, 0, 0).slots for tokens, ratio in [(8, 4), (9, 4), (0, 4), (5, 0)]] == [2, 3, 0, 5]
    with pytest.raises(InputError, match="stop 1 lies before its start 2"):
        WindowSpan(1, 1, 2, 1)


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    for read in (read_header, read_kv_file, check_kv_file):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nowhere.safetensors")


def test_no_flipped_byte_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header, kv = sample()
    write_kv_file(path, header, kv)
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        for mask in (0x01, 0x20, 0xFF):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
            with pytest.raises(CorruptFileError, match=r"a\.safetensors"):
                check_kv_file(path)


def test_a_header_that_is_read_is_the_one_that_was_written_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *sample())
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for position in range(0, end, 2):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x01]) + whole[position + 1 :])
        with pytest.raises(CorruptFileError):
            read_kv_file(path)


def test_a_cut_file_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *sample())
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        for read in (read_header, read_kv_file, check_kv_file):
            with pytest.raises(CorruptFileError, match=r"not a whole safetensors file.*beacon-memory verify"):
                read(path)


def test_what_is_not_ours_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CorruptFileError, match="folder"):
        read_header(tmp_path)
    path.write_text("once upon a time " * 100)
    with pytest.raises(CorruptFileError, match="safetensors"):
        read_header(path)
    save_file({"keys": torch.zeros(2)}, path)
    with pytest.raises(CorruptFileError, match="no metadata entry 'beacon_memory'"):
        read_header(path)


def _rewrite(path: Path, change: dict[str, object], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write the file again with another metadata entry, sealed as a foreign writer would."""
    from beacon_memory.kv_file import _seal

    with safe_open(path, framework="pt") as file:
        entry = json.loads(file.metadata()["beacon_memory"])
        tensors = tensors or {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    del entry["sha256"]
    entry |= change
    save_file(tensors, path, metadata={"beacon_memory": json.dumps({**entry, "sha256": _seal(entry)})})


def test_a_newer_format_says_to_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *sample())
    _rewrite(path, {"format": FORMAT_VERSION + 1, "header": "of another kind"})
    with pytest.raises(CorruptFileError, match=r"a\.safetensors has format 3.*newer.*upgrade beacon_memory"):
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
        ({"tensors": {}}, "header cannot be read"),
        ({"tensors": [1, 2]}, "header cannot be read"),
        ({"tensors": dict.fromkeys(FORMS, 3) | {"sha256": ""}}, "its counts are .*, not 3"),
        ({"tensors": FORMS}, "header cannot be read"),
        ({"tensors": FORMS | {"values": {"dtype": "torch.float32", "shape": [36, 4]}, "sha256": ""}}, "its values are"),
        ({"tensors": FORMS | {"places": {"dtype": "torch.int32", "shape": [35]}, "sha256": ""}}, r"not .*\[35\]"),
        ({"tensors": FORMS | {"counts": {"dtype": "torch.int64", "shape": [2, 3]}, "sha256": ""}}, "not .*int64"),
        ({"format": 1}, "header cannot be read"),
        ({"format": 1, "tensors": FORMS["keys"] | {"sha256": ""}}, "header cannot be read"),
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
    from beacon_memory.kv_file import _digest

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    tensors = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
    forms = {name: {"dtype": str(tensor.dtype), "shape": [*tensor.shape]} for name, tensor in tensors.items()}
    _rewrite(path, {"tensors": FORMS | forms | {"sha256": _digest(tensors)}}, tensors)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": torch.zeros(35, 4, dtype=torch.bfloat16)}, r"\(36, 4\) and \(35, 4\)"),
        ({"values": torch.zeros(36, 4)}, "one dtype, got torch.bfloat16 and torch.float32"),
        ({"keys": None, "values": None}, "holds the tensors counts, places, not counts, keys, places, values"),
        ({"places": None, "counts": None}, "holds the tensors keys, values, not counts, keys, places, values"),
        ({"more": torch.zeros(1)}, "holds the tensors counts, keys, more, places, values"),
        ({"places": torch.zeros(35, dtype=torch.int32)}, r"places must be \[36 entries\]"),
        ({"places": torch.zeros(36)}, "places must be int32, got torch.float32"),
        ({"counts": torch.full((2, 3), 6)}, "counts must be int32, got torch.int64"),
        ({"counts": torch.full((6,), 6, dtype=torch.int32)}, r"counts \[layers, kv_heads\], got .* and \(6,\)"),
        ({"counts": torch.full((2, 3), 5, dtype=torch.int32)}, r"\[30 entries, head_dim\], got \(36, 4\)"),
        ({"counts": torch.full((2, 2), 9, dtype=torch.int32)}, "36 entries, but its windows take 6 slots of each of 4"),
    ],
)
def test_tensors_that_do_not_fit_each_other_or_the_header_are_corrupt(
    tmp_path: Path, changed: dict[str, torch.Tensor | None], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *sample())
    _replace_tensors(path)
    assert read_header(path).id == "doc"
    _replace_tensors(path, **changed)
    for read in (read_header, read_kv_file, check_kv_file):
        with pytest.raises(CorruptFileError, match=rf"a\.safetensors cannot be used: .*{message}"):
            read(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"places": torch.full((36,), 13, dtype=torch.int32)}, "places go from 13 to 13, but it spans 13 positions"),
        ({"places": torch.full((36,), -1, dtype=torch.int32)}, "places go from -1 to -1"),
        ({"counts": torch.tensor([[-1, 37, 0], [0, 0, 0]], dtype=torch.int32)}, "one of its heads has -1 entries"),
    ],
)
def test_entries_without_head_or_place_are_corrupt(
    tmp_path: Path, changed: dict[str, torch.Tensor | None], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *sample())
    _replace_tensors(path, **changed)
    for read in (read_kv_file, check_kv_file):
        with pytest.raises(CorruptFileError, match=message):
            read(path)


def test_a_span_of_another_document_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header, kv = sample()
    write_kv_file(path, header, replace(kv, places=kv.places.clamp(max=12).index_fill(0, torch.tensor([0]), 12)))
    _rewrite(path, {"header": asdict(replace(header, span=12))})
    with pytest.raises(CorruptFileError, match="to 12, but it spans 12 positions"):
        read_kv_file(path)


def _write_format_1(path: Path, kv: BeaconKV, change: dict[str, object]) -> DocumentHeader:
    """A file as the first version wrote it, and the header that it reads as."""
    header, _ = sample()
    old = {name: value for name, value in asdict(header).items() if name not in ("compression", "span")}
    hasher = hashlib.sha256()
    for tensor in (kv.keys, kv.values):
        hasher.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.view(torch.uint8).numpy().tobytes())
    said = {"dtype": str(kv.keys.dtype), "shape": list(kv.keys.shape), "sha256": hasher.hexdigest()}
    entry = {"format": 1, "header": old, "tensors": said | change}
    entry["sha256"] = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
    save_file({"keys": kv.keys, "values": kv.values}, path, metadata={"beacon_memory": json.dumps(entry)})
    return replace(header, compression="beacon", span=6)


def test_a_stack_of_beacons_in_the_first_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    kv = stack(6, dtype=torch.bfloat16)
    header = _write_format_1(path, kv, {})
    read, read_kv = read_kv_file(path)
    assert read == header == read_header(path) == check_kv_file(path)
    assert same(read_kv, MemoryKV.of(kv))
    write_kv_file(tmp_path / "b.safetensors", read, read_kv)
    assert same(read_kv_file(tmp_path / "b.safetensors")[1], read_kv)
    whole = path.read_bytes()
    for position in range(len(whole) - 2 * kv.keys.nbytes, len(whole), 5):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CorruptFileError, match="digest differs"):
            check_kv_file(path)


@pytest.mark.parametrize(
    ("slots", "change", "message"),
    [
        (5, {}, "30 entries, but its windows take 6 slots"),
        (6, {"shape": [2, 3, 7, 4]}, r"not .*\[2, 3, 7, 4\]"),
        (6, {"shape": [36, 4]}, "header cannot be read"),
        (6, {"dtype": "torch.float16"}, "not .*torch.float16"),
        (6, {"shape": None}, "header cannot be read"),
    ],
)
def test_a_first_format_that_contradicts_itself_is_corrupt(
    tmp_path: Path, slots: int, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    _write_format_1(path, stack(slots), change)
    for read in (read_header, read_kv_file, check_kv_file):
        with pytest.raises(CorruptFileError, match=message):
            read(path)
