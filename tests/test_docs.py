"""The documents say what is there, and their code runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from command_page import json_fields, sections
from evaluation_samples import answer, baseline, saved_model
from repository import ROOT

from beacon_memory.cli.main import app
from beacon_memory.evaluation import field
from beacon_memory.evaluation.metrics import LONGBENCH_METRICS, METRICS
from beacon_memory.training import read_recipe

README = (ROOT / "README.md").read_text(encoding="utf-8")


def named_files(tree: str) -> list[str]:
    """The files and folders that an indented tree names, as paths."""
    named: list[str] = []
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        name = line.split()[0]
        folders = folders[:depth]
        named.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return named


def test_the_page_of_the_architecture_names_every_module_and_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"```\nbeacon_memory/\n(.*?)\n```", page, re.DOTALL)
    assert tree is not None
    package = ROOT / "beacon_memory"
    modules = [path.relative_to(package) for path in package.rglob("*.py") if not path.name.startswith("__")]
    packages = {f"{path.parent.as_posix()}/" for path in modules if path.parent.name}
    data = {"modeling/adapters/", "compression/calibration.txt", "training/recipes/"}
    assert sorted(named_files(tree[1])) == sorted({path.as_posix() for path in modules} | packages | data)


def test_the_readme_names_every_room() -> None:
    tree = re.search(r"```\nbeacon_memory/.*?\n(.*?)\nintegrations/", README, re.DOTALL)
    assert tree is not None
    rooms = {f"{path.parent.name}/" for path in (ROOT / "beacon_memory").glob("*/__init__.py")}
    assert set(named_files(tree[1])) == rooms


def test_the_page_of_evaluation_names_what_there_is() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    names = (field.__doc__ or "").partition("\n\n")[2].partition("\n\n")[0]
    for name in re.findall(r"(?:^    |, )([a-z0-9-]+(?::R)?(?::N)?)(?=,|  )", names, re.MULTILINE):
        assert f"`{name}`" in page, name
    for metric in METRICS:
        assert f"`{metric}`" in page, metric
    for dataset in LONGBENCH_METRICS:
        assert dataset in page, dataset


def test_the_baseline_that_the_page_of_evaluation_adds_can_answer() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "evaluation.md", "exec"), names)  # noqa: S102  # our own document
    half, whole = names["EverySecond"]("half", saved_model()), baseline("full")
    assert answer(half).text != answer(whole).text
    assert answer(half).kv_bytes == pytest.approx(answer(whole).kv_bytes / 2, rel=0.01)


def test_links_between_documents_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """All commands, those of groups inside it too, under their full names."""
    for name, command in group.commands.items():
        yield f"{prefix} {name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")


def test_every_command_option_and_argument_has_help_and_a_place_in_its_section_of_the_page() -> None:
    page = sections()
    shared, opening = page[""], "beacon-memory"
    found = dict(commands(typer.main.get_command(app), opening))
    assert {f"{opening} {name}" for name in ("add", "import", "settings", "eval", "eval qa")} <= found.keys()
    assert {name.split()[1] for name in found} == page.keys() - {""}
    for name, command in found.items():
        section = page[name.split()[1]]
        assert command.help, name
        assert f"    {name}" in section, name
        for parameter in command.params:
            assert parameter.help or parameter.name == "help", f"{name} {parameter.name}"
            flags = [] if parameter.name == "help" else [*parameter.opts, *parameter.secondary_opts]
            for flag in flags if parameter.param_type_name == "option" else []:
                assert re.search(rf"{flag}\b", shared + section), f"{name} {flag}"


def test_help_and_the_page_name_the_same_fields_of_json() -> None:
    named = 0
    for name, command in commands(typer.main.get_command(app), ""):
        if said := re.search(r"--json one object(?: a line)?: ([\w, \n]+)\.", command.help):
            assert said[1].replace("\n", " ").split(", ") == json_fields(name.strip()), name
            named += 1
    assert named >= 20


def test_the_smallest_recipe_on_the_page_can_be_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.toml")[0].stages[0].name == "questions"


@pytest.mark.slow
def test_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102  # our own document
    assert [row.id for row in names["memory"].list()] == ["contracts/mill", "owls", "well"]  # type: ignore[attr-defined]
