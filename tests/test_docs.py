"""The documents say what is there, and their code runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from evaluation_samples import answer, contestant, saved_model

from beacon_memory.cli import app
from beacon_memory.evaluation import field
from beacon_memory.evaluation.metrics import LONGBENCH_METRICS, METRICS
from beacon_memory.training import read_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_names_every_module_and_no_other() -> None:
    tree = re.search(r"```\nbeacon_memory/\n(.*?)\ndocs/", README, re.DOTALL)
    assert tree is not None
    named: list[str] = []
    folder = ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        if line.startswith("    "):  # a module of a sub-package
            named.append(folder + name)
        else:
            folder = name
            named.append(name)
    package = ROOT / "beacon_memory"
    modules = [path.relative_to(package) for path in package.rglob("*.py") if not path.name.startswith("__")]
    packages = {f"{path.parent}/" for path in modules if path.parent.name}
    data = {"adapters/", "calibration.txt", "training/recipes/"}
    assert sorted(named) == sorted({path.as_posix() for path in modules} | packages | data)


def test_the_page_of_evaluation_names_what_there_is() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    names = (field.__doc__ or "").partition("\n\n")[2].partition("\n\n")[0]
    for name in re.findall(r"(?:^    |, )([a-z0-9-]+(?::R)?(?::N)?)(?=,|  )", names, re.MULTILINE):
        assert f"`{name}`" in page, name
    for metric in METRICS:
        assert f"`{metric}`" in page, metric
    for dataset in LONGBENCH_METRICS:
        assert dataset in page, dataset


def test_the_contestant_that_the_page_of_evaluation_adds_can_answer() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "evaluation.md", "exec"), names)  # noqa: S102  # our own document
    half, whole = names["EverySecond"]("half", saved_model()), contestant("full")
    assert answer(half).text != answer(whole).text
    assert answer(half).kv_bytes == pytest.approx(answer(whole).kv_bytes / 2, rel=0.01)


def test_links_between_documents_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """All commands, those of groups inside it too, under their full names."""
    for name, command in group.commands.items():
        yield f"{prefix} {name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")


def test_every_command_and_option_has_help_and_a_place_on_the_page() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    found = dict(commands(typer.main.get_command(app), "beacon-memory"))
    assert {"beacon-memory add", "beacon-memory eval", "beacon-memory eval qa"} <= found.keys()
    for name, command in found.items():
        assert command.help, name
        assert name in page, name
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert parameter.help, f"{name} {parameter.name}"
                assert any(flag in page for flag in parameter.opts), f"{name} {parameter.opts}"


def test_the_smallest_recipe_on_the_page_can_be_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.toml")[0].stages[0].name == "questions"


@pytest.mark.slow
def test_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102  # our own document
    assert [row.id for row in names["memory"].list()] == ["lease", "owls", "well"]  # type: ignore[attr-defined]
