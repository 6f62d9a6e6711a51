from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.sqlite import SQLiteCatalog


@pytest.fixture(params=["sqlite", "postgres"])
def open_catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Catalog]]:
    """Open the one catalog of a test, each time anew: in SQLite, and in PostgreSQL."""
    opened: list[Catalog] = []
    if request.param == "postgres":
        from beacon_memory.storage.catalog.postgres.catalog import PostgresCatalog, schema_of
        from beacon_memory.storage.catalog.postgres.connections import PostgresConnections

        url = request.getfixturevalue("postgres").new_database()

    def open_one() -> Catalog:
        if request.param == "sqlite":
            opened.append(SQLiteCatalog(tmp_path / "catalog.sqlite3"))
        else:
            opened.append(PostgresCatalog(PostgresConnections(url, schema_of(""))))
        return opened[-1]

    yield open_one
    for catalog in opened:
        catalog.close()


@pytest.fixture
def catalog(open_catalog: Callable[[], Catalog]) -> Catalog:
    return open_catalog()
