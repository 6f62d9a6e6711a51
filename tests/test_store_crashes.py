from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from kv_samples import FINGERPRINT, TEXT, finish, same, start
from store_samples import files, put

from beacon_memory.document import content_hash
from beacon_memory.kv import BeaconKV, MemoryKV
from beacon_memory.kv_file import DocumentHeader, WindowSpan
from beacon_memory.store import MemoryStore


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(tmp_path / "store")


_KILLED = """
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def publish_and_die(temp, path):
    kv_file.publish(temp, path)
    die()
"""


@pytest.mark.parametrize(
    ("where", "left"), [("publish = publish_and_die", "orphan-file"), ("publish = die", "stale-temp")]
)
@pytest.mark.parametrize("id", ["doc", "new"])
def test_a_killed_put_leaves_no_row_and_a_file_that_verify_sweeps(
    store: MemoryStore, where: str, left: str, id: str
) -> None:
    kv = put(store)
    script = _KILLED + f"store.{where}\nMemoryStore(folder).put(*sample({id!r}, 'new text'), 'new text')"
    assert finish(start(script, store.folder))[0] == -signal.SIGKILL
    assert [row.id for row in store.list()] == ["doc"]
    assert same(store.get("doc").kv, kv)
    assert store.text("doc") == TEXT
    assert not store.search("new")
    assert len(files(store)) == 2
    if left == "stale-temp":
        assert store.verify(repair=True) == []  # it might be of a put that is going on
        (temp,) = (store.folder / "kv").rglob(".tmp*")
        os.utime(temp, (0, 0))
    (seen,) = store.verify()
    assert (seen.kind, seen.removed, seen.document) == (left, False, id if left == "orphan-file" else None)
    assert "repair=True" in seen.message
    (swept,) = store.verify(repair=True)
    assert (swept.kind, swept.removed, swept.path) == (left, True, seen.path)
    assert "removed" in swept.message
    assert store.verify() == []
    assert len(files(store)) == 1
    put(store, id, "new text")
    assert store.text(id) == "new text"


def test_a_put_killed_after_its_commit_has_replaced_the_document(store: MemoryStore) -> None:
    put(store)
    script = _KILLED + "store._unlink = die\nMemoryStore(folder).put(*sample(text='new text'), 'new text')"
    assert finish(start(script, store.folder))[0] == -signal.SIGKILL
    assert store.get("doc").row.content_hash == content_hash("new text")
    assert [problem.kind for problem in store.verify(repair=True)] == ["orphan-file"]
    assert files(store) == [store.folder / store.get("doc").row.file]


def test_a_killed_delete_has_removed_the_row_first(store: MemoryStore) -> None:
    put(store)
    script = _KILLED + "store._unlink = die\nMemoryStore(folder).delete('doc')"
    assert finish(start(script, store.folder))[0] == -signal.SIGKILL
    assert "doc" not in store
    assert not store.search("boat")
    assert [(problem.kind, problem.document) for problem in store.verify(repair=True)] == [("orphan-file", "doc")]
    assert not files(store)


def test_verify_does_not_sweep_the_put_of_another_process(store: MemoryStore) -> None:
    put(store)
    child = start(
        """
        def publish_slowly(temp, path):
            kv_file.publish(temp, path)
            print("published", flush=True)
            time.sleep(1)
        store.publish = publish_slowly
        MemoryStore(folder).put(*sample("slow", "a text"), "a text")
        """,
        store.folder,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "published\n"
    assert store.verify(repair=True) == []
    assert finish(child)[0] == 0
    assert store.get("slow").row.id == "slow"


_WRITER = """
with MemoryStore(folder) as ours:
    for n in range(12):
        for id in ("shared", f"{name}-{n}"):
            text = f"the text of {name}, number {n}"
            ours.put(*sample(id, text), text)
"""


def test_processes_that_put_at_the_same_time_lose_nothing(store: MemoryStore) -> None:
    put(store, "shared")
    children = [start(f"name = {name!r}" + _WRITER, store.folder) for name in ("anna", "bela")]
    while any(child.poll() is None for child in children):
        found = store.get("shared")
        assert found.header.content_hash == found.row.content_hash
        assert "shared" in {row.id for row in store.list()}
    assert [finish(child) for child in children] == [(0, "", "")] * 2
    assert {row.id for row in store.list()} == {"shared"} | {f"{n}-{i}" for n in ("anna", "bela") for i in range(12)}
    assert store.text("shared") in {f"the text of {name}, number 11" for name in ("anna", "bela")}
    assert content_hash(store.text("shared")) == store.get("shared").row.content_hash
    assert store.verify() == []
    assert len(files(store)) == 25


def test_a_reader_sees_one_version_while_threads_replace_it(store: MemoryStore) -> None:
    def versioned(n: int) -> None:
        text = f"version {n}"
        window = WindowSpan(2, 1, 0, len(text))
        header = DocumentHeader("doc", content_hash(text), 2, (window,), (), "beacon", 2, FINGERPRINT)
        full = torch.full((1, 1, 2, 2), float(n))
        store.put(header, MemoryKV.of(BeaconKV(full, full)), text)

    versioned(0)
    writer = threading.Thread(target=lambda: list(map(versioned, range(1, 40))))
    writer.start()
    seen = set()
    while writer.is_alive():
        found = store.get("doc")
        n = int(found.kv.keys[0, 0])
        assert found.row.content_hash == found.header.content_hash == content_hash(f"version {n}")
        assert (found.kv.values == n).all()
        seen.add(n)
    writer.join()
    assert int(store.get("doc").kv.keys.mean()) == 39
    assert len(files(store)) == 1
    assert len(seen) > 1
