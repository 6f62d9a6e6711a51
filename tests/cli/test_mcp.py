"""The command that serves agents, as a host runs it: in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from cli_samples import Run, lines
from mcp import Client, StdioServerParameters


def environment() -> dict[str, str]:
    """What the child needs of this process: where the package is, and which store and model it is for."""
    return {
        name: os.environ[name] for name in os.environ if name.startswith(("BEACON", "PYTHON", "OMP", "PATH", "HOME"))
    }


def child(*options: str) -> StdioServerParameters:
    return StdioServerParameters(
        command=sys.executable, args=["-m", "beacon_memory", "mcp", *options], env=environment()
    )


async def test_a_host_starts_the_command_and_uses_its_tools(run: Run) -> None:
    async with Client(child("--namespace", "agent")) as client:
        assert client.server_info is not None
        assert client.server_info.name == "beacon-memory"
        assert len((await client.list_tools()).tools) == 6
        stored = await client.call_tool("remember", {"id": "lease", "text": "The rent is paid by Ada Flint. \u0142 😀"})
        assert not stored.is_error, stored.content
        found = await client.call_tool("search", {"query": "rent"})
        assert found.structured_content is not None
        assert found.structured_content["result"][0]["text"].endswith("\u0142 😀")
        answered = await client.call_tool("ask", {"question": "Who pays the rent?", "max_tokens": 4})
        assert not answered.is_error, answered.content
        refused = await client.call_tool("forget", {"ids": ["leese"]})
        assert refused.is_error
        assert "did you mean 'lease'?" in refused.content[0].text  # type: ignore[union-attr]
    assert lines(run("list", "--json")) == []
    (row,) = lines(run("list", "--json", "--namespace", "agent"))
    assert row["id"] == "lease"
    assert row["used_at"] is not None  # the memory was closed


async def test_a_model_that_cannot_be_loaded_is_told_to_the_agent(run: Run, tmp_path: Path) -> None:
    async with Client(child("--model", str(tmp_path / "nowhere"))) as client:
        asked = await client.call_tool("remember", {"id": "lease", "text": "The rent is paid by Ada Flint."})
    assert asked.is_error
    assert "nowhere" in asked.content[0].text  # type: ignore[union-attr]


async def test_the_command_serves_by_http_until_it_is_interrupted(run: Run, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("open sesame\n", encoding="utf-8")
    command = [sys.executable, "-m", "beacon_memory", "mcp", "--http", "--port", "0", "--token-file", "token"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, ExitStack() as failed:
        failed.callback(process.kill)
        assert process.stderr is not None
        announced = re.search(r"serving at (http://127\.0\.0\.1:\d+/mcp)", process.stderr.readline())
        assert announced is not None
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        known = httpx2.AsyncClient(headers={"Authorization": "Bearer open sesame"})
        async with known, Client(streamable_http_client(announced[1], http_client=known)) as client:
            assert not (await client.call_tool("list", {})).is_error
        assert httpx2.post(announced[1], json={}).status_code == 401
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
        process.wait()
    assert process.returncode in {0, 130}


def test_what_would_be_served_to_others_without_a_token_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for arguments, reason in (
        (["--http", "--host", "0.0.0.0"], "give a token"),
        (["--http", "--token-file", "empty"], "the token is empty"),
        (["--token-file", "empty"], "--token-file is for --http"),
    ):
        refused = run("mcp", *arguments)
        assert refused.exit_code == 1, refused.stderr
        assert reason in refused.stderr
    assert run("mcp", "--http", "--token-file", "nowhere").exit_code == 2


def test_without_the_extra_the_command_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beacon_memory.cli.mcp.find_spec", lambda _: None)
    refused = run("mcp")
    assert refused.exit_code == 1
    assert "pip install 'beacon-memory[mcp]'" in refused.stderr
