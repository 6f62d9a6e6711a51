"""The image and the compose file, as far as they go without Docker: what is copied is there, and the command serves."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import yaml  # type: ignore[import-untyped]
from repository import ROOT
from servers import ServerProcess
from tiny_models import tiny_base, tiny_checkpoint

from beacon_memory.server.keys import Right, add_key

LINES = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
STEPS = [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in LINES) if word.isupper()]


def arguments(step: str) -> list[str]:
    """The last list of words that a step of the Dockerfile has."""
    (given,) = [rest for word, rest in STEPS if word == step]
    words: list[str] = json.loads(given[given.index("[") :])
    return words


def test_hadolint_finds_nothing() -> None:
    subprocess.run([Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], check=True)


def test_what_is_copied_is_there_and_is_sent_to_the_builder() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [name for word, rest in STEPS if word == "COPY" for name in shlex.split(rest)[:-1]]
    assert sorted(copied) == sorted(sent)
    assert all((ROOT / name).exists() for name in copied)
    named = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{name}' in named for name in ("README.md", "LICENSE", "beacon_memory"))


def test_the_command_serves_those_who_have_a_key(tmp_path: Path) -> None:
    def here(words: list[str]) -> list[str]:
        return [word.replace("/data", str(tmp_path)) for word in words]

    (store,) = [here([rest])[0].partition("=")[2] for word, rest in STEPS if word == "ENV"]
    command, *options = here(arguments("CMD"))
    assert (command, arguments("ENTRYPOINT")) == ("serve", ["beacon-memory"])
    key = add_key(tmp_path / "keys.json", "ada", "mill", (Right.READ, Right.WRITE))
    model = tiny_checkpoint(tmp_path / "model", tiny_base("llama"))
    with ServerProcess(Path(store), model, *options) as server:
        port = httpx.URL(server.url).port
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
        (check,) = [words for words in [arguments("HEALTHCHECK")] if words[0] == "python"]
        healthy = [sys.executable, "-c", check[-1].replace(":8000", f":{port}")]
        subprocess.run(healthy, check=True)
        listed = httpx.get(f"http://127.0.0.1:{port}/v1/documents", headers={"Authorization": f"Bearer {key}"})
        assert listed.json()["data"] == []
        assert server.terminate() == 0
    assert subprocess.run(healthy, check=False, capture_output=True).returncode != 0


def test_compose_keeps_the_store_and_lets_in_this_machine_alone() -> None:
    compose: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    service = compose["services"]["memory"]
    volumes = dict(one.split(":") for one in service["volumes"])
    assert set(volumes) == set(compose["volumes"])
    assert [*volumes.values()] == [rest for word, rest in STEPS if word == "VOLUME"]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}" for word, port in STEPS if word == "EXPOSE"]
