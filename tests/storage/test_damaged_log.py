"""A log of the catalog that is damaged: SQLite leaves out what follows the damage, and says nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kv_samples import same
from store_samples import put

from beacon_memory.documents import Label
from beacon_memory.errors import MissingFileError
from beacon_memory.storage.files.label_file import label_name, read_label
from beacon_memory.storage.files.marks import lay_label_mark
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

Act = Callable[[MemoryStore], object]


def rolled_back(folder: Path, act: Act) -> MemoryStore:
    """Return a store in which `act` was done and acknowledged, and a bit of the log flipped where it was noted."""
    with MemoryStore(folder / "store") as store:
        put(store, a=1)
        put(store, "other", "a wagon")
        log = store.folder / "catalog.sqlite3-wal"
        before = log.stat().st_size
        act(store)
        assert log.stat().st_size > before
        shutil.copytree(store.folder, folder / "copy")
    log = folder / "copy" / log.name
    data = bytearray(log.read_bytes())
    data[before + 24 + 1000] ^= 1  # behind the header of a frame
    log.write_bytes(data)
    return MemoryStore(folder / "copy")


def test_a_label_that_the_catalog_has_lost_comes_back(tmp_path: Path) -> None:
    def act(store: MemoryStore) -> None:
        store.update("doc", tags=["new"], metadata={"b": 2})
        store.update("doc", pinned=True)

    with rolled_back(tmp_path, act) as store:
        assert store.row("doc").label == Label({"a": 1})
        assert [(one.kind, one.document) for one in verify(store)] == [("stale-label", "doc")]
        assert [one.mended for one in repair(store)] == [True]
        assert store.row("doc").label == Label({"b": 2}, ["new"], True)
        assert [row.id for row in store.list(tags=["new"])] == ["doc"]
        assert verify(store) == []
        store.update("doc", tags=["newer"])
        assert verify(store) == []


def test_a_label_that_was_never_committed_does_not_come_back(tmp_path: Path) -> None:
    with rolled_back(tmp_path, lambda store: store.update("doc", tags=["new"])) as store:
        lay_label_mark(store.files, store.row("doc").file)
        repair(store)
        assert store.row("doc").label == Label({"a": 1})
        assert read_label(store.folder / label_name(store.row("doc").file)).label == Label({"a": 1})
        assert verify(store) == []


def test_a_later_label_has_a_later_time_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MemoryStore(tmp_path / "store") as store:
        put(store)
        monkeypatch.setattr("beacon_memory.documents.utc_now", lambda: "2020-01-01T00:00:00.000+00:00")
        times = [store.row("doc").updated_at, *(store.update("doc", tags=[tag]).updated_at for tag in "abc")]
        assert times == sorted(set(times))
        assert read_label(store.folder / label_name(store.row("doc").file)).updated_at == times[-1]


@pytest.mark.parametrize("change", ["replaced", "renamed", "removed"])
def test_a_text_that_was_replaced_or_removed_is_not_given_out(tmp_path: Path, change: str) -> None:
    acts: dict[str, Act] = {
        "replaced": lambda store: put(store, "doc", "a green house"),
        "renamed": lambda store: store.rename("doc", "new"),
        "removed": lambda store: store.delete("doc"),
    }
    with rolled_back(tmp_path, acts[change]) as store:
        for read in (store.get, store.text, store.search):
            with pytest.raises(MissingFileError, match="of 'doc' is missing; `beacon-memory repair` mends it"):
                read("doc" if read != store.search else "house")  # type: ignore[operator]
        assert store.text("other") == "a wagon"
        assert [hit.document for hit in store.search("wagon")] == ["other"]
        repair(store)
        if change == "replaced":
            assert store.text("doc") == "a green house"
            assert same(store.get("doc").kv, MemoryStore(tmp_path / "store").get("doc").kv)
            assert verify(store) == []
        if change == "renamed":
            assert store.text("new").startswith("The red house")
