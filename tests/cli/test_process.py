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
print(gc.isenabled(), os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
process.imported()
print(gc.isenabled(), gc.get_freeze_count() > 0)
"""


@pytest.mark.parametrize(
    ("given", "policy"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "5"}, "None")],
    ids=str,
)
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(given: dict[str, str], policy: str) -> None:
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=unset | given, check=True, capture_output=True, text=True
    ).stdout
    assert printed.split() == ["False", policy, "False", "True", "True"]


def test_a_program_that_calls_commands_keeps_its_garbage_collection() -> None:
    program = "import gc\nfrom beacon_memory.cli import process\nprocess.imported()\nprint(gc.get_freeze_count())"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed == "0\n"
