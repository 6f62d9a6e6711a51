"""The documents say what is there, and their code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from beacon_memory.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_names_every_module_and_no_other() -> None:
    tree = re.search(r"```\nbeacon_memory/\n(.*?)\ndocs/", README, re.DOTALL)
    assert tree is not None
    named = {line.split()[0] for line in tree[1].splitlines()}
    package = {path.name for path in (ROOT / "beacon_memory").glob("*.py") if not path.name.startswith("__")}
    assert named == package | {"adapters/"}


def test_links_between_documents_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_and_option_has_help_and_a_place_on_the_page() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]  # it is a group
        assert command.help, name
        assert f"beacon-memory {name}" in page, name
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert parameter.help, f"{name} {parameter.name}"
                assert any(flag in page for flag in parameter.opts), f"{name} {parameter.opts}"


@pytest.mark.slow
def test_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102  # our own document
    assert [row.id for row in names["memory"].list()] == ["lease", "owls", "well"]  # type: ignore[attr-defined]
