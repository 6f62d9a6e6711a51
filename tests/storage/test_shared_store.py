"""A store in PostgreSQL that several machines share, each with a cache of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kv_samples import TEXT, same, sample
from postgres_server import PostgresServer
from store_samples import put

from beacon_memory.conversation import Conversation
from beacon_memory.documents import Label
from beacon_memory.errors import (
    BeaconMemoryError,
    ConflictError,
    CorruptFileError,
    DocumentNotFoundError,
    InputError,
    StoreError,
)
from beacon_memory.storage.archive import copy_documents
from beacon_memory.storage.erasing import erase
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

SECRET = "The heliotrope key lies below the stone."
_WRITE = """
import sys
from store_samples import put
from beacon_memory.storage.store import MemoryStore
with MemoryStore(sys.argv[1], files=sys.argv[2], cache=sys.argv[3]) as store:
    print("ready", flush=True)
    for n in sys.argv[4].split(","):
        put(store, "doc", f"Version {n} of this text.")
"""


class Machines:
    """Machines that share a store: one database, one place for files, a cache each."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.place = (folder / "files").as_uri()
        self.opened: list[MemoryStore] = []

    def open(self, name: str) -> MemoryStore:
        self.opened.append(MemoryStore(self.url, files=self.place, cache=self.folder / name))
        return self.opened[-1]

    def process(self, name: str, versions: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _WRITE, self.url, self.place, str(self.folder / name), versions]
        path = ":".join(sys.path)
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": path, "PATH": "/usr/bin"}
        )

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "files").rglob("*.safetensors"))


@pytest.fixture
def machines(postgres: PostgresServer, tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(postgres.new_database(), tmp_path)
    yield machines
    for store in machines.opened:
        store.close()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_machine_reads_what_another_has_written(machines: Machines) -> None:
    first, second = machines.open("a"), machines.open("b")
    assert second.list() == []
    kv = put(first, "doc", about="keys")
    assert second.list(metadata={"about": "keys"}) == first.list()
    assert same(second.get("doc").kv, kv)
    assert [hit.document for hit in second.search(TEXT.split()[0])] == ["doc"]
    second.update("doc", tags=["x"], pinned=True)
    assert first.row("doc").tags == ("x",)
    second.configure(quota=10**9)
    assert first.settings.quota == 10**9
    assert verify(first) == verify(second) == []
    first.delete("doc")
    with pytest.raises(DocumentNotFoundError):
        second.get("doc")
    assert machines.files() == []


def test_a_machine_that_opens_the_store_later_knows_where_the_files_are(machines: Machines, tmp_path: Path) -> None:
    put(machines.open("a"))
    with MemoryStore(machines.url, cache=tmp_path / "c") as later:
        assert later.get("doc").row.id == "doc"
        assert later.settings.files == machines.place


def test_namespaces_are_apart(machines: Machines) -> None:
    first, second = machines.open("a"), machines.open("b")
    assert first.within("one").list() == []
    assert first.namespaces() == []
    put(first.within("one"))
    put(first, "outside")
    assert second.namespaces() == ["", "one"]
    assert [row.id for row in second.within("one").list()] == ["doc"]
    assert [row.id for row in second.list()] == ["outside"]
    assert second.within("one").get("doc").row.id == "doc"
    assert verify(second.within("one")) == []


def test_conversations_are_those_of_all_machines(machines: Machines) -> None:
    first, second = machines.open("a").conversations, machines.open("b").conversations
    kept = first.put(Conversation("talk", [{"role": "user", "content": "hello\0"}]))
    assert second.get("talk") == kept
    with second.alone("talk"):
        kept = second.put(Conversation("talk", [{"role": "user", "content": "bye"}]))
    assert first.get("talk") == kept
    second.remove("talk")
    assert first.get("talk") is None
    assert first.ids() == []
    assert verify(machines.open("a")) == []


def test_two_machines_that_write_one_id_leave_one_whole_document(machines: Machines) -> None:
    machines.open("a").configure(precision="float32")
    writers = [machines.process(name, ",".join(f"{name}{n}" for n in range(12))) for name in ("one", "two")]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0]
    found = [machines.open(name) for name in ("one", "two", "three")]
    texts = {store.text("doc") for store in found} | {store.read("doc")[1].text for store in found}
    assert texts <= {"Version one11 of this text.", "Version two11 of this text."}
    assert len(texts) == 1
    assert len(machines.files()) == 1
    assert [verify(store) for store in found] == [[], [], []]


def test_who_reads_while_another_deletes_gets_all_or_nothing(machines: Machines) -> None:
    writer, reader = machines.open("a"), machines.open("b")
    put(writer)
    done, failures, seen = threading.Event(), [], 0

    def write() -> None:
        for n in range(15):
            writer.delete("doc")
            put(writer, text=f"{TEXT} {n}")
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        try:
            _, file = reader.read("doc")
            assert file.text.startswith(TEXT)
            seen += 1
        except (DocumentNotFoundError, ConflictError):
            pass
        except BeaconMemoryError as error:
            failures.append(error)
    thread.join()
    assert failures == []
    assert seen
    assert verify(reader) == []


def text_of(store: MemoryStore, id: str) -> str | None:
    """The text of a document, however often the connection is cut meanwhile."""
    while True:
        try:
            return store.text(id)
        except DocumentNotFoundError:
            return None
        except StoreError:
            time.sleep(0.01)


def test_cut_connections_tear_and_lose_nothing(machines: Machines, postgres: PostgresServer) -> None:
    stores = [machines.open(name) for name in ("a", "b")]
    put(stores[0], "calm")
    acknowledged: dict[str, str] = {}
    errors: list[StoreError] = []
    stop = threading.Event()

    def write(store: MemoryStore, name: str) -> None:
        n = 0
        while not stop.is_set():
            n += 1
            id, text = f"{name}{n % 3}", f"Text {n} of {name}."
            try:
                put(store, id, text)
                acknowledged[id] = text
            except StoreError as error:
                errors.append(error)
                if text_of(store, id) == text:  # it was committed, and only the answer was lost
                    acknowledged[id] = text

    threads = [threading.Thread(target=write, args=(store, name)) for store, name in zip(stores, "ab", strict=True)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 120
    while len(errors) < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
        postgres.terminate(machines.url)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(errors) >= 8
    assert all("connection was lost" in str(error) and "try again" in str(error) for error in errors)
    for store in stores:
        assert {id: store.read(id)[1].text for id in acknowledged} == acknowledged
    problems = [*repair(stores[0]), *repair(stores[1])]  # each clears its own cache, too
    assert all(problem.kind in ("orphan-file", "stale-temp") and problem.mended for problem in problems)
    assert verify(stores[0]) == verify(stores[1]) == []
    assert len(machines.files()) == len(stores[0].list())


def test_a_commit_whose_answer_is_lost_keeps_its_file(machines: Machines, postgres: PostgresServer) -> None:
    """The server has committed, and waits for a standby that is not there, when the connection is cut."""
    store = machines.open("a")
    put(store, text="The old text.")
    raised: list[BaseException] = []

    def write() -> None:
        try:
            put(store, text="The new text.")
        except BaseException as error:  # noqa: BLE001 -- handed to the main thread
            raised.append(error)

    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE 'COMMIT%'"
    try:
        with store.parts.catalog().transaction():  # the file is there when the standby is asked for
            thread = threading.Thread(target=write)
            thread.start()
            wait_until(lambda: len(machines.files()) == 2)
            postgres.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
            postgres.execute("SELECT pg_reload_conf()")
            time.sleep(0.5)
        wait_until(lambda: postgres.execute(waiting))
        postgres.execute(f"SELECT pg_terminate_backend(pid) FROM ({waiting}) waiting")
    finally:
        postgres.execute("ALTER SYSTEM RESET synchronous_standby_names")
        postgres.execute("SELECT pg_reload_conf()")
    thread.join(timeout=60)
    assert isinstance(raised[0], StoreError)
    for name in ("a", "b"):
        assert machines.open(name).read("doc")[1].text == "The new text."
    repair(store)
    assert verify(store) == []
    assert len(machines.files()) == 1


def test_a_server_that_was_restarted_is_used_again(
    machines: Machines, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = machines.open("a"), machines.open("b")
    put(store)
    assert other.list()
    postgres.stop(crash=True)
    try:
        with monkeypatch.context() as impatient:
            impatient.setattr("beacon_memory.storage.catalog.postgres.connections._CONNECT_SECONDS", 0.1)
            with pytest.raises(StoreError, match="connection was lost or cannot be made"):
                store.list()
    finally:
        postgres.start()
    assert [row.id for row in other.list()] == ["doc"]
    put(store, "new")
    assert other.get("new").row.id == "new"
    assert verify(store) == []


def test_what_a_killed_machine_was_storing_is_a_leftover_to_the_others(machines: Machines) -> None:
    store = machines.open("a")
    put(store, text="The old text.")
    with store.parts.catalog().transaction():  # so the other can upload, and cannot commit
        process = machines.process("b", "1")
        wait_until(lambda: len(machines.files()) == 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert store.text("doc") == "The old text."
    assert [problem.kind for problem in verify(store)] == ["orphan-file"]
    assert all(problem.mended for problem in repair(store))
    assert verify(store) == []
    assert store.read("doc")[1].text == "The old text."
    assert len(machines.files()) == 1
    assert store.parts.catalog().file_names.begun() == set()


def test_who_repairs_waits_for_writers_on_other_machines(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = machines.open("a"), machines.open("b")
    put(store)
    for name, seconds in {"MOMENT_SECONDS": 0.05, "PATIENT_SECONDS": 0.2, "TIDY_SECONDS": 0.3}.items():
        monkeypatch.setattr(f"beacon_memory.storage.catalog.postgres.locks.{name}", seconds)
    with other.parts.writing(), pytest.raises(StoreError, match="being written to for more than"):
        repair(store)
    assert repair(store) == []


def test_lost_rows_come_back_from_files(machines: Machines) -> None:
    store = machines.open("a")
    put(store, "doc", "Text of the lost document.", about="loss")
    with store.parts.catalog().transaction(), store.parts.connections.use() as db:
        db.execute("DELETE FROM documents")  # as after a backup of before was brought back
        db.execute("DELETE FROM unsettled")
    problems = repair(machines.open("b"))
    assert [(problem.kind, problem.mended) for problem in problems if problem.kind == "lost-row"] == [
        ("lost-row", True)
    ]
    assert store.row("doc").metadata == {"about": "loss"}
    assert store.read("doc")[1].text == "Text of the lost document."
    assert verify(store) == []


def test_damaged_rows_are_noticed_and_made_anew(machines: Machines) -> None:
    store = machines.open("a")
    put(store)
    with store.parts.connections.transaction() as db:
        db.execute("UPDATE documents SET tokens = tokens + 1")
    with pytest.raises(CorruptFileError, match="row of 'doc' is damaged"):
        store.row("doc")
    assert all(problem.mended for problem in repair(machines.open("b")))
    assert verify(store) == []


def test_nothing_of_an_erased_document_is_in_tables_and_files(machines: Machines, postgres: PostgresServer) -> None:
    store = machines.open("a")
    put(store, "kept", "Two owls nest above the hayloft.")
    for text in (SECRET, f"{SECRET} Twice."):
        header, kv = sample("secret", text)
        store.put(header, kv, text, Label({"colour": "heliotrope"}, ["heliotrope"]))
    erase(store, ["secret"])
    postgres.execute("CHECKPOINT")
    for folder in (postgres.data / "base", machines.folder):
        holding = [path for path in folder.rglob("*") if path.is_file() and b"heliotrope" in path.read_bytes()]
        assert holding == []
    assert [row.id for row in store.list()] == ["kept"]
    assert verify(store) == []


def test_erasing_waits_for_who_still_sees_what_was_removed(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beacon_memory.storage.catalog.postgres.catalog.BUSY_SECONDS", 0.2)
    store, other = machines.open("a"), machines.open("b")
    put(store)
    with other.parts.catalog().reading():
        assert other.list()
        with pytest.raises(StoreError, match=r"another session has been reading .* try again"):
            erase(store, ["doc"])
    erase(store)
    assert store.list() == []


def test_a_store_is_copied_into_a_database_and_back(machines: Machines, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "folder") as folder, MemoryStore(tmp_path / "back") as back:
        for n in range(3):
            put(folder, f"doc{n}", f"Text {n}, and its words.", number=n)
        folder.update("doc1", tags=["x"], pinned=True)
        folder.conversations.put(Conversation("talk", [{"role": "user", "content": "hello"}]))
        shared = machines.open("a")
        assert copy_documents(folder, shared) == copy_documents(shared, back) == 3
        for store in (shared, back):
            assert {row.id: row.label for row in store.list()} == {row.id: row.label for row in folder.list()}
            assert [store.read(row.id)[1].text for row in store.list()] == [
                folder.text(row.id) for row in folder.list()
            ]
            assert store.conversations.get("talk").turns == folder.conversations.get("talk").turns
            assert verify(store) == []


def test_without_a_place_that_all_machines_reach_nothing_is_stored(postgres: PostgresServer, tmp_path: Path) -> None:
    with MemoryStore(postgres.new_database(), cache=tmp_path / "cache") as store:
        assert store.list() == []
        with pytest.raises(StoreError, match="no place for K/V files that all machines reach: name one"):
            put(store)
        store.configure(files=(tmp_path / "files").as_uri())
        put(store)
        with pytest.raises(InputError, match="lie where all machines reach them"):
            store.configure(files=None)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://user:secret@host/db", "password in PGPASSWORD"),
        ("postgresql://host/db?password=secret", "password in PGPASSWORD"),
        ("postgresql://host", "names no database"),
        ("mysql://host/db", "is no store"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        MemoryStore(url)
    assert "secret" not in str(raised.value)


def test_a_server_that_is_not_there_is_said_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beacon_memory.storage.catalog.postgres.connections._CONNECT_SECONDS", 0.1)
    url = f"postgresql:///memories?host={tmp_path}"
    said = r"(?s)cannot be made .* try again"
    with (
        MemoryStore(url, cache=tmp_path / "c") as store,
        pytest.raises(StoreError, match=said),
    ):
        store.list()
