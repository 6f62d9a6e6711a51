from __future__ import annotations

import threading

import pytest
from catalog_samples import add
from postgres_server import PostgresServer

from beacon_memory.errors import StoreError
from beacon_memory.storage.catalog.check import find_flaws
from beacon_memory.storage.catalog.postgres import migrations
from beacon_memory.storage.catalog.postgres.catalog import PostgresCatalog
from beacon_memory.storage.catalog.postgres.connections import PostgresConnections, PostgresDatabase


@pytest.fixture
def pool(postgres: PostgresServer) -> PostgresConnections:
    return PostgresConnections(postgres.new_database(), "beacon_memory")


def applied(pool: PostgresConnections) -> list[str]:
    with pool.use() as db:
        return [name for (name,) in db.execute("SELECT name FROM migrations ORDER BY name").fetchall()]


def test_a_new_catalog_has_all_steps_and_is_sound(pool: PostgresConnections) -> None:
    assert not migrations.exists(pool)
    catalog = PostgresCatalog(pool)
    assert migrations.exists(pool)
    assert applied(pool) == [step.__name__ for step in migrations.STEPS]
    assert find_flaws(catalog) == []


def test_a_newer_catalog_says_to_upgrade(pool: PostgresConnections) -> None:
    PostgresCatalog(pool)
    with pool.transaction() as db:
        db.execute("INSERT INTO migrations VALUES ('m999_future', 'x')")
    with pytest.raises(StoreError, match=r"newer beacon_memory \(m999_future\); upgrade"):
        PostgresCatalog(pool)


def test_a_step_that_fails_leaves_the_catalog_as_it_was(
    pool: PostgresConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(PostgresCatalog(pool), "doc", "text")

    def m998_later(db: PostgresDatabase) -> None:
        db.execute("CREATE TABLE later (name text)")
        db.execute("CREATE TABLE later (name text)")

    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, m998_later))
    before = applied(pool)
    with pytest.raises(StoreError, match='"later" already exists'):
        PostgresCatalog(pool)
    assert applied(pool) == before
    monkeypatch.undo()
    assert PostgresCatalog(pool).documents.text("doc") == "text"


def test_many_may_create_the_same_catalog(postgres: PostgresServer) -> None:
    url, failures = postgres.new_database(), []

    def create() -> None:
        try:
            PostgresCatalog(PostgresConnections(url, "beacon_memory")).close()
        except BaseException as error:  # noqa: BLE001 -- handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert find_flaws(PostgresCatalog(PostgresConnections(url, "beacon_memory"))) == []
