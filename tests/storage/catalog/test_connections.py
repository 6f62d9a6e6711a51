from __future__ import annotations

import os
import select
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from beacon_memory.errors import CorruptFileError, StoreError
from beacon_memory.storage.catalog import connections
from beacon_memory.storage.catalog.connections import SQLiteConnections


@pytest.fixture
def pool(tmp_path: Path) -> SQLiteConnections:
    pool = SQLiteConnections(tmp_path / "db.sqlite3")
    with pool.use() as db:
        db.execute("CREATE TABLE numbers (number INTEGER UNIQUE)")
    return pool


def numbers(pool: SQLiteConnections) -> list[int]:
    with pool.use() as db:
        return [number for (number,) in db.execute("SELECT number FROM numbers ORDER BY number").fetchall()]


def together(*works: Callable[[], object]) -> None:
    """Run each in a thread of its own; what one raises is raised here."""
    failures: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 -- handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if failures:
        raise failures[0]


def test_a_thread_uses_one_connection_inside_of_itself(pool: SQLiteConnections) -> None:
    with pool.use() as db, pool.use() as again:
        assert again is db
    with pool.use() as later:
        assert later is db


def test_what_is_removed_is_overwritten(pool: SQLiteConnections) -> None:
    with pool.use() as db:
        assert db.execute("PRAGMA secure_delete").fetchone() == (1,)


def test_threads_use_a_connection_each(pool: SQLiteConnections) -> None:
    barrier = threading.Barrier(4)
    used = []

    def work() -> None:
        with pool.use() as db:
            barrier.wait(timeout=30)  # all at the same time
            used.append(db)

    together(*[work] * 4)
    assert len(set(map(id, used))) == 4


def test_threads_that_take_turns_share_a_connection(pool: SQLiteConnections) -> None:
    used = []

    def work() -> None:
        with pool.use() as db:
            used.append(db)

    for _ in range(5):
        together(work)
    assert all(db is used[0] for db in used)


def test_a_reader_is_not_held_up_by_a_transaction(pool: SQLiteConnections) -> None:
    with pool.use() as db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO numbers VALUES (1)")
        started = time.monotonic()
        together(lambda: numbers(pool))
        assert time.monotonic() - started < 10  # it would wait for 30
        db.execute("COMMIT")
    assert numbers(pool) == [1]


def test_waiting_for_another_writer_ends(pool: SQLiteConnections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BUSY_SECONDS", 0.1)
    other = SQLiteConnections(pool.path)
    with pool.use() as db, other.use() as second:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another process has been writing for 0 s; try again"), other.use():
            second.execute("INSERT INTO numbers VALUES (2)")
        db.execute("COMMIT")
    assert numbers(other) == []


@pytest.mark.parametrize("sql", ["SELECT * FROM nowhere", "not SQL", "INSERT INTO numbers VALUES (1), (1)"])
def test_what_sqlite_raises_is_a_store_error_that_says_why(pool: SQLiteConnections, sql: str) -> None:
    with pytest.raises(CorruptFileError, match=r"db\.sqlite3 cannot be used as a catalog: .*repair"), pool.use() as db:
        db.execute(sql)
    assert numbers(pool) == []


def test_a_full_disk_is_no_damage(pool: SQLiteConnections) -> None:
    with pytest.raises(StoreError, match="full; see to space and permissions") as caught, pool.use() as db:  # noqa: PT012
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
        db.execute("CREATE TABLE more AS SELECT zeroblob(1000000) AS data")
    assert not isinstance(caught.value, CorruptFileError)


def test_a_file_that_is_no_database_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "db.sqlite3"
    path.write_bytes(b"not a database at all " * 100)
    with pytest.raises(CorruptFileError, match="file is not a database"), SQLiteConnections(path).use():
        pass


def test_a_folder_that_is_not_there_is_no_damage(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match="unable to open") as caught,
        SQLiteConnections(tmp_path / "nowhere" / "db.sqlite3").use(),
    ):
        pass
    assert not isinstance(caught.value, CorruptFileError)


def test_a_value_that_is_no_utf8_is_read_nevertheless(pool: SQLiteConnections) -> None:
    with pool.use() as db:
        assert db.execute("SELECT CAST(x'61ff62' AS TEXT)").fetchone() == ("a\udcffb",)
        assert db.execute("SELECT 'h\u00e9 \U0001f680'").fetchone() == ("hé 🚀",)


def test_an_error_leaves_no_transaction_behind(pool: SQLiteConnections) -> None:
    with pytest.raises(KeyError), pool.use() as db:  # noqa: PT012 -- what comes before the error is the point
        db.execute("BEGIN")
        raise KeyError
    with pool.use() as db:
        assert db.conn.in_transaction is False


def test_commits_wait_for_the_disk_and_readers_for_nobody(pool: SQLiteConnections) -> None:
    with pool.use() as db:
        settings = ("synchronous", "foreign_keys", "journal_mode", "cell_size_check")
        assert [db.execute(f"PRAGMA {name}").fetchone()[0] for name in settings] == [2, 1, "wal", 1]


def test_a_closed_pool_opens_again(pool: SQLiteConnections) -> None:
    with pool.use() as db:
        db.execute("INSERT INTO numbers VALUES (1)")
    pool.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        db.execute("SELECT 1")
    assert sorted(path.name for path in Path(pool.path).parent.iterdir()) == ["db.sqlite3"]
    assert numbers(pool) == [1]


def test_closing_spares_what_is_in_use(pool: SQLiteConnections) -> None:
    with pool.use() as db:
        pool.close()
        db.execute("INSERT INTO numbers VALUES (1)")
    assert numbers(pool) == [1]


def test_a_database_in_memory_is_one_for_all_threads() -> None:
    pool = SQLiteConnections(":memory:")
    with pool.use() as db:
        db.execute("CREATE TABLE numbers (number INTEGER UNIQUE)")

    def work(n: int) -> None:
        for i in range(20):
            with pool.use() as db:
                db.execute("INSERT INTO numbers VALUES (?)", [20 * n + i])

    together(*[lambda n=n: work(n) for n in range(4)])
    assert numbers(pool) == [*range(80)]


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a fork of this process; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:  # noqa: BLE001 -- the parent learns it from the exit status
        os._exit(1)


def succeeded(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_fork_writes_stays_when_its_parent_closes(pool: SQLiteConnections) -> None:
    ready, go = os.pipe(), os.pipe()

    def work() -> None:
        assert numbers(pool) == []  # with a connection of its own from here on
        os.write(ready[1], b"1")
        assert select.select([go[0]], [], [], 60)[0]
        with pool.use() as db:
            db.execute("INSERT INTO numbers VALUES (1)")

    assert numbers(pool) == []
    child = forked(work)
    os.read(ready[0], 1)
    other = SQLiteConnections(pool.path)
    with other.use() as db:
        db.execute("INSERT INTO numbers VALUES (2)")
    for each in (pool, other):  # all but the child's
        each.close()
    os.write(go[1], b"1")
    assert succeeded(child)
    assert numbers(pool) == [1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_and_its_parent_write_side_by_side(pool: SQLiteConnections) -> None:
    def work(start: int) -> None:
        for n in range(start, start + 30):
            with pool.use() as db:
                db.execute("INSERT INTO numbers VALUES (?)", [n])

    work(0)
    children = [forked(lambda n=n: work(100 * n)) for n in (1, 2)]
    work(300)
    assert all(map(succeeded, children))
    assert numbers(pool) == [n for start in (0, 100, 200, 300) for n in range(start, start + 30)]
    with pool.use() as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
