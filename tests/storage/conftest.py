from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_memory import folder_in_memory
from postgres_server import PostgresServer


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: a killed process needs no sync, and power cuts are simulated."""
    path = folder_in_memory()
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server; each test takes a database of its own."""
    server = PostgresServer()
    yield server
    server.close()
