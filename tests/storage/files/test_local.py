from __future__ import annotations

from pathlib import Path

import pytest

from beacon_memory.errors import StoreError
from beacon_memory.storage.files import local
from beacon_memory.storage.files.durable import unlink
from beacon_memory.storage.files.local import LocalFiles
from beacon_memory.storage.files.names import file_stem

NAME, OTHER = (f"{file_stem(id)}-0123456789ab.safetensors" for id in ("doc", "other"))


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    return LocalFiles(tmp_path / "store")


def stage(files: LocalFiles, content: str) -> Path:
    files.staging.mkdir(parents=True, exist_ok=True)
    temp = files.staging / ".tmp-1"
    temp.write_text(content)
    return temp


def test_a_published_file_is_named_and_found(files: LocalFiles) -> None:
    assert [*files.names(), *files.temps()] == []
    temp = stage(files, "one")
    assert [*files.names()] == []
    assert [*files.temps()] == [temp]
    files.publish(temp, NAME)
    assert [*files.names()] == [NAME]
    assert files.fetch(NAME).read_text() == "one"
    assert [*files.temps()] == []


def test_a_taken_name_is_replaced(files: LocalFiles) -> None:
    files.publish(stage(files, "one"), NAME)
    before = files.fetch(NAME).open()
    files.publish(stage(files, "two"), NAME)
    assert files.fetch(NAME).read_text() == "two"
    with before:
        assert before.read() == "one"


def test_a_file_that_cannot_be_published_is_gone(files: LocalFiles) -> None:
    temp = stage(files, "one")
    (files.folder / NAME).mkdir(parents=True)
    with pytest.raises(StoreError, match=r"\.safetensors cannot be written: .*; see to space and permissions"):
        files.publish(temp, NAME)
    assert not temp.exists()
    temp = stage(files, "one")
    (files.staging / "file").touch()
    with pytest.raises(StoreError, match="cannot be"):
        files.publish(temp, "kv/file/a")
    assert not temp.exists()


def test_a_removed_file_is_gone_and_may_have_been_before(files: LocalFiles) -> None:
    files.publish(stage(files, "one"), NAME)
    assert files.remove(NAME)
    assert files.remove(NAME)
    assert [*files.names()] == []
    assert not files.fetch(NAME).exists()


def test_what_cannot_be_removed_is_said(files: LocalFiles) -> None:
    (files.folder / NAME / "inside").mkdir(parents=True)
    assert not files.remove(NAME)
    assert not unlink(files.folder / NAME)
    assert unlink(files.folder / "nowhere")


def test_what_a_crash_left_in_any_folder_is_found(files: LocalFiles) -> None:
    files.publish(stage(files, "one"), NAME)
    left = [files.staging / ".tmp-a", files.staging / "13" / ".tmpb.safetensors"]
    for path in left:
        path.touch()
    assert [*files.temps()] == left
    assert [*files.names()] == [NAME]


def test_folders_of_removed_files_are_synced(files: LocalFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (NAME, OTHER):
        files.publish(stage(files, name), name)
    synced: list[Path] = []
    monkeypatch.setattr(local, "sync_folder", synced.append)
    for name in (NAME, OTHER):
        files.remove(name)
    files.sync([NAME, NAME.replace("safetensors", "json"), OTHER, "kv/00/nowhere"])
    assert sorted(synced) == sorted({(files.folder / name).parent for name in (NAME, OTHER)})
