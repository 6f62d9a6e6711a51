"""`add` and `ask` through a server: what they print is what they print without one, and no model is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_samples import ROOF, Run, lines
from command_page import json_fields
from servers import running

from beacon_memory import BeaconMemory
from beacon_memory.server.keys import Right, add_key
from beacon_memory.server.run import RunningServer
from beacon_memory.server.settings import ServerSettings


@pytest.fixture
def server(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    with running(BeaconMemory(tmp_path / "served", model)) as server:
        monkeypatch.setenv("BEACON_MEMORY_URL", f"{server.url}/")
        yield server


def test_documents_are_added_to_the_server(run: Run, server: RunningServer) -> None:
    Path("roof.txt").write_text(ROOF, encoding="utf-8")
    arguments = ["add", "roof.txt", "--ratio", "4", "--tag", "x", "--pin", "--json"]
    (added,) = lines(run(*arguments))
    assert list(added) == json_fields("add")
    row = server.service.memory.show("roof.txt")
    assert (added["status"], added["slots"], added["ratios"]) == ("added", row.slots, [4])
    assert (row.tags, row.pinned, row.metadata) == (("x",), True, {"path": str(Path("roof.txt").absolute())})
    assert lines(run(*arguments))[0]["status"] == "unchanged"
    assert run("list", "--json").stdout == ""  # the store of this machine


def test_answers_are_those_of_the_library(run: Run, server: RunningServer) -> None:
    memory = server.service.memory
    memory.add("roof", ROOF)
    wanted = memory.ask("Who mended it?", ["roof"], max_new_tokens=8)
    arguments = ["ask", "Who mended it?", "--doc", "roof", "--max-new-tokens", "8"]
    (answer,) = lines(run(*arguments, "--json"))
    assert list(answer) == json_fields("ask")
    assert (answer["answer"], answer["ids"], answer["slots"]) == (wanted.text, ["roof"], wanted.usage.slots)
    assert (answer["prompt_tokens"], answer["generated_tokens"]) == (wanted.usage.prompt_tokens, 8)
    plain, streamed = run(*arguments), run(*arguments, "--stream", "--sources")
    assert plain.stdout == streamed.stdout == f"{wanted.text}\n"
    assert f"from roof: {wanted.usage.slots} slots" in plain.stderr
    assert "roof 0-" in streamed.stderr
    Path("schema.json").write_text('{"const": [1, "a"]}', encoding="utf-8")
    assert run("ask", "Who?", "--doc", "roof", "--schema", "schema.json").stdout == '[1, "a"]\n'


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ask", "x", "--store", "s"], "--store is decided by the server"),
        (["ask", "x", "--picker", "attention"], "--picker is decided by the server"),
        (["add", ".", "--prune"], "--prune looks at files of this machine"),
        (["ask", "x", "--doc", "barn"], "'barn'"),
        (["ask", "x", "--budget", "lots"], "budget='lots'"),
        (["ask", "x", "--max-new-tokens", "9999"], "9999 tokens"),
    ],
    ids=str,
)
def test_what_the_server_cannot_do_is_an_error(
    run: Run, server: RunningServer, arguments: list[str], said: str
) -> None:
    Path("roof.txt").write_text(ROOF, encoding="utf-8")
    result = run(*arguments)
    assert (result.exit_code, said in result.stderr) == (1, True), result.stderr


def test_document_that_the_server_refuses_fails_alone(run: Run, server: RunningServer) -> None:
    Path("a.txt").write_text(" \n", encoding="utf-8")
    Path("b.txt").write_text(ROOF, encoding="utf-8")
    result = run("add", "a.txt", "b.txt", "--json")
    assert result.exit_code == 1
    assert [(one["id"], one["status"]) for one in lines(result)] == [("a.txt", "failed"), ("b.txt", "added")]
    assert "empty or blank" in str(lines(result)[0]["reason"])


def test_server_that_cannot_be_reached_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("http://127.0.0.1:1", "no url"):
        monkeypatch.setenv("BEACON_MEMORY_URL", url)
        result = run("ask", "Who?")
        assert (result.exit_code, url in result.stderr) == (1, True)


def test_key_is_taken_from_the_environment(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = add_key(tmp_path / "keys.json", "ada", "mill", [Right.READ, Right.WRITE])
    memory = BeaconMemory(tmp_path / "served", model)
    with running(memory, ServerSettings(keys=tmp_path / "keys.json")) as server:
        monkeypatch.setenv("BEACON_MEMORY_URL", server.url)
        Path("roof.txt").write_text(ROOF, encoding="utf-8")
        without = run("add", "roof.txt")
        assert (without.exit_code, "set BEACON_MEMORY_API_KEY" in without.stderr) == (1, True)
        monkeypatch.setenv("BEACON_MEMORY_API_KEY", key)
        assert run("add", "roof.txt").exit_code == 0
        assert [row.id for row in memory.within("mill").list()] == ["roof.txt"]
        assert memory.list() == []


def test_no_model_is_imported_for_an_answer(server: RunningServer) -> None:
    server.service.memory.add("roof", ROOF)
    program = (
        "import sys; from beacon_memory.cli.main import app\n"
        "try: app()\nfinally: print({'torch', 'transformers', 'sqlite3'} & {*sys.modules}, file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, "ask", "Who?", "--doc", "roof", "--max-new-tokens", "2", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
    assert json.loads(done.stdout)["ids"] == ["roof"]
    assert done.stderr.splitlines()[-1] == "set()"
