from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from in_memory import folder_in_memory
from postgres_server import postgres  # noqa: F401  # a fixture

from beacon_memory.storage.store import MemoryStore


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: a killed process needs no sync, and power cuts are simulated."""
    path = folder_in_memory()
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["folder", "database"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], MemoryStore]]:
    """Open the one store of a test, each time anew: in a folder, and in a database with its files elsewhere."""
    opened: list[MemoryStore] = []
    if request.param == "database":
        url, place = request.getfixturevalue("postgres").new_database(), (tmp_path / "files").as_uri()

    def open_one() -> MemoryStore:
        if request.param == "folder":
            opened.append(MemoryStore(tmp_path / "store"))
        else:
            opened.append(MemoryStore(url, files=place, cache=tmp_path / "store"))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()
