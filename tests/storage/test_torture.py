"""The short form of `just torture`: rounds of each kind, among them such that once failed."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import pytest
from rounds.faults import let_fail
from torture import KINDS, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills, traces and forks processes as Linux lets it")

SEEDS = {
    "kills": [1],
    "power cuts": [1002, 2031, 2045, 7015],
    "mutations": [2, 5, 6],
    "faults": [2, 17],
    "processes": [1],
}


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name in KINDS for seed in SEEDS[name]])
def test_a_store_keeps_its_promises_under_torture(name: str, seed: int) -> None:
    try:
        run(name, seed)
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("operation", "call", "how"),
    [
        ("replacement", ("sync", "-wal"), 0),  # a commit that was taken back, and is in the log
        ("update", ("sync", "-wal"), 0),
        ("configure", ("sync", "-wal"), 0),
        ("read", ("read", "catalog.sqlite3"), 0),  # SQLite takes a disk that cannot be read for damage
        ("verify", ("read", "catalog.sqlite3"), 0),
        ("remote repair", ("read", "catalog.sqlite3"), 0),  # a check of SQLite names such a page, and no error
        ("read", ("map", ".safetensors"), 1),  # no memory
        ("erase", ("stat", ".safetensors"), 0),  # what cannot be looked at is not gone
        ("export", ("stat", "archive"), 0),
        ("export", ("open", "archive.part"), 2),
        ("update", ("stat", "catalog.sqlite3"), 0),
    ],
)
def test_whichever_of_these_calls_fails_nothing_is_lost_and_nothing_called_damage(
    folder: Path, operation: str, call: tuple[str, str], how: int
) -> None:
    try:
        assert let_fail(folder, operation, count(1), how, call)
    except PermissionError as error:
        pytest.skip(str(error))
