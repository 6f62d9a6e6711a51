"""What `--help` looks like."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from beacon_memory.cli.main import app


def shown(*arguments: str, color: bool = False) -> str:
    return CliRunner().invoke(app, [*arguments, "--help"], color=color).stdout


def test_commands_stand_in_sections_with_their_whole_first_sentence() -> None:
    lines = shown().splitlines()
    sections = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["Options:", "Commands:", "What is stored:", "The store:"]
    assert lines.index("The store:") < lines.index(
        "  export      Write documents, with all that is known of them, into one file,"
    )
    assert "              for a backup or another store." in lines
    assert max(map(len, lines)) <= 80


def test_a_terminal_gets_colours_and_nobody_else() -> None:
    assert "\033[36m--store DIR\033[0m" in shown("list", color=True)
    assert "\033" not in shown("list")


def test_help_fills_a_wider_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # of which typer's runner knows nothing
    app(["add", "--help"], standalone_mode=False)
    assert 80 < max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_what_is_laid_out_by_hand_stays_as_it_is() -> None:
    assert "  hybrid:R                      both, beacons and chosen tokens\n" in shown("eval")
    assert max(map(len, shown("eval").splitlines())) <= 80
