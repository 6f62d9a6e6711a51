"""Threads and processes at work on one store at the same time."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from crashing import fork, wait
from workload import State, after, document, label, look, perform

from beacon_memory.documents import Text, content_hash
from beacon_memory.errors import ConflictError, DocumentNotFoundError, StoreError
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.kv_file import StoredFile
from beacon_memory.storage.files.locks import tidying, writing
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store") as store:
        yield store


def put(store: MemoryStore, id: str = "doc", version: str = "1") -> None:
    store.put(*document(id, version), label(version))


@contextlib.contextmanager
def processes(*acts: Callable[[], object]) -> Iterator[list[int]]:
    """Processes that run each an act beside what is done inside, and end by themselves."""
    pids = [fork(act) for act in acts]
    try:
        yield pids
    finally:
        codes = [wait(pid) for pid in pids]
    assert codes == [0] * len(acts)


def all_at_once(*acts: Callable[[], object]) -> None:
    """Run each in a thread of its own, and raise what one of them raises."""
    start = threading.Barrier(len(acts))

    def run(act: Callable[[], object]) -> None:
        start.wait()
        act()

    with ThreadPoolExecutor(len(acts)) as threads:
        for done in [threads.submit(run, act) for act in acts]:
            done.result()


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_all(store: MemoryStore) -> None:
    """Read in all ways; fails if anything is of two versions."""
    state = look(store, "doc", still=False)
    assert state is None or state.content == state.label
    for row in store.list():
        version = str(row.metadata["version"])
        assert row.tags == (f"tag{version}",)
        assert row.content_hash == document("doc", version)[0].content_hash
    for hit in store.search("version"):
        assert hit.text == document("doc", hit.text.split()[-1])[2]
    with contextlib.suppress(DocumentNotFoundError):
        text = store.text("doc")
        assert text == document("doc", text.split()[-1])[2]


def test_readers_meet_whole_versions_of_what_is_replaced_renamed_and_deleted(store: MemoryStore) -> None:
    put(store)
    ended = store.folder.with_name("ended")

    def read() -> None:
        with MemoryStore(store.folder) as ours:
            while not ended.exists():
                read_all(ours)

    def write(seed: int) -> None:
        rng = random.Random(seed)
        for n in range(15):
            put(store, "doc", str(seed + n))
            with contextlib.suppress(DocumentNotFoundError, ConflictError):
                rng.choice([lambda: None, lambda: store.rename("doc", f"other-{seed}"), lambda: store.delete("doc")])()
            with contextlib.suppress(DocumentNotFoundError):
                store.delete(f"other-{seed}")

    def write_all() -> None:
        try:
            all_at_once(lambda: write(1000), lambda: write(2000))
        finally:
            ended.touch()

    with processes(read):
        all_at_once(read, read, write_all)
    assert verify(store) == []


def reads_in_a_second(store: MemoryStore) -> None:
    for read in (
        lambda: store.get("doc"),
        lambda: store.text("doc"),
        lambda: store.search("word1"),
        lambda: store.list(tags=["tag1"]),
        lambda: "doc" in store,
        store.totals,
        store.namespaces,
        lambda: MemoryStore(store.folder).get("doc"),
        lambda: MemoryStore(store.folder, "inner").get("doc"),
    ):
        began = time.monotonic()
        assert read()
        assert time.monotonic() - began < 1


def test_reading_waits_neither_for_a_writer_nor_for_a_repair(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beacon_memory.storage.eviction.NOTE_SECONDS", -1)  # each reading tries to note it
    put(store)
    with store.within("inner") as inner:
        put(inner)
    held, done = threading.Event(), threading.Event()

    def write() -> None:
        with writing(store.folder), store.parts.catalog().transaction():
            store.parts.catalog().documents.put(store.row("doc"), Text(store.text("doc")))
            held.set()
            done.wait(30)

    def tidy() -> None:
        with tidying(store.folder):
            held.set()
            done.wait(30)

    for act in (write, tidy):
        thread = threading.Thread(target=act)
        thread.start()
        assert held.wait(30)
        try:
            reads_in_a_second(store)
            with processes(lambda: reads_in_a_second(store), lambda: reads_in_a_second(MemoryStore(store.folder))):
                pass
        finally:
            done.set()
            thread.join()
            held.clear()
            done.clear()


def test_a_writer_waits_for_a_repair_and_a_repair_for_writers_side_by_side(store: MemoryStore) -> None:
    put(store)
    with tidying(store.folder):
        pid = fork(lambda: put(store, "other"))
        time.sleep(0.2)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        assert "other" not in store
    assert wait(pid) == 0
    assert look(store, "other") == State("1", "1")
    with writing(store.folder):
        assert wait(fork(lambda: put(store, "side by side")), 10) == 0
        pid = fork(lambda: repair(store) == [] or os._exit(3))
        time.sleep(0.2)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    assert wait(pid) == 0


def test_ten_threads_on_one_store_that_is_not_there_yet_lose_nothing(store: MemoryStore) -> None:
    states: dict[str, State] = {}

    def work(name: str) -> None:
        rng = random.Random(name)
        ours: dict[str, State] = {}
        for _ in range(12):
            id, other = rng.sample([f"{name}-{n}" for n in range(3)], 2)
            version = str(rng.getrandbits(40))
            operation = rng.choice(
                [
                    ("put", id, version),
                    ("put", id, version),
                    ("replace", id, version),
                    ("update", id, version),
                    ("convert", id),
                    ("rename", id, other),
                    ("delete", id),
                ]
            )
            perform(store, operation)
            ours = after(ours, operation)
            look(store, rng.choice([*states, id]), still=False)
        states.update(ours)

    all_at_once(*(lambda name=name: work(name) for name in "abcdefghij"))
    assert {row.id: look(store, row.id) for row in store.list()} == states
    assert store.totals().documents == len(states) > 5
    assert verify(store) == []


def test_threads_may_read_a_store_that_is_not_there(store: MemoryStore) -> None:
    def read() -> None:
        for _ in range(50):
            assert (store.list(), store.search("word"), "doc" in store, store.totals().bytes) == ([], [], False, 0)

    all_at_once(*[read] * 10)
    assert not store.folder.exists()


def test_first_writers_of_a_store_and_its_namespaces_all_succeed(store: MemoryStore) -> None:
    def write(number: int) -> None:
        with MemoryStore(store.folder, "inner" if number % 2 else "") as ours:
            put(ours, f"doc-{number}")

    with processes(*(lambda n=n: write(n) for n in range(4))):
        all_at_once(*(lambda n=n: write(n) for n in range(4, 8)))
    assert store.namespaces() == ["", "inner"]
    for name, numbers in (("", (0, 2, 4, 6)), ("inner", (1, 3, 5, 7))):
        with store.within(name) as ours:
            assert {row.id for row in ours.list()} == {f"doc-{number}" for number in numbers}
            assert verify(ours) == []


def test_a_quota_is_kept_at_any_moment_by_writers_together(store: MemoryStore) -> None:
    put(store, "pinned")
    store.update("pinned", pinned=True)
    quota = 5 * store.totals().bytes
    store.configure(quota=quota)

    def write(name: str) -> None:
        with MemoryStore(store.folder) as ours:
            for n in range(8):
                put(ours, f"{name}-{n}", str(n))
                assert ours.totals().bytes <= quota

    with processes(lambda: write("a"), lambda: write("b")):
        all_at_once(lambda: write("c"), lambda: write("d"))
    totals = store.totals()
    assert (totals.documents, totals.bytes) == (5, quota)
    assert "pinned" in store
    assert len(list(store.folder.glob("kv/*/*.safetensors"))) == 5
    assert verify(store) == []


def test_labels_changed_in_different_parts_at_the_same_time_keep_both(store: MemoryStore) -> None:
    put(store)

    def change(name: str, values: list[object]) -> None:
        for value in values:
            row = store.update("doc", **{name: value})
            assert getattr(row, name) == getattr(store.row("doc"), name) == value

    all_at_once(
        lambda: change("tags", [(f"tag{n}",) for n in range(15)]),
        lambda: change("metadata", [{"n": n} for n in range(15)]),
        lambda: change("pinned", [bool(n % 2) for n in range(15)]),
    )
    row = store.row("doc")
    assert (row.tags, row.metadata, row.pinned) == (("tag14",), {"n": 14}, False)
    assert verify(store) == []  # labels beside the files say the same


def test_replacing_what_was_read_loses_no_change_of_others(store: MemoryStore) -> None:
    put(store, version="0")

    def count() -> None:
        for _ in range(6):
            while True:
                row, file = store.read("doc")
                with contextlib.suppress(ConflictError):
                    store.put(*document("doc", str(int(file.text.split()[-1]) + 1)), replacing=row)
                    break

    with processes(count):
        all_at_once(count, count)
    assert store.text("doc") == document("doc", "18")[2]


class Overtaken(MemoryStore):
    """A store of which somebody else replaces a document right after it was read for the first time."""

    version = "2"

    def read(self, id: str, fingerprint: str | None = None) -> tuple[DocumentRow, StoredFile]:
        found = super().read(id, fingerprint)
        if self.version:
            version, self.version = self.version, ""
            with MemoryStore(self.folder) as other:
                put(other, id, version)
        return found


def test_what_was_read_before_a_replacement_never_comes_back(store: MemoryStore) -> None:
    put(store)
    with Overtaken(store.folder) as overtaken:
        assert overtaken.convert("doc", "int8").precision == "int8"
    assert look(store, "doc") == State("2", "2", "int8")
    with Overtaken(store.folder) as overtaken, pytest.raises(ConflictError, match="try again"):
        overtaken.rename("doc", "new")
    assert [row.id for row in store.list()] == ["doc"]
    assert look(store, "doc") == State("2", "2")
    assert verify(store) == []


def test_converting_meets_replacements_and_never_brings_old_ones_back(store: MemoryStore) -> None:
    put(store)
    ended = threading.Event()

    def convert() -> None:
        while not ended.is_set():
            try:
                store.convert("doc", "int8")
            except StoreError as error:
                if "was replaced" not in str(error):  # too often to go on
                    raise

    def write() -> None:
        try:
            for n in range(20):
                put(store, version=str(n))
                state = look(store, "doc", still=False)
                assert state
                assert state.content == str(n)
        finally:
            ended.set()

    all_at_once(convert, convert, write)
    state = look(store, "doc")
    assert state
    assert (state.content, state.label) == ("19", "19")
    assert verify(store) == []


def test_a_store_goes_on_in_forked_processes_and_in_their_parent(store: MemoryStore) -> None:
    put(store)

    def write(id: str) -> None:
        assert look(store, "doc") == State("1", "1")
        put(store, id)
        if id == "child":
            assert wait(fork(lambda: write("grandchild"))) == 0
        put(store, f"{id}, too")

    pid = fork(lambda: write("child"))
    put(store, "parent")
    assert wait(pid) == 0
    put(store, "parent, too")
    assert {row.id for row in store.list()} == {
        "doc", "parent", "parent, too", "child", "child, too", "grandchild", "grandchild, too",
    }  # fmt: skip
    assert verify(store) == []


def test_a_forked_process_waits_for_no_thread_of_its_parent(store: MemoryStore) -> None:
    put(store)
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with store.parts._opening, store.uses._lock:
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(30)
    pid = fork(lambda: store.get("doc"))
    try:
        assert wait(pid, 10) == 0
    finally:
        leave.set()
        thread.join()


def test_a_catalog_that_another_process_put_aside_is_not_written_to_any_more(store: MemoryStore) -> None:
    opened = store.folder.with_name("opened")

    def damage_and_repair() -> None:
        await_file(opened)
        for path in store.folder.glob("catalog.sqlite3*"):
            if not path.name.endswith("-shm"):
                path.write_bytes(b"no database" * 10_000)
        with MemoryStore(store.folder) as ours:
            assert "damaged-catalog" in {problem.kind for problem in repair(ours)}

    with processes(damage_and_repair):
        put(store)
        put(store, "other")
        opened.touch()
    put(store, "new")
    with MemoryStore(store.folder) as ours:
        for one in (store, ours):
            assert {row.id: look(one, row.id) for row in one.list()} == dict.fromkeys(
                ("doc", "other", "new"), State("1", "1")
            )
        assert verify(ours) == []


def test_several_repairs_of_one_damaged_catalog_bring_everything_back(store: MemoryStore) -> None:
    for n in range(5):
        put(store, f"doc-{n}")
    store.close()
    (store.folder / "catalog.sqlite3").write_bytes(b"no database" * 1000)
    with processes(*[lambda: repair(MemoryStore(store.folder))] * 3), writing(store.folder):
        time.sleep(1)  # meanwhile all of them find the damage, and wait until nobody writes
    assert {row.id: look(store, row.id) for row in store.list()} == {f"doc-{n}": State("1", "1") for n in range(5)}
    assert verify(store) == []
    assert len(list(store.folder.glob("damaged-*.sqlite3"))) == 1


def test_a_folder_that_was_removed_under_an_open_store_is_made_anew(store: MemoryStore) -> None:
    put(store)
    shutil.rmtree(store.folder)
    assert store.list() == []
    put(store, "new")
    assert look(MemoryStore(store.folder), "new") == State("1", "1")
    assert [row.id for row in store.list()] == ["new"]


def test_what_is_read_in_one_transaction_is_of_one_moment(store: MemoryStore) -> None:
    put(store)
    with store.parts.catalog().reading():
        before = store.row("doc"), store.text("doc")
        assert wait(fork(lambda: put(MemoryStore(store.folder), "doc", "2"))) == 0
        assert (store.row("doc"), store.text("doc")) == before
    assert content_hash(store.text("doc")) == store.row("doc").content_hash != before[0].content_hash
