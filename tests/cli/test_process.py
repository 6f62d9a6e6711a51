"""How the process of a command is set up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import gc, os, sys
from beacon_memory.cli import process
process.begin()
print(gc.isenabled(), *map(os.environ.get, ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")), "torch" in sys.modules)
process.imported()
print(gc.isenabled(), gc.get_freeze_count() > 0)
"""


@pytest.mark.parametrize(
    ("given", "waiting"),
    [
        ({}, ["3000", "passive"]),
        ({"OMP_WAIT_POLICY": "active"}, ["None", "active"]),
        ({"GOMP_SPINCOUNT": "5"}, ["5", "None"]),
        ({"KMP_BLOCKTIME": "5"}, ["None", "None"]),
    ],
    ids=str,
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(given: dict[str, str], waiting: list[str]) -> None:
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=unset | given, check=True, capture_output=True, text=True
    ).stdout
    assert printed.split() == ["False", *waiting, "False", "True", "True"]


def test_a_program_that_calls_commands_keeps_its_garbage_collection() -> None:
    program = "import gc\nfrom beacon_memory.cli import process\nprocess.imported()\nprint(gc.get_freeze_count())"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed == "0\n"
