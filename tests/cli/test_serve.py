"""`serve` and `keys`: who may be let in is settled before a model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_samples import Run

from beacon_memory.server.keys import Keys, Right


def test_keys_are_made_listed_and_removed(run: Run) -> None:
    made = run("keys", "add", "keys.json", "ada", "--namespace", "mill", "--right", "read")
    assert made.exit_code == 0
    caller = Keys(Path("keys.json")).caller(made.stdout.strip())
    assert caller is not None
    assert (caller.name, caller.namespace, caller.rights) == ("ada", "mill", {Right.READ})
    assert run("keys", "add", "keys.json", "bob").exit_code == 0
    listed = run("keys", "list", "keys.json").stdout.splitlines()
    assert [line.split()[:3] for line in listed] == [["ada", "mill", "read"], ["bob", "-", "read,write"]]
    assert made.stdout.strip() not in Path("keys.json").read_text(encoding="utf-8")
    assert run("keys", "remove", "keys.json", "ada").stdout == "removed ada\n"
    again = run("keys", "remove", "keys.json", "ada")
    assert (again.exit_code, "no key of the name 'ada'" in again.stderr) == (1, True)
    assert [one["name"] for one in json.loads(Path("keys.json").read_text(encoding="utf-8"))["keys"]] == ["bob"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1"])
def test_no_server_for_others_without_keys(run: Run, host: str) -> None:
    result = run("serve", "--host", host)
    assert (result.exit_code, "keys add" in result.stderr) == (1, True)


def test_file_that_is_none_of_keys_starts_no_server(run: Run) -> None:
    Path("keys.json").write_text("{}", encoding="utf-8")
    result = run("serve", "--api-keys", "keys.json", "--port", "0")
    assert (result.exit_code, "no file of keys" in result.stderr) == (1, True)


def test_keys_need_neither_torch_nor_a_web_framework() -> None:
    unneeded = {"torch", "fastapi", "httpx", "beacon_memory.distributed"}
    program = f"import sys, beacon_memory.cli.main; print({unneeded} & {{*sys.modules}})"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed == "set()\n"
