from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_samples import FINGERPRINT, finish, same, sample, start
from safetensors import safe_open
from safetensors.torch import save_file

from beacon_memory.errors import CorruptFileError, InputError
from beacon_memory.kv import BeaconKV
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
    header = DocumentHeader(id, "0" * 64, len(tail), (WindowSpan(len(tail), 0, 0, 9),), tuple(tail), FINGERPRINT)
    path = tmp_path_factory.mktemp("ids") / "a.safetensors"
    write_kv_file(path, header, BeaconKV(torch.randn(1, 1, len(tail), 2), torch.randn(1, 1, len(tail), 2)))
    assert read_header(path) == header


def test_kv_of_no_slots_can_be_kept(tmp_path: Path) -> None:
    header = DocumentHeader("nothing", "0" * 64, 0, (), (), FINGERPRINT)
    write_kv_file(tmp_path / "a.safetensors", header, BeaconKV.empty(2, 3, 4, dtype=torch.bfloat16))
    assert check_kv_file(tmp_path / "a.safetensors") == header
    assert read_kv_file(tmp_path / "a.safetensors")[1].keys.shape == (2, 3, 0, 4)


def test_slices_and_tensors_that_share_memory_are_written_as_they_look(tmp_path: Path) -> None:
    header, _ = sample()
    every_other = torch.randn(2, 3, 12, 4, requires_grad=True)[:, :, ::2]
    write_kv_file(tmp_path / "a.safetensors", header, BeaconKV(every_other, every_other))
    assert same(read_kv_file(tmp_path / "a.safetensors")[1], BeaconKV(every_other, every_other))


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
    unsupported = BeaconKV(kv.keys.to(torch.complex128), kv.values.to(torch.complex128))
    with pytest.raises(Exception, match="complex128"):
        stage_kv_file(tmp_path, header, unsupported)
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


def test_kv_with_other_slots_than_the_windows_take_are_refused(tmp_path: Path) -> None:
    header, kv = sample()
    with pytest.raises(InputError, match="take 6 slots, but its K/V have 5"):
        stage_kv_file(tmp_path, header, kv[:5])
    with pytest.raises(InputError, match="one dtype"):
        stage_kv_file(tmp_path, header, BeaconKV(kv.keys, kv.values.float()))
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
    with pytest.raises(CorruptFileError, match=r"a\.safetensors has format 2.*newer.*upgrade beacon_memory"):
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
        ({"tensors": {"dtype": "torch.float32", "shape": [2, 3, 6, 4], "sha256": ""}}, "bfloat16"),
        ({"tensors": {"dtype": "torch.bfloat16", "shape": [2, 3, 7, 4], "sha256": ""}}, r"not \[2, 3, 7, 4\]"),
    ],
)
def test_a_sealed_header_of_wrong_types_is_corrupt(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "a.safetensors"
    write_kv_file(path, *sample())
    _rewrite(path, change)
    with pytest.raises(CorruptFileError, match=message):
        read_kv_file(path)


@pytest.mark.parametrize("field", ["id", "content_hash", "tokens", "windows", "tail_ids", "fingerprint", "created_at"])
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


def test_tensors_that_do_not_fit_the_header_are_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    shapes = {"keys": (2, 3, 6, 4), "values": (2, 3, 5, 4)}
    write_kv_file(path, *sample())
    _rewrite(path, {}, {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()})
    with pytest.raises(CorruptFileError, match=r"values \[2, 3, 5, 4\]"):
        read_header(path)
    write_kv_file(path, *sample())
    _rewrite(path, {}, {"keys": torch.zeros(2, 3, 6, 4)})
    with pytest.raises(CorruptFileError, match=r"\['keys'\], not keys and values"):
        read_header(path)
    fewer = {"dtype": "torch.float32", "shape": [2, 3, 4, 4], "sha256": ""}
    write_kv_file(path, *sample())
    _rewrite(path, {"tensors": fewer}, {"keys": torch.zeros(2, 3, 4, 4), "values": torch.zeros(2, 3, 4, 4)})
    with pytest.raises(CorruptFileError, match="holds 4 slots, but its windows take 6"):
        read_header(path)
