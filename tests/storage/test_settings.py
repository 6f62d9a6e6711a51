from __future__ import annotations

import contextlib
import threading
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from kv_samples import same
from store_samples import files, put

from beacon_memory.documents import Precision
from beacon_memory.errors import InputError, QuotaError, StoreError
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.sqlite import SQLiteCatalog
from beacon_memory.storage.files.local import LocalFiles
from beacon_memory.storage.files.locks import writing
from beacon_memory.storage.repair import verify
from beacon_memory.storage.settings import Settings, keep_copy, open_files, read_copy
from beacon_memory.storage.store import MemoryStore


def test_settings_survive_in_a_catalog(tmp_path: Path) -> None:
    settings = Settings("int8", 10**15, "s3://bucket/prefix", 0)
    catalog = SQLiteCatalog(tmp_path / "catalog.sqlite3")
    assert Settings.of(catalog) == Settings()
    settings.write(catalog)
    catalog.close()
    catalog = SQLiteCatalog(tmp_path / "catalog.sqlite3")
    assert Settings.of(catalog) == settings
    Settings().write(catalog)
    assert Settings.of(catalog) == Settings()
    catalog.close()


@pytest.mark.parametrize("precision", ["auto", *Precision])
def test_every_precision_can_be_set(precision: str) -> None:
    assert Settings(precision=precision).precision == precision


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "int2"}, "precision='int2' must be one of"),
        ({"precision": None}, "precision=None must be one of"),
        ({"quota": 0}, "quota=0 must be a number of bytes from 1 to"),
        ({"quota": 1.5}, "quota=1.5"),
        ({"quota": True}, "quota=True"),
        ({"cache_bytes": -1}, "cache_bytes=-1 must be a number of bytes from 0 to"),
        ({"cache_bytes": None}, "cache_bytes=None"),
        ({"files": "bucket/prefix"}, "files='bucket/prefix' must be a URL"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**changes)
    store = MemoryStore(tmp_path / "store")
    store.configure(quota=10_000)
    with pytest.raises(InputError, match=message):
        store.configure(**{"quota": 20_000, **changes})
    assert store.settings == Settings(quota=10_000)


def test_settings_that_were_refused_are_not_taken_from_their_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MemoryStore(tmp_path / "store") as store:
        store.configure(quota=7)

        def fail(catalog: Catalog, folder: Path) -> None:
            keep_copy(catalog, folder)
            raise KeyboardInterrupt

        monkeypatch.setattr("beacon_memory.storage.store.keep_copy", fail)
        with pytest.raises(KeyboardInterrupt):
            store.configure(quota=8)
        assert verify(store) == []
        assert store.settings.quota == read_copy(store.folder)["quota"] == 7


def test_a_setting_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="colour"):
        MemoryStore(tmp_path / "store").configure(colour="red")


def test_a_store_is_configured_for_all_that_open_it(tmp_path: Path) -> None:
    store, other = (MemoryStore(tmp_path / "store") for _ in range(2))
    assert store.settings == Settings()
    assert not (tmp_path / "store").exists()
    assert store.configure(precision="float16") == Settings(precision="float16")
    assert other.configure(quota=10_000) == Settings("float16", 10_000)
    assert store.settings == MemoryStore(tmp_path / "store").settings == Settings("float16", 10_000)
    put(store)
    assert store.row("doc").precision == "float16"
    assert store.configure(precision="auto", quota=None) == Settings()


def test_what_another_process_has_just_set_counts_for_the_next_document(tmp_path: Path) -> None:
    ours, theirs = (MemoryStore(tmp_path / "store") for _ in range(2))
    put(ours, "warm")
    assert ours.settings == theirs.settings == Settings()
    theirs.configure(precision="int8")
    put(ours, "quantized")
    assert ours.row("quantized").precision == "int8"
    theirs.configure(quota=5 * ours.row("quantized").bytes // 2)  # two of that size, which varies with groups of keys
    put(ours, "last")
    assert [row.id for row in ours.list()] == ["last", "quantized"]
    theirs.configure(quota=1)
    with pytest.raises(QuotaError, match="'refused' takes"):
        put(ours, "refused")
    for id in ("last", "quantized"):
        theirs.delete(id)
    elsewhere = tmp_path / "elsewhere"
    theirs.configure(quota=None, files=elsewhere.as_uri())
    put(ours, "moved")
    assert [path.suffix for path in (elsewhere / "kv").rglob("*.safetensors")] == [".safetensors"]
    assert verify(ours) == verify(theirs) == []


def test_settings_are_read_again_only_after_something_was_written(tmp_path: Path) -> None:
    store, other = (MemoryStore(tmp_path / "store") for _ in range(2))
    put(store)

    def reads() -> int:
        statements: list[str] = []
        with store.parts.catalog().connections.use() as db:
            db.conn.set_trace_callback(statements.append)
            assert [store.settings, store.files.staging] == [Settings(), store.folder / "kv"]
            db.conn.set_trace_callback(None)
        return sum("FROM properties" in statement for statement in statements)

    reads()
    assert reads() == 0
    put(other, "other")
    assert reads() == 1
    assert reads() == 0
    with contextlib.suppress(InputError):
        store.configure(quota=0)
    assert reads() <= 1
    assert store.settings == Settings()


def test_settings_that_were_read_in_a_change_that_failed_are_forgotten(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "store")
    store.configure(quota=10_000)
    catalog = store.parts.catalog()
    with contextlib.suppress(ZeroDivisionError), catalog.transaction():
        catalog.properties.set("quota", 20_000)
        assert store.settings.quota == 20_000
        _ = 1 / 0
    assert store.settings.quota == 10_000


def test_files_are_moved_only_when_nobody_is_writing(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "store")
    moved: list[Settings] = []
    mover = threading.Thread(target=lambda: moved.append(store.configure(files=(tmp_path / "elsewhere").as_uri())))
    with writing(store.folder):
        mover.start()
        mover.join(0.3)
        assert mover.is_alive()
        assert MemoryStore(store.folder).settings.files is None
    mover.join()
    assert [store.settings] == moved


def test_a_namespace_begins_with_the_settings_of_the_store_and_goes_its_own_way(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "store")
    store.configure(precision="float32", quota=5_000, cache_bytes=7)
    put(store.within("early"))
    store.configure(precision="float16")
    assert store.within("early").settings == Settings("float32", 5_000, None, 7)
    assert store.within("late").configure(quota=6_000) == Settings("float16", 6_000, None, 7)
    assert store.settings == Settings("float16", 5_000, None, 7)
    assert store.within("early").settings.quota == 5_000


def test_a_namespace_of_remote_files_has_its_own_folder_there(tmp_path: Path) -> None:
    assert Settings(files="s3://b/p/").below(PurePosixPath("namespaces/1f")).files == "s3://b/p/namespaces/1f"
    assert Settings().below(PurePosixPath("namespaces/1f")) == Settings()


def test_files_can_be_moved_only_while_there_are_none(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "store")
    put(store)
    elsewhere = (tmp_path / "elsewhere").as_uri()
    with pytest.raises(InputError, match="only an empty store can be given another place; copy this one"):
        store.configure(files=elsewhere, quota=10_000)
    assert store.settings == Settings()
    store.delete("doc")
    store.configure(files=elsewhere)
    kv = put(store)
    assert [*(store.folder / "kv").rglob("*.safetensors")] == []
    assert len([*(tmp_path / "elsewhere" / "kv").rglob("*.safetensors")]) == 1
    assert store.get("doc").kv.span == kv.span
    assert verify(store) == []
    with pytest.raises(InputError, match="only an empty store"):
        store.configure(files=None)
    assert store.configure(quota=10_000).files == elsewhere


def test_files_belong_to_one_store(tmp_path: Path) -> None:
    elsewhere = (tmp_path / "elsewhere").as_uri()
    one, other = (MemoryStore(tmp_path / name) for name in ("one", "other"))
    one.configure(files=elsewhere)
    kv = put(one)
    with pytest.raises(StoreError, match="belongs to another store"):
        other.configure(files=elsewhere)
    assert other.settings == Settings()
    put(other)
    assert len(files(other)) == 1
    assert same(one.get("doc").kv, kv)


def test_without_a_url_files_lie_in_the_folder(tmp_path: Path) -> None:
    found = open_files(Settings(), tmp_path, "identity")
    assert isinstance(found, LocalFiles)
    assert found.staging == tmp_path / "kv"
