"""What every files backend must do, and how one is found."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from repository import ROOT
from s3_server import BUCKET, KEYS, S3Server
from traces import ID, WORDS, put_secret, traces

from beacon_memory.errors import InputError, MissingDependencyError, StoreError
from beacon_memory.storage.erasing import erase
from beacon_memory.storage.files.backend import GROUP, FilesBackend, check_scheme, open_backend
from beacon_memory.storage.files.cached import CachedFiles
from beacon_memory.storage.files.folder import FolderBackend
from beacon_memory.storage.files.names import file_stem, new_temp
from beacon_memory.storage.files.remote import ObjectStorage
from beacon_memory.storage.store import MemoryStore

NAME, OTHER = (f"{file_stem(id)}-0123456789ab.safetensors" for id in ("doc", "other"))
DATA = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture(params=["file", "s3", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place, of each backend in turn; sqlite is the example, installed like any package."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        server.clear()
        endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.address[1]}", "AWS_ALLOW_HTTP": "true"}
        for name, value in {**KEYS, **endpoint}.items():
            monkeypatch.setenv(name, value)
        return f"s3://{BUCKET}/notes"
    if request.param == "sqlite":
        install(tmp_path / "site", monkeypatch, "sqlite = files_backend:SQLiteFiles")
        monkeypatch.syspath_prepend(ROOT / "examples" / "extend")
        return f"sqlite://{tmp_path / 'place'}"
    return (tmp_path / "a place").as_uri()


@pytest.fixture
def backend(url: str) -> FilesBackend:
    return open_backend(url)


def install(site: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    """Install a package that has nothing but an entry point."""
    info = site / "files_example-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: files-example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry}\n")
    monkeypatch.syspath_prepend(site)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def content(backend: FilesBackend, name: str, folder: Path) -> bytes:
    target = new_temp(folder)
    backend.fetch(name, target)
    return target.read_bytes()


class TestBackend:
    def test_a_published_file_is_copied_in_and_out(self, backend: FilesBackend, source: Path, tmp_path: Path) -> None:
        backend.publish(source, NAME)
        assert source.read_bytes() == DATA
        assert content(backend, NAME, tmp_path) == DATA
        assert NAME in [*backend.names()]

    def test_a_new_file_takes_the_place_of_an_old_one(
        self, backend: FilesBackend, source: Path, tmp_path: Path
    ) -> None:
        backend.publish(source, NAME)
        source.write_bytes(b"")
        backend.publish(source, NAME)
        assert content(backend, NAME, tmp_path) == b""
        assert [*backend.names()].count(NAME) == 1

    @pytest.mark.parametrize(("start", "length"), [(0, 1), (0, len(DATA)), (257, 1000), (len(DATA) - 1, 1)])
    def test_a_part_of_a_file_is_read(self, backend: FilesBackend, source: Path, start: int, length: int) -> None:
        backend.publish(source, NAME)
        assert backend.read(NAME, start, length) == DATA[start : start + length]

    def test_a_file_that_is_not_there_is_missing(self, backend: FilesBackend, source: Path, tmp_path: Path) -> None:
        backend.publish(source, OTHER)
        with pytest.raises(FileNotFoundError):
            backend.fetch(NAME, tmp_path / "target")
        with pytest.raises(FileNotFoundError):
            backend.read(NAME, 0, 1)

    def test_a_removed_file_is_gone_and_may_have_been_before(self, backend: FilesBackend, source: Path) -> None:
        for name in (NAME, OTHER):
            backend.publish(source, name)
        backend.remove(NAME)
        backend.remove(NAME)
        backend.sync([NAME])
        assert NAME not in [*backend.names()]
        with pytest.raises(FileNotFoundError):
            backend.read(NAME, 0, 1)
        assert backend.read(OTHER, 0, 10) == DATA[:10]

    def test_an_empty_place_has_no_files(self, backend: FilesBackend) -> None:
        assert NAME not in [*backend.names()]
        backend.remove(NAME)
        backend.sync([NAME])

    def test_the_url_leads_to_the_same_place(self, backend: FilesBackend, url: str, source: Path) -> None:
        backend.publish(source, NAME)
        assert backend.url == url
        assert open_backend(backend.url).read(NAME, 0, 3) == DATA[:3]

    def test_a_place_within_is_apart(self, backend: FilesBackend, source: Path) -> None:
        inner = backend.within("namespaces/1f")
        assert inner.url == f"{backend.url}/namespaces/1f"
        inner.publish(source, NAME)
        assert NAME not in [*backend.names()]
        assert NAME in [*open_backend(inner.url).names()]
        assert (backend.claim("one"), inner.claim("two")) == ("one", "two")

    def test_a_place_belongs_to_the_first_that_claims_it(self, backend: FilesBackend, url: str) -> None:
        with ThreadPoolExecutor(4) as pool:
            told = set(pool.map(lambda owner: open_backend(url).claim(owner), "abcd"))
        assert len(told) == 1
        assert backend.claim("e") == told.pop() != "e"

    def test_nothing_is_left_of_an_erased_document(
        self, url: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        def found() -> set[str]:
            for name, data in request.getfixturevalue("s3").objects().items() if url.startswith("s3:") else ():
                objects = tmp_path / "objects" / name
                objects.parent.mkdir(parents=True, exist_ok=True)
                objects.write_bytes(data)
            seen = traces(tmp_path)
            shutil.rmtree(tmp_path / "objects", ignore_errors=True)
            return seen

        with MemoryStore(tmp_path / "store", files=url) as store:
            put_secret(store, "other")
            put_secret(store)
            store.delete("other")
            shutil.rmtree(store.folder / "cache")  # what is found now is in the catalog or the place
            assert set(WORDS) <= found()
            erase(store, [ID])
            assert found() == set()

    def test_files_behind_a_cache_are_read_on_this_machine(self, backend: FilesBackend, tmp_path: Path) -> None:
        files = CachedFiles(backend, tmp_path / "cache", 10**9)
        files.claim("ours")
        files.staging.mkdir(parents=True)
        temp = new_temp(files.staging)
        temp.write_bytes(DATA)
        files.publish(temp, NAME)
        other = CachedFiles(backend, tmp_path / "elsewhere", 10**9)
        began = time.monotonic()
        assert other.fetch(NAME).read_bytes() == files.fetch(NAME).read_bytes() == DATA
        assert (other.downloaded([NAME], began), files.downloaded([NAME], began)) == (True, False)
        began = time.monotonic()
        assert other.fetch(NAME).read_bytes() == DATA
        assert not other.downloaded([NAME], began)
        assert [*other.names()] == [NAME]
        assert other.remove(NAME)
        other.sync([NAME])
        assert [*files.names()] == []
        with pytest.raises(FileNotFoundError):
            other.fetch(NAME)
        with pytest.raises(StoreError, match=r"belongs to another store \('ours', and this is 'theirs'\)"):
            other.claim("theirs")


def test_a_backend_is_found_by_the_scheme_of_its_url(tmp_path: Path) -> None:
    assert isinstance(open_backend(tmp_path.as_uri()), FolderBackend)
    for url in ("s3://b/p", "gs://b/p", "az://c/p", "memory://"):
        check_scheme(url)
    assert isinstance(open_backend("memory://"), ObjectStorage)


def test_an_unknown_scheme_is_refused_with_those_that_are_known() -> None:
    advice = r"no backend for ftp:// is installed, only for abfs, .*, s3, .*; install .* with an entry point 'ftp' in"
    with pytest.raises(InputError, match=f"files='ftp://host/x' cannot be used: {advice}"):
        check_scheme("ftp://host/x")
    with pytest.raises(MissingDependencyError, match=f"are in ftp://host/x: {advice}"):
        open_backend("ftp://host/x")


@pytest.mark.parametrize("value", ["no_such_module:Backend", "files_backend:NoSuchClass"])
def test_a_backend_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    install(tmp_path, monkeypatch, f"broken = {value}")
    monkeypatch.syspath_prepend(ROOT / "examples" / "extend")
    check_scheme("broken://x")
    with pytest.raises(MissingDependencyError, match=f"backend {value} for broken:// cannot be imported"):
        open_backend("broken://x")


def test_nobody_replaces_a_backend_that_is_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "file = no_such_module:Backend")
    assert isinstance(open_backend(tmp_path.as_uri()), FolderBackend)


@pytest.mark.parametrize("url", ["file:notes", "file://host/notes", "file:///notes?x", "s3://bucket/notes"])
def test_a_url_that_names_no_folder_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="names no folder; give one such as file:///mnt/drive/notes"):
        FolderBackend(url)


def test_a_folder_that_fails_is_reported_with_its_place(tmp_path: Path) -> None:
    files = CachedFiles(FolderBackend((tmp_path / "place").as_uri()), tmp_path / "cache", 10**9)
    (tmp_path / "place" / NAME).mkdir(parents=True)
    assert not files.remove(NAME)
    with pytest.raises(StoreError, match=rf"place: reading {NAME} failed: "):
        files.fetch(NAME)


def test_a_published_file_is_synced_before_it_has_its_name(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FolderBackend(tmp_path.as_uri())
    synced: list[bool] = []
    fsync = os.fsync

    def watch(handle: int) -> None:
        synced.append((tmp_path / NAME).exists())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    backend.publish(source, NAME)
    assert (synced[0], synced[-1]) == (False, True)  # the file before, its folder after
    synced.clear()
    backend.remove(NAME)
    backend.sync([NAME])
    assert synced == [False]


def test_the_example_fits_on_a_screen() -> None:
    code = (ROOT / "examples" / "extend" / "files_backend.py").read_text().splitlines()
    assert len([line for line in code if line.strip()]) <= 40
