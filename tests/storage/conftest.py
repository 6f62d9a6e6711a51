from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_memory import folder_in_memory


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: a killed process needs no sync, and power cuts are simulated."""
    path = folder_in_memory()
    yield path
    shutil.rmtree(path)
