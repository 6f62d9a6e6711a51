from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from catalog_samples import LATER, LONG_AGO
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_memory.documents import Label
from beacon_memory.errors import CorruptFileError, StoreError
from beacon_memory.storage.files.label_file import StoredLabel, label_name, read_label, stage_label

LABEL = StoredLabel("doc", "space", LONG_AGO, Label({"a": [1, {"b": None}]}, ["x"], True, LATER), LATER)


@given(
    id=st.text(min_size=1),
    namespace=st.text(),
    metadata=st.dictionaries(st.text(), st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)),
    tags=st.sets(st.text(min_size=1)),
)
@settings(max_examples=30, deadline=None)
def test_a_label_survives_as_a_file(
    tmp_path_factory: pytest.TempPathFactory, id: str, namespace: str, metadata: dict[str, object], tags: set[str]
) -> None:
    stored = StoredLabel(id, namespace, LONG_AGO, Label(metadata, tags, pinned=True, expires_at=LATER), LATER)
    path = stage_label(tmp_path_factory.mktemp("labels") / "new" / "folder", stored)
    assert read_label(path) == stored
    assert path.name.startswith(".tmp")
    assert path.read_bytes().isascii()


def test_a_label_lies_beside_its_file() -> None:
    assert label_name("kv/ab/abcd-0123.safetensors") == "kv/ab/abcd-0123.json"


def test_no_changed_byte_goes_unnoticed(tmp_path: Path) -> None:
    path = stage_label(tmp_path, LABEL)
    whole = path.read_bytes()
    for position in range(len(whole)):
        for mask in (0x01, 0x10, 0x80):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
            with pytest.raises(CorruptFileError, match=r"is (damaged|no label)"):
                read_label(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFileError, match=r"is (damaged|no label)"):
            read_label(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"id": ""},
        {"id": 3},
        {"namespace": 3},
        {"namespace": None},
        {"updated_at": None},
        {"more": 1},
        {"tags": "abc"},
        {"tags": 3},
        {"pinned": 1},
        {"metadata": []},
        {"expires_at": "tomorrow"},
    ],
)
def test_a_sealed_file_that_is_no_label_is_corrupt(tmp_path: Path, change: dict[str, Any]) -> None:
    path = stage_label(tmp_path, LABEL)
    fields = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"} | change
    sealed = {**fields, "sha256": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()}
    path.write_text(json.dumps(sealed))
    with pytest.raises(CorruptFileError, match=r"is (damaged|no label)"):
        read_label(path)


@pytest.mark.parametrize("content", ["", "3", "[]", "null", "{}", '{"sha256": 1}', "[" * 100_000, "\udcff"])
def test_what_is_not_ours_is_corrupt(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CorruptFileError, match=r"a\.json is damaged .*; `beacon-memory repair` writes it anew"):
        read_label(path)


def test_only_a_plain_file_is_read(tmp_path: Path) -> None:
    label = stage_label(tmp_path, LABEL)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(label)
    (tmp_path / "dangling.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "long.json").open("wb") as file:
        file.truncate(1 << 30)
    for path in tmp_path.glob("*.json"):
        with pytest.raises(CorruptFileError, match=r"is (damaged|no label)"):
            read_label(path)


def test_a_missing_label_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_label(tmp_path / "nowhere.json")


def test_a_label_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be created"):
        stage_label(tmp_path / "file", LABEL)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
