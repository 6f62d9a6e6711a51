from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from s3_server import BUCKET, KEYS, Fault, Line, S3Server

from beacon_memory.errors import InputError, MissingDependencyError, StoreError
from beacon_memory.storage.files import remote
from beacon_memory.storage.files.cached import CachedFiles
from beacon_memory.storage.files.durable import make_folder
from beacon_memory.storage.files.names import TEMP_PREFIX
from beacon_memory.storage.files.remote import ObjectStorage

NAME = "kv/0f/0f3a-1b.safetensors"
BIG = bytes(range(256)) * 48_000  # 12 MB: three parts
URL = f"s3://{BUCKET}/notes/2026"


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.stop()


@pytest.fixture
def server(running: S3Server) -> S3Server:
    running.clear()
    return running


@pytest.fixture
def line(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """The only way to the server, for an impatient client."""
    line = Line(server.address)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{line.address[1]}", "AWS_ALLOW_HTTP": "true"}
    for name, value in {**KEYS, **endpoint}.items():
        monkeypatch.setenv(name, value)
    backoff = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}
    monkeypatch.setattr(remote, "_RETRIES", {"max_retries": 2, "backoff": backoff})
    monkeypatch.setattr(remote, "_CLIENT", {**remote._CLIENT, "read_timeout": "1s"})
    monkeypatch.setattr(remote, "_PAUSE_SECONDS", 0.01)
    yield line
    line.close()


@pytest.fixture
def files(line: Line, tmp_path: Path) -> CachedFiles:
    return CachedFiles(ObjectStorage(URL), tmp_path / "cache", 10**9)


def publish(files: CachedFiles, data: bytes, name: str = NAME) -> Path:
    make_folder(files.staging)
    temp = files.staging / f"{TEMP_PREFIX}-{threading.get_ident()}"
    temp.write_bytes(data)
    files.publish(temp, name)
    return temp


def elsewhere(files: CachedFiles, cache_bytes: int = 10**9) -> CachedFiles:
    """The same files from another machine."""
    return CachedFiles(ObjectStorage(URL), files.cache.parent / "elsewhere", cache_bytes)


def cached(files: CachedFiles) -> list[str]:
    return sorted(path.relative_to(files.cache).as_posix() for path in files.cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("data", [b"a memory", BIG], ids=["small", "in parts"])
def test_a_published_file_is_read_on_another_machine(files: CachedFiles, server: S3Server, data: bytes) -> None:
    temp = publish(files, data)
    assert not temp.exists()
    assert server.objects() == {f"notes/2026/{NAME}": data}
    other = elsewhere(files)
    assert other.fetch(NAME).read_bytes() == data
    assert cached(other) == cached(files) == [NAME]
    assert list(other.names()) == [NAME]
    assert other.remove(NAME)
    assert other.remove(NAME)  # gone already
    assert cached(other) == []
    assert list(other.names()) == []
    assert server.objects() == {}


def test_a_file_is_downloaded_once(files: CachedFiles, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PIECE_BYTES", 5_000_000)
    publish(files, BIG)
    publish(files, b"whatever", "kv/0f/other.safetensors")
    line.requests.clear()
    assert files.fetch(NAME).read_bytes() == BIG
    assert line.requests == []
    other = elsewhere(files)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(other.fetch, [NAME] * 8))
    assert {path.read_bytes() for path in paths} == {BIG}
    assert len(line.requests) == 3  # the three pieces


def test_the_cache_needs_no_network(files: CachedFiles, line: Line) -> None:
    publish(files, b"a memory")
    line.close()
    assert files.fetch(NAME).read_bytes() == b"a memory"
    with pytest.raises(StoreError, match=rf"{URL}: reading kv/0f/other failed: .*check url, credentials and network"):
        files.fetch("kv/0f/other")
    with pytest.raises(StoreError, match="uploading kv/0f/other failed"):
        publish(files, b"another", "kv/0f/other")
    with pytest.raises(StoreError, match="listing failed"):
        list(files.names())
    assert not files.remove(NAME)
    assert cached(files) == [NAME]


def test_what_is_not_there_is_reported_missing(files: CachedFiles) -> None:
    with pytest.raises(FileNotFoundError, match=f"{URL}/{NAME}"):
        files.fetch(NAME)
    assert cached(files) == []
    nowhere = CachedFiles(ObjectStorage("s3://no-such-bucket/x"), files.cache, 1)
    with pytest.raises(StoreError, match="NoSuchBucket"):
        publish(nowhere, b"a memory")
    with pytest.raises(StoreError, match="NoSuchBucket"):
        nowhere.claim("ours")
    assert cached(files) == []


def test_a_replaced_label_is_the_new_one(files: CachedFiles, server: S3Server) -> None:
    for label in (b"{}", b'{"title": "b"}'):
        publish(files, label, "kv/0f/0f3a.json")
        assert files.fetch("kv/0f/0f3a.json").read_bytes() == label
        assert server.objects() == {"notes/2026/kv/0f/0f3a.json": label}


def test_a_slow_download_does_not_replace_what_was_published_meanwhile(
    files: CachedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(elsewhere(files), b"old")
    fetch = files.backend.fetch

    def fetch_slowly(name: str, target: Path) -> None:
        fetch(name, target)
        publish(CachedFiles(ObjectStorage(URL), files.cache, 10**9), b"new")

    monkeypatch.setattr(files.backend, "fetch", fetch_slowly)
    assert files.fetch(NAME).read_bytes() == b"new"
    assert cached(files) == [NAME]


FAULTS = {
    "busy": [Fault("busy")] * 2,
    "refused": [Fault("hang up")] * 2,
    "cut": [Fault("answer", after=3_000_000)] * 2,
    "cut more often than obstore goes on": [Fault("answer", after=1_500_000)] * 6,
    "stalled": [Fault("stall", after=3_000_000)],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_broken_download_goes_on(files: CachedFiles, line: Line, faults: list[Fault]) -> None:
    publish(files, BIG)
    line.faults = list(faults)
    assert elsewhere(files).fetch(NAME).read_bytes() == BIG
    assert line.faults == []


@pytest.mark.parametrize("fault", [Fault("busy"), Fault("answer", after=100_000)], ids=["busy", "cut"])
def test_a_hopeless_download_ends_and_leaves_nothing(files: CachedFiles, line: Line, fault: Fault) -> None:
    publish(files, BIG)
    other = elsewhere(files)
    line.requests.clear()
    line.always = fault
    with pytest.raises(StoreError, match=rf"{URL}: reading {NAME} failed: .*(503|body error)"):
        other.fetch(NAME)
    assert len(line.requests) == 9  # three tries of three requests
    assert cached(other) == []
    line.always = None
    assert other.fetch(NAME).read_bytes() == BIG


def test_a_file_that_changes_while_it_is_read_is_refused(files: CachedFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PIECE_BYTES", 5_000_000)
    publish(files, BIG)
    other = elsewhere(files)
    assert isinstance(other.backend, ObjectStorage)
    piece = other.backend._piece

    def change(name: str, file: object, start: int, version: str | None) -> object:
        if start:
            publish(files, BIG[::-1])
        return piece(name, file, start, version)  # type: ignore[arg-type]

    monkeypatch.setattr(other.backend, "_piece", change)
    with pytest.raises(StoreError, match="pre-conditions"):
        other.fetch(NAME)
    assert cached(other) == []


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("upload", after=1_000_000)] * 3,
        [Fault("busy", "partNumber=2")] * 2,
        [Fault("answer", "?uploads=")],
        [Fault("answer", "POST /library/notes/2026/kv/0f/0f3a-1b.safetensors?uploadId", after=10)],
    ],
    ids=["cut", "busy", "first answer lost", "last answer lost"],
)
def test_a_broken_upload_goes_on(files: CachedFiles, line: Line, server: S3Server, faults: list[Fault]) -> None:
    line.faults = list(faults)
    publish(files, BIG)
    assert line.faults == []
    assert server.objects() == {f"notes/2026/{NAME}": BIG}
    assert cached(files) == [NAME]


@pytest.mark.parametrize("data", [b"a memory" * 100, BIG], ids=["small", "in parts"])
@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "replaced"])
def test_a_hopeless_upload_ends_and_changes_nothing(
    files: CachedFiles, line: Line, server: S3Server, data: bytes, old: bytes | None
) -> None:
    if old:
        publish(files, old)
    before = server.objects()
    line.always = Fault("upload", "PUT", after=700)
    with pytest.raises(StoreError, match=rf"{URL}: uploading {NAME} failed: .*PUT http"):
        publish(files, data)
    assert server.objects() == before
    assert server.parts() == {}  # which would cost, unseen
    assert cached(files) == [NAME] * (old is not None)
    line.always = None
    assert list(files.names()) == [NAME] * (old is not None)
    if old:
        assert files.fetch(NAME).read_bytes() == elsewhere(files).fetch(NAME).read_bytes() == old


def test_listing_and_removing_outlast_lost_answers(files: CachedFiles, line: Line, server: S3Server) -> None:
    publish(files, b"a memory")
    line.faults = [Fault("answer", "list-type", after=10)] * 2
    assert list(files.names()) == [NAME]
    line.faults = [Fault("answer", "?delete", after=10)] * 2
    assert files.remove(NAME)
    assert line.faults == []
    assert server.objects() == {}


def test_the_least_recently_used_files_give_way(files: CachedFiles, line: Line) -> None:
    names = [f"kv/{n}{n}/{n}" for n in range(5)]
    for n, name in enumerate(names):
        publish(files, bytes([n]) * 1000, name)
    small = elsewhere(files, 3200)
    for n, name in enumerate(names[:3]):
        os.utime(small.fetch(name), (n, n))
    small.fetch(names[0])  # used again: the next to go is the one after it
    with small.fetch(names[1]).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        os.utime(small.cache / names[1], (1, 1))
        small.fetch(names[3])
        assert cached(small) == [names[0], names[2], names[3]]
        assert mapped[:] == bytes([1]) * 1000
    publish(small, b"x" * 1001, names[4])
    assert cached(small) == [names[3], names[4]]
    line.requests.clear()
    assert small.fetch(names[1]).read_bytes() == bytes([1]) * 1000
    assert len(line.requests) == 1


def test_a_file_larger_than_the_cache_is_kept_alone(files: CachedFiles) -> None:
    small = elsewhere(files, 0)
    for name in ("kv/0f/a", "kv/0f/b"):
        publish(files, b"a memory", name)
        assert small.fetch(name).read_bytes() == b"a memory"
        assert cached(small) == [name]


READ = """
import sys
from beacon_memory.storage.files.cached import CachedFiles
from beacon_memory.storage.files.remote import ObjectStorage
from pathlib import Path
files = CachedFiles(ObjectStorage(sys.argv[1]), Path(sys.argv[2]), 250_000)
for n in range(60):
    n = (n * int(sys.argv[3])) % 5
    while True:  # until nobody else needs the room between the two
        try:
            data = files.fetch(f"kv/0f/{n}").read_bytes()
            break
        except FileNotFoundError:
            pass
    assert data == bytes([n]) * 100_000
"""


def test_processes_and_threads_share_a_cache_that_is_too_small(files: CachedFiles) -> None:
    for n in range(5):
        publish(files, bytes([n]) * 100_000, f"kv/0f/{n}")
    small = elsewhere(files, 250_000)
    command = [sys.executable, "-c", READ, URL, str(small.cache)]
    readers = [subprocess.Popen([*command, step]) for step in "23"]

    def read(n: int) -> bytes:
        while True:
            try:
                return small.fetch(f"kv/0f/{n % 5}").read_bytes()
            except FileNotFoundError:
                pass

    with ThreadPoolExecutor(3) as pool:
        for n, data in enumerate(pool.map(read, range(100))):
            assert data == bytes([n % 5]) * 100_000
    assert [reader.wait() for reader in readers] == [0, 0]
    small.fetch("kv/0f/0")
    publish(small, b"", "kv/0f/empty")
    assert len(cached(small)) <= 3


EVIL = ["../x", "kv/../../x", "kv/0f/../../../x", "/etc/passwd", "kv//x", "kv/0f/", "kv/0f", "", ".beacon-memory"]
EVIL += ["kv/0f/a\0b", "kv\\..\\..\\x", "kv/0f/C:x", "kv/0f/.tmp-1", "kv/0f/ä", "kv/0f/a\n", f"kv/0f/{'a' * 201}"]


@pytest.mark.parametrize("name", EVIL)
def test_no_other_name_becomes_a_path(files: CachedFiles, line: Line, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_text("of somebody else")
    assert not files.remove(name)
    for act in (files.fetch, lambda name: publish(files, b"evil", name)):
        with pytest.raises(StoreError, match=re.escape(f"{name!r} is no name of a store's file")):
            act(name)
    assert line.requests == []
    assert cached(files) == []
    assert (tmp_path / "x").read_text() == "of somebody else"


def test_listing_leaves_out_what_no_store_wrote(files: CachedFiles, server: S3Server) -> None:
    publish(files, b"a memory")
    for key in ("kv/0f/", "kv/0f/a\\b", "kv/0f/.hidden", "kv/ä ö", "kv/readme", "nested/kv/0f/a", "kv/0f/a/b", "x//y"):
        server.client.put_object(Bucket=BUCKET, Key=f"notes/2026/{key}", Body=b"")
    server.client.put_object(Bucket=BUCKET, Key="notes/2026b/kv/0f/a", Body=b"")
    assert list(files.names()) == [NAME]
    for key in ("kv/../../x", "kv//x"):
        server.client.put_object(Bucket=BUCKET, Key=f"notes/2026/{key}", Body=b"")
        with pytest.raises(StoreError, match=f"listing failed: .*notes/2026/{key}.*; remove that object"):
            list(files.names())
        server.client.delete_object(Bucket=BUCKET, Key=f"notes/2026/{key}")


def test_an_empty_object_is_an_empty_file(files: CachedFiles, server: S3Server) -> None:
    server.client.put_object(Bucket=BUCKET, Key=f"notes/2026/{NAME}", Body=b"")
    assert files.fetch(NAME).read_bytes() == b""  # of which its reader says that it is damaged


def test_temporary_files_of_crashes_are_found_while_others_download(
    files: CachedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(files.temps()) == []
    publish(elsewhere(files), b"a memory")
    assert isinstance(files.backend, ObjectStorage)
    piece, seen = files.backend._piece, []

    def look(*arguments: object) -> object:
        seen.extend([*files.cache.rglob(f"{TEMP_PREFIX}*"), *files.temps()])
        return piece(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(files.backend, "_piece", look)
    files.fetch(NAME)
    (download,) = seen  # and not one of temps()
    download.touch()
    os.utime(download, (0, 0))
    (files.staging / f"{TEMP_PREFIX}-1").touch()
    assert list(files.temps()) == [files.staging / f"{TEMP_PREFIX}-1", download]


def test_a_url_belongs_to_one_store(files: CachedFiles, line: Line, server: S3Server) -> None:
    line.faults = [Fault("answer", "PUT")]  # claimed, but nobody heard of it
    files.claim("store-a")
    files.claim("store-a")
    assert server.objects() == {"notes/2026/.beacon-memory": b"store-a"}
    assert list(files.names()) == []
    with pytest.raises(StoreError, match=rf"belongs to another store \('store-a', and this is 'b'\).*{URL}/\.beacon"):
        files.claim("b")
    CachedFiles(ObjectStorage(f"{URL}/b"), files.cache, 1).claim("b")


def test_of_stores_that_claim_a_url_at_once_one_gets_it(files: CachedFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(files.backend, ObjectStorage)
    owner = files.backend._owner
    answers = iter([lambda: elsewhere(files).claim("first"), lambda: None])

    def ask() -> bytes | None:
        found = owner()
        next(answers)()
        return found

    monkeypatch.setattr(files.backend, "_owner", ask)
    with pytest.raises(StoreError, match="belongs to another store"):
        files.claim("second")


@pytest.mark.parametrize(
    "url",
    ["", "s3://", "bucket/notes", "s3:bucket", "ftp://host/x", "https://host.example/x", "C:\\notes", "file:notes"],
)
def test_a_url_that_names_no_object_storage_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"url is {url!r}") + ".*give one such as s3://"):
        ObjectStorage(url)


@pytest.mark.parametrize("url", ["s3://key:hush@bucket/x", "az://box/x?sig=hush", "s3://bucket/x#hush"])
def test_a_url_with_secrets_is_refused_without_showing_them(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="credentials in the environment") as raised:
        ObjectStorage(url)
    assert "hush" not in str(raised.value)


def test_a_bound_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cache_bytes is -1"):
        CachedFiles(ObjectStorage("memory://"), tmp_path, -1)


def test_the_environment_says_if_the_line_may_be_open(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreError, match="builder error"):
        ObjectStorage(URL).claim("ours")
    assert line.requests == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'beacon-memory[remote]'")):
        ObjectStorage(URL)
