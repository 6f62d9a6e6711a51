"""What a store makes is for its user alone, leads nowhere else, and is found when a killed process has left it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from crashing import fork, wait
from store_samples import put

from beacon_memory.conversation import Conversation
from beacon_memory.errors import CorruptFileError, StoreError
from beacon_memory.storage.archive import export_documents, import_documents
from beacon_memory.storage.files.folder import FolderBackend
from beacon_memory.storage.files.names import file_stem
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore


@pytest.fixture(autouse=True)
def _lenient() -> Iterator[None]:
    """Let others read what is made without saying who may."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def rights(folder: Path) -> dict[str, set[int]]:
    """The permissions of all folders and files."""
    found: dict[str, set[int]] = {"folders": set(), "files": set()}
    for path in [folder, *folder.rglob("*")]:
        found["folders" if path.is_dir() else "files"].add(path.stat().st_mode & 0o777)
    return found


def use(root: Path) -> None:
    """Make all that a store makes."""
    with MemoryStore(root) as store, MemoryStore(root, "far") as far:
        store.configure(quota=10**9)
        far.configure(files=(root / "backend").as_uri())
        for one in (store, store.within("near"), far):
            put(one)
            one.update("doc", tags=["x"])
            one.conversations.put(Conversation("talk"))
        beside = [*root.glob("catalog.sqlite3*")]
        assert len(beside) == 3
        assert len({path.stat().st_mode for path in beside}) == 1
        export_documents(store, root / "new" / "a.tar")
        assert verify(store) == verify(far) == []


def test_what_a_store_makes_is_for_its_user_alone(tmp_path: Path) -> None:
    use(tmp_path / "a" / "store")
    assert rights(tmp_path / "a") == {"folders": {0o700}, "files": {0o600}}


@pytest.mark.parametrize(("folders", "written"), [(0o755, 0o644), (0o750, 0o640), (0o770, 0o660)])
def test_in_a_folder_with_wider_rights_a_store_is_as_open_as_that(tmp_path: Path, folders: int, written: int) -> None:
    root = tmp_path / "store"
    for path in (root, root / "backend"):
        path.mkdir()
        path.chmod(folders)
    use(root)
    assert {path.stat().st_mode & 0o777 for path in (root / "new").iterdir()} == {0o600}
    (root / "new" / "a.tar").unlink()
    (root / "new").rmdir()
    assert rights(root) == {"folders": {folders}, "files": {written}}


def test_a_file_in_a_folder_for_everybody_is_private_all_the_same(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with MemoryStore(tmp_path) as store:
        put(store)
    assert (tmp_path / "catalog.sqlite3").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("linked", ["kv", "below"])
def test_a_folder_that_is_a_link_is_neither_read_nor_written_nor_emptied(tmp_path: Path, linked: str) -> None:
    store, outside = MemoryStore(tmp_path / "store"), tmp_path / "outside"
    put(store)
    link = (store.folder / store.row("doc").file).parent
    if linked == "kv":
        link = link.parent
    link.rename(outside)
    link.symlink_to(outside)
    (outside / ".tmp-0123456789abcdef").touch()
    before = {path: path.stat() for path in outside.rglob("*")}
    with pytest.raises(CorruptFileError, match="is a link, which would lead out of the store; put a folder"):
        store.get("doc")
    with pytest.raises(StoreError, match="is a link"):
        put(store)
    with pytest.raises(StoreError, match="is a link"):
        store.update("doc", tags=["x"])
    told = {problem.kind: problem.message for problem in verify(store)}
    assert "is a link" in told["damaged-file"]
    assert f"{link.relative_to(store.folder)} has no row" in told["orphan-file"]
    repair(store)
    store.delete("doc")
    repair(store)
    assert {path: path.stat() for path in outside.rglob("*")} == before
    link.unlink()
    outside.rename(link)
    put(store, "other")
    repair(store)
    assert verify(store) == []
    store.close()


@pytest.mark.parametrize("linked", ["namespaces", "one", "cache"])
def test_no_namespace_and_no_cache_is_a_link(tmp_path: Path, linked: str) -> None:
    root, outside = tmp_path / "store", tmp_path / "outside"
    with MemoryStore(root, "far", files=(tmp_path / "backend").as_uri()) as far:
        put(far)
        link = {"namespaces": root / "namespaces", "one": far.folder, "cache": far.folder / "cache"}[linked]
        link.rename(outside)
        link.symlink_to(outside)
        before = sorted(outside.rglob("*"))
        with pytest.raises(CorruptFileError, match="is a link"):
            MemoryStore(root, "far").get("doc")
        if linked == "namespaces":
            with pytest.raises(CorruptFileError, match="is a link"):
                far.namespaces()
        assert sorted(outside.rglob("*")) == before


def test_temporary_files_beside_settings_and_sessions_are_found(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store") as store:
        put(store)
        store.conversations.put(Conversation("talk"))
        beside, new = (store.folder / f".tmp-{age}" for age in ("old", "new"))
        old = [store.folder / "sessions" / ".tmp-0123456789abcdef", beside]
        for path in [*old, new]:
            path.write_text("a turn")
        os.utime(beside, (time.time() - 120,) * 2)
        assert [(one.kind, one.path) for one in verify(store)] == [("stale-temp", str(path)) for path in old]
        assert all(problem.mended for problem in repair(store))
        assert [path.exists() for path in [*old, new]] == [False, False, True]


def test_what_a_killed_export_leaves_is_private_and_removed_by_the_next(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store") as store:
        put(store)
        put(store, "other")
        store.close()

        def killed() -> None:
            export_documents(
                MemoryStore(store.root),
                tmp_path / "a.tar",
                on_document=lambda _: os.kill(os.getpid(), signal.SIGKILL),
            )

        assert wait(fork(killed)) == -signal.SIGKILL
        left = tmp_path / "a.tar.part"
        assert rights(left) == {"folders": {0o700}, "files": {0o600}}
        assert len([*left.iterdir()]) == 2
        assert export_documents(store, tmp_path / "a.tar") == 2
        assert not left.exists()
        assert import_documents(store.within("new"), tmp_path / "a.tar") == 2


def test_an_export_leaves_alone_what_is_not_its_own(tmp_path: Path) -> None:
    mine = tmp_path / "a.tar.part" / "mine"
    mine.parent.mkdir()
    mine.write_text("mine")
    with MemoryStore(tmp_path / "store") as store:
        export_documents(store, tmp_path / "a.tar")
    assert [*mine.parent.iterdir()] == [mine]


def test_what_a_killed_process_left_in_a_backend_is_removed_when_it_is_next_opened(tmp_path: Path) -> None:
    backend = FolderBackend((tmp_path / "backend").as_uri())
    source = tmp_path / "source"
    source.write_text("K/V")
    backend.publish(source, f"{file_stem('doc')}-0123456789ab.safetensors")
    old, new = (backend.folder / "kv" / f".tmp-{age}" for age in ("old", "new"))
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    assert backend.claim("ours") == "ours"
    assert (old.exists(), new.exists()) == (False, True)
    assert len([name for name in backend.names() if name.endswith(".safetensors")]) == 1


def test_a_store_whose_first_writer_was_killed_is_begun_again(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    (root / "catalog.sqlite3").touch()
    with MemoryStore(root, files=(tmp_path / "backend").as_uri()) as store:
        assert store.list() == []
        put(store)
        assert not (root / "kv").exists()
        assert store.settings.files == (tmp_path / "backend").as_uri()
