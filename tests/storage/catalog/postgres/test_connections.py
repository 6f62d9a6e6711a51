from __future__ import annotations

import os
import threading

import pytest
from postgres_server import PostgresServer

from beacon_memory.errors import InputError, StoreError
from beacon_memory.storage.catalog.postgres.connections import PostgresConnections


@pytest.fixture
def pool(postgres: PostgresServer) -> PostgresConnections:
    pool = PostgresConnections(postgres.new_database(), "numbers")
    with pool.use() as db:
        db.execute("CREATE SCHEMA numbers; CREATE TABLE numbers (number integer UNIQUE, name text)")
    return pool


def numbers(pool: PostgresConnections) -> list[int]:
    with pool.use() as db:
        return [number for (number,) in db.execute("SELECT number FROM numbers ORDER BY number").fetchall()]


def test_a_thread_uses_one_connection_inside_of_itself_and_the_next_takes_it(pool: PostgresConnections) -> None:
    with pool.use() as db, pool.use() as again:
        assert again is db
    with pool.use() as later:
        assert later is db


def test_threads_use_a_connection_each(pool: PostgresConnections) -> None:
    barrier, used = threading.Barrier(3), []

    def work() -> None:
        with pool.use() as db:
            barrier.wait(timeout=60)
            used.append(db)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, used))) == 3
    pool.close()


@pytest.mark.parametrize("text", ["a\0b", "\1", "\1\1\2\0", "%s ? :name", "\U0001f469"])
def test_any_text_is_kept_as_it_is(pool: PostgresConnections, text: str) -> None:
    with pool.transaction() as db:
        db.execute("INSERT INTO numbers VALUES (?, ?)", [1, text])
        db.copy("numbers (number, name)", [(2, text)])
        db.executemany("INSERT INTO numbers VALUES (?, ?)", [(3, text)])
        assert db.execute("SELECT DISTINCT name FROM numbers WHERE name = :name", {"name": text}).fetchall() == [
            (text,)
        ]


def test_what_fails_is_undone(pool: PostgresConnections) -> None:
    with pytest.raises(KeyError), pool.transaction() as db:  # noqa: PT012 -- what comes before the error is the point
        db.execute("INSERT INTO numbers VALUES (1)")
        raise KeyError
    with pytest.raises(StoreError, match="duplicate key"), pool.transaction() as db:
        db.executemany("INSERT INTO numbers VALUES (?)", [(2,), (2,)])
    assert numbers(pool) == []


def test_a_value_that_no_index_takes_is_said_to_be_too_long(pool: PostgresConnections) -> None:
    with pool.use() as db:
        db.execute("CREATE INDEX ON numbers (name)")
        with pytest.raises(InputError, match="too long for PostgreSQL"), pool.use():
            db.execute("INSERT INTO numbers VALUES (?, ?)", [1, os.urandom(20_000).hex()])


def test_a_connection_that_was_cut_is_left_for_another(pool: PostgresConnections, postgres: PostgresServer) -> None:
    assert numbers(pool) == []
    assert postgres.terminate(pool.url) == 1
    assert numbers(pool) == []
    with pytest.raises(StoreError, match="connection was lost"), pool.transaction() as db:  # noqa: PT012 -- at its end
        db.execute("INSERT INTO numbers VALUES (1)")
        postgres.terminate(pool.url)
    assert numbers(pool) == []


def test_a_forked_process_opens_connections_of_its_own(pool: PostgresConnections) -> None:
    assert numbers(pool) == []
    child = os.fork()
    if not child:
        failed = 1
        try:
            with pool.transaction() as db:
                db.execute("INSERT INTO numbers VALUES (7)")
            failed = 0
        finally:
            os._exit(failed)
    assert os.waitpid(child, 0)[1] == 0
    assert numbers(pool) == [7]
