"""A store whose files lie in a backend that somebody else wrote."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kv_samples import same
from repository import ROOT
from store_samples import put
from upkeep_samples import flip

from beacon_memory.errors import (
    ConflictError,
    CorruptFileError,
    InputError,
    MissingDependencyError,
    MissingFileError,
    StoreError,
)
from beacon_memory.storage.archive import export_documents, import_documents
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.sqlite import SQLiteCatalog
from beacon_memory.storage.files.cached import CachedFiles
from beacon_memory.storage.files.kv_file import StagedFile, stage_kv_file
from beacon_memory.storage.files.names import number_of
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class of the example, of which no package tells."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "extend")
    from files_backend import SQLiteFiles

    return SQLiteFiles


@pytest.fixture
def backend(example: Any, tmp_path: Path) -> Any:
    return example(f"sqlite://{tmp_path / 'place'}")


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "sqlite_files-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sqlite-files\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[beacon_memory.files]\nsqlite = files_backend:SQLiteFiles\n")
    monkeypatch.syspath_prepend(tmp_path / "site")


def test_a_backend_of_ones_own_keeps_the_files(backend: Any, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store", files=backend) as store:
        kv = put(store)
        assert same(store.get("doc").kv, kv)
        assert store.settings.files == backend.url
        assert verify(store) == []
    assert not (store.folder / "kv").exists()
    assert sorted(Path(name).suffix for name in backend.names()) == ["", ".json", ".safetensors"]
    with MemoryStore(tmp_path / "store", files=backend) as store:
        assert same(store.get("doc").kv, kv)
        store.update("doc", tags=["new"])
        store.rename("doc", "other")
        store.delete("other")
        assert verify(store) == []
    assert backend.names() == ["owner"]


def test_an_installed_backend_is_found_by_the_url_that_the_store_remembers(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    with MemoryStore(tmp_path / "store", files=backend.url) as store:
        kv = put(store)
    with MemoryStore(tmp_path / "store") as store:
        assert same(store.get("doc").kv, kv)
        assert verify(store) == []
    assert not (store.folder / "kv").exists()


def test_a_store_whose_backend_is_missing_is_refused_and_left_as_it_is(backend: Any, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store", files=backend) as store:
        kv = put(store)
    with MemoryStore(tmp_path / "store") as store:
        for act in (lambda: store.get("doc"), lambda: verify(store), lambda: repair(store), lambda: put(store, "new")):
            with pytest.raises(MissingDependencyError, match=r"are in sqlite://.*, or pass the backend: MemoryStore\("):
                act()
    assert not list((tmp_path / "store").glob("damaged-*"))
    with MemoryStore(tmp_path / "store", files=backend) as store:
        assert [row.id for row in store.list()] == ["doc"]
        assert same(store.get("doc").kv, kv)
        assert verify(store) == []


def test_a_store_is_not_opened_with_files_that_are_not_its_own(backend: Any, example: Any, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store", files=backend) as store:
        put(store)
    other = example(f"sqlite://{tmp_path / 'other'}")
    for given in (other, (tmp_path / "folder").as_uri()):
        with MemoryStore(tmp_path / "store", files=given) as store:
            for act in (lambda: store.get("doc"), lambda: repair(store), lambda: put(store, "new")):
                with pytest.raises(StoreError, match=f"are {backend.url}, not in .*: open it without `files`"):
                    act()
    with MemoryStore(tmp_path / "local") as store:
        put(store)
    with (
        MemoryStore(tmp_path / "local", files=backend) as store,
        pytest.raises(StoreError, match="in its folder, not in sqlite://"),
    ):
        store.get("doc")
    with MemoryStore(tmp_path / "local") as store:
        assert verify(store) == []


def test_an_empty_store_can_be_moved_to_a_backend(backend: Any, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store") as store:
        store.configure(precision="float16")
    with MemoryStore(tmp_path / "store", files=backend) as store:
        with pytest.raises(StoreError, match="only an empty store"):
            put(store)
        store.configure(files=backend.url)
        put(store)
        assert store.settings.precision == "float16"
    assert not (store.folder / "kv").exists()


def while_it_is_born(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something when the next catalog has been created, before whoever opens it goes on."""

    def opened(path: Path) -> Catalog:
        monkeypatch.undo()
        catalog = SQLiteCatalog(path)
        act()
        return catalog

    monkeypatch.setattr("beacon_memory.storage.parts.SQLiteCatalog", opened)


def test_a_catalog_that_another_process_has_begun_keeps_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act() -> None:
        with MemoryStore(tmp_path / "store", "name") as other:
            other.configure(files=(tmp_path / "place").as_uri())
            put(other)

    while_it_is_born(monkeypatch, act)
    with MemoryStore(tmp_path / "store", "name") as store:
        store.parts.catalog(create=True)  # as one who only reads it does
        assert store.get("doc").row.id == "doc"
        assert store.settings.files == (tmp_path / "place").as_uri()
        assert verify(store) == []


def test_files_stay_where_another_process_has_put_them_while_the_store_was_born(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_it_is_born(monkeypatch, lambda: put(MemoryStore(tmp_path / "store")))
    with (
        MemoryStore(tmp_path / "store", files=(tmp_path / "place").as_uri()) as store,
        pytest.raises(StoreError, match="in its folder, not in file://"),
    ):
        put(store, "other")
    with MemoryStore(tmp_path / "store") as store:
        assert store.get("doc").row.id == "doc"
        assert verify(store) == []


@pytest.mark.parametrize("act", ["put", "rename"])
def test_a_document_is_not_acknowledged_where_files_are_not_any_more(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    with MemoryStore(tmp_path / "store") as store:
        put(store)

        def moved(*given: Any) -> StagedFile:
            monkeypatch.undo()
            store.parts.catalog().properties.set("files", (tmp_path / "place").as_uri())
            return stage_kv_file(*given)

        monkeypatch.setattr("beacon_memory.storage.publishing.stage_kv_file", moved)
        with pytest.raises(ConflictError, match="have got another place; try again"):
            put(store, "new") if act == "put" else store.rename("doc", "new")
        store.parts.catalog().properties.set("files", None)
        assert [row.id for row in store.list()] == ["doc"]
        assert verify(store) == []


def test_a_namespace_keeps_its_files_apart_in_the_same_backend(backend: Any, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store", files=backend) as store:
        kv, inner = put(store), put(store.within("alice"), "doc", "another text")
        assert store.within("alice").settings.files.startswith(f"{backend.url}/namespaces/")
        assert same(store.get("doc").kv, kv)
        with MemoryStore(tmp_path / "store", "alice", files=backend) as alice:
            assert same(alice.get("doc").kv, inner)
            assert verify(alice) == verify(store) == []
    with MemoryStore(tmp_path / "new", "bob", files=(tmp_path / "bobs").as_uri()) as bob:  # before the store itself
        put(bob)
        assert not (bob.folder / "kv").exists()


def test_a_lost_catalog_comes_back_from_a_backend(backend: Any, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store", files=backend) as store:
        kv = put(store)
    for path in (tmp_path / "store").glob("catalog*"):
        path.unlink()
    with MemoryStore(tmp_path / "store", files=backend) as store:
        repair(store)
        assert same(store.get("doc").kv, kv)
        assert verify(store) == []


def test_a_removal_is_synced_before_the_catalog_forgets_it(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MemoryStore(tmp_path / "store", files=backend) as store:
        put(store)
        name = store.row("doc").file
        number, seen = number_of(name), []
        monkeypatch.setattr(
            backend,
            "sync",
            lambda names: seen.append(
                (names, number in store.parts.catalog().file_names.unsettled(), name in backend.names())
            ),
        )
        store.delete("doc")
        assert seen == [([name], True, False)]
        assert number not in store.parts.catalog().file_names.unsettled()


@pytest.mark.parametrize("ending", [".safetensors", ".json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_copy_in_the_cache_is_fetched_anew(backend: Any, tmp_path: Path, ending: str, damage: str) -> None:
    with MemoryStore(tmp_path / "store", files=backend) as store:
        kv = put(store, tag="x")
        (copy,) = (store.folder / "cache").rglob(f"*{ending}")
        whole = copy.read_bytes()
        changed = {"flipped": whole[:-1] + bytes([whole[-1] ^ 1]), "cut": whole[:-9], "empty": b""}
        copy.write_bytes(changed[damage])
        assert same(store.get("doc").kv, kv)
        assert verify(store) == []
        assert copy.read_bytes() == whole


def test_copies_that_were_swapped_in_the_cache_are_fetched_anew(backend: Any, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store", files=backend) as store:
        kv = {id: put(store, id) for id in ("a", "b")}
        one, other = (store.folder / "cache" / store.row(id).file for id in kv)
        whole = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(whole)
        assert all(same(store.get(id).kv, kv[id]) for id in kv)
        assert verify(store) == []


def test_a_damaged_copy_is_damage_if_the_backend_has_no_better_one(backend: Any, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store", files=backend) as store:
        put(store)
        name = store.row("doc").file
        flip(store.folder / "cache" / name, -1)
        source = tmp_path / "source"
        source.write_bytes((store.folder / "cache" / name).read_bytes())
        backend.publish(source, name)
        with pytest.raises(CorruptFileError, match="the text in the file of 'doc' is not the one"):
            store.get("doc")
        backend.remove(name)
        with pytest.raises(MissingFileError):
            store.get("doc")
        assert [problem.kind for problem in verify(store)] == ["missing-file"]


def test_few_of_many_downloads_look_through_the_cache(backend: Any, tmp_path: Path) -> None:
    cache = CachedFiles(backend, tmp_path / "cache", 100_000)
    source, watched, looks = tmp_path / "source", f"{cache.staging}", []
    source.write_bytes(bytes(500))
    for n in range(300):
        backend.publish(source, f"kv/00/{n:03}")

    def watch(event: str, told: tuple[object, ...]) -> None:
        if event == "os.scandir" and str(told[0]) == watched:
            looks.append(told)

    sys.addaudithook(watch)
    for n in range(300):
        cache.fetch(f"kv/00/{n:03}")
    watched = ""
    assert 2 <= len(looks) < 40
    assert 90_000 < sum(path.stat().st_size for path in cache.staging.glob("*/*")) <= 100_000
    assert cache.fetch("kv/00/299").exists()


def test_an_archive_is_imported_into_a_backend(backend: Any, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "source") as source:
        kv = put(source)
        export_documents(source, tmp_path / "a.tar")
    with MemoryStore(tmp_path / "store", files=backend) as store:
        assert import_documents(store, tmp_path / "a.tar") == 1
        assert same(store.get("doc").kv, kv)


@pytest.mark.parametrize(
    ("url", "flaw"),
    [("ftp://host/x", "no backend for ftp:// is"), ("notes", "must be a URL"), ("C:\\notes", "must be a URL")],
)
def test_a_url_that_no_backend_can_use_is_refused_at_once(tmp_path: Path, url: str, flaw: str) -> None:
    with pytest.raises(InputError, match=flaw):
        MemoryStore(tmp_path / "store", files=url)
    with MemoryStore(tmp_path / "store") as store, pytest.raises(InputError, match=flaw):
        store.configure(files=url)
