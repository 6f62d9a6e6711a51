"""What was read of a document is there for whoever goes on with it, and goes when nobody does."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from kv_samples import memory, same
from store_samples import put

from beacon_memory.errors import ConflictError, CorruptFileError, StoreError
from beacon_memory.storage.erasing import erase
from beacon_memory.storage.files.names import new_temp
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

DECIDES = {"id": "doc", "content_hash": "abc", "ratios": [2, 2, 2]}


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(tmp_path / "store")


def windows_in(store: MemoryStore) -> list[Path]:
    return sorted((store.folder / "unfinished").rglob("*.safetensors"))


def leave(store: MemoryStore, windows: int = 3) -> None:
    """Write the memories of some windows, and go."""
    document = store.unfinished(DECIDES)
    for _ in range(windows):
        document.append(memory(8, 24))
    document.close()


def grow_old(store: MemoryStore) -> None:
    os.utime(windows_in(store)[0].parent, (time.time() - 8 * 24 * 3600,) * 2)


def test_what_was_read_is_read_back_bit_for_bit(store: MemoryStore) -> None:
    document, kept = store.unfinished(DECIDES), [memory(8, 24), memory(8, 20)]
    for one in kept:
        document.append(one)
    document.close()
    again = store.unfinished(DECIDES)
    assert len(again) == 2
    assert all(same(*pair) for pair in zip(again, kept, strict=True))
    again.append(memory(8, 4))
    assert (len(again), again[2].slots) == (3, 1)
    with pytest.raises(IndexError):
        again[3]


def test_what_decides_the_memories_tells_documents_apart(store: MemoryStore) -> None:
    leave(store)
    assert len(store.unfinished({**DECIDES, "ratios": [2, 2, 4]})) == 0
    assert len(store.unfinished(DECIDES)) == 3


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-9]), Path.unlink, "flip"])
def test_windows_are_read_again_from_the_first_damaged_one_on(store: MemoryStore, damage: object) -> None:
    leave(store)
    path = windows_in(store)[1]
    if callable(damage):
        damage(path)
    else:
        path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    document = store.unfinished(DECIDES)
    assert len(document) == 1
    new = memory(8, 3)
    document.append(new)
    assert same(document[1], new)


def test_two_cannot_read_the_same_document(store: MemoryStore) -> None:
    document = store.unfinished(DECIDES)
    with pytest.raises(ConflictError, match="'doc' is being added by another process"):
        MemoryStore(store.folder).unfinished(DECIDES)
    document.close()
    assert len(MemoryStore(store.folder).unfinished(DECIDES)) == 0


def test_a_finished_document_leaves_nothing(store: MemoryStore) -> None:
    document = store.unfinished(DECIDES)
    document.append(memory(8, 24))
    new_temp(windows_in(store)[0].parent)
    document.remove()
    assert list((store.folder / "unfinished").iterdir()) == []


def test_it_is_for_its_user_alone(store: MemoryStore) -> None:
    leave(store)
    path = windows_in(store)[0]
    modes = [one.stat().st_mode & 0o777 for one in (path, path.parent, path.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]


def test_repair_removes_what_nobody_went_on_with_for_a_week(store: MemoryStore) -> None:
    put(store)
    leave(store)
    assert verify(store) == repair(store) == []
    grow_old(store)
    assert [problem.kind for problem in verify(store)] == ["stale-temp"]
    reading = store.unfinished(DECIDES)
    grow_old(store)
    repair(store)
    assert len(reading[2].keys) == 24  # of who is reading it, it is not taken
    reading.close()
    assert [problem.mended for problem in repair(store)] == [True]
    assert verify(store) == windows_in(store) == []


def test_erase_removes_it(store: MemoryStore) -> None:
    put(store)
    reading = store.unfinished(DECIDES)
    reading.append(memory(8, 24))
    erase(store)
    assert not (store.folder / "unfinished").exists()
    with pytest.raises(StoreError, match="cannot be written"):
        reading.append(memory(8, 24))


def test_a_link_in_the_place_of_the_folder_is_refused(store: MemoryStore, tmp_path: Path) -> None:
    put(store)
    (tmp_path / "elsewhere").mkdir()
    (store.folder / "unfinished").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptFileError, match="is a link"):
        store.unfinished(DECIDES)
    assert not list((tmp_path / "elsewhere").iterdir())
