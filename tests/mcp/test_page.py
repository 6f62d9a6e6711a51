"""The page on MCP: what it tells hosts to run is what the command takes, and its code runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from repository import ROOT

from beacon_memory.cli.main import app

PAGE = (ROOT / "docs" / "mcp.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands() -> list[list[str]]:
    """The arguments of `beacon-memory` in every configuration and command of the page."""
    hosts = [json.loads(block) for block in blocks("json")] + [tomllib.loads(block) for block in blocks("toml")]
    configured = [server for host in hosts for servers in host.values() for server in servers.values()]
    assert {server["command"] for server in configured} == {"beacon-memory"}
    typed = re.findall(r"^.*?beacon-memory (mcp.*)$", "".join(blocks("bash")), re.MULTILINE)
    return [*(server["args"] for server in configured), *map(shlex.split, typed)]


def test_what_hosts_are_told_to_run_is_what_the_command_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("token").touch()
    found = commands()
    assert len(found) == 6
    group = typer.main.get_command(app)
    for name, *arguments in found:
        group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]  # refuses what it lacks


@pytest.mark.slow
def test_the_client_of_the_page_gets_an_answer(tmp_path: Path) -> None:
    (code,) = blocks("python")
    bin_first = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=bin_first, capture_output=True, text=True, check=True
    )
    assert "Ada Flint" in done.stdout
