"""The command line in this process, and files for it to read, for the tests of its commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from beacon_memory.cli.main import app

ROOF = "The roof of the barn was mended in March by Ada Flint, who used larch boards.\n"
WELL = "The well behind the mill is forty feet deep. Its water tastes of iron.\n"

Run = Callable[..., Result]


def runner(store: Path, model: Path | str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command on a store, for a model, in the folder that the store lies in; `piped` is its standard input."""
    monkeypatch.setenv("BEACON_MEMORY_STORE", str(store))
    monkeypatch.setenv("BEACON_MEMORY_MODEL", str(model))
    monkeypatch.chdir(store.parent)

    def invoke(*arguments: str, piped: str | None = None) -> Result:
        return CliRunner().invoke(app, list(arguments), input=piped)

    return invoke


def lines(result: Result) -> list[dict[str, object]]:
    """What a command has printed as JSON, a line each."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def write(*names: str) -> None:
    """Write files that tell their names and who mended the roof, in folders that are made for them."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"{name}: {ROOF}", encoding="utf-8")
