"""The documents say what is there, and their code runs."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import langchain_beacon_memory
import llama_index_beacon_memory
import pytest
import torch
import typer
import vllm_beacon_memory
from command_page import json_fields, sections
from evaluation_samples import answer, baseline, saved_model
from repository import ROOT

import beacon_memory
from beacon_memory.cli.main import app
from beacon_memory.evaluation import baseline_names
from beacon_memory.evaluation.metrics import LONGBENCH_METRICS, METRICS
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.kv.quantize import quantized
from beacon_memory.storage.files.stored_kv import stored_bytes
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
    data = {"modeling/adapters/", "compression/calibration.txt", "server/page/", "training/recipes/"}
    data |= {"planning/models.toml", "planning/hardware.toml"}
    assert sorted(named_files(tree[1])) == sorted({path.as_posix() for path in modules} | packages | data)


def test_the_readme_names_every_room() -> None:
    tree = re.search(r"```\nbeacon_memory/.*?\n(.*?)\nintegrations/", README, re.DOTALL)
    assert tree is not None
    rooms = {f"{path.parent.name}/" for path in (ROOT / "beacon_memory").glob("*/__init__.py")}
    assert set(named_files(tree[1])) == rooms


@pytest.mark.parametrize(
    ("name", "layers", "heads", "head_dim", "cells"),
    [
        (name, int(layers), int(heads), int(head_dim), cells.strip(" |").split(" | "))
        for name, layers, heads, head_dim, cells in re.findall(
            r"^\| (\S+).*?: (\d+) layers, (\d+) KV heads of (\d+) (\|.*)$", README, re.MULTILINE
        )
    ],
)
def test_the_readme_says_what_a_document_takes(
    name: str, layers: int, heads: int, head_dim: int, cells: list[str]
) -> None:
    def megabytes(slots: int, bits: int | None = None) -> str:
        head = MemoryKV.of(BeaconKV(*torch.zeros(2, 1, 1, slots, head_dim, dtype=torch.bfloat16)))
        kv = head if bits is None else quantized(head, bits)
        return f"{layers * heads * stored_bytes(kv) / 1e6:.1f} MB"

    token = 4 * layers * heads * head_dim  # bytes: key and value, 16 bits each
    shown = [f"{token / 1e3:.1f} kB", f"{token / 1e3:.1f} MB", megabytes(250), megabytes(125), megabytes(125, 4)]
    assert cells == shown, name


def test_the_page_of_evaluation_names_what_there_is() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    names = (baseline_names.__doc__ or "").partition("\n\n")[2].partition("\n\n")[0]
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
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_reference_names_every_public_name_once() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    packages = (beacon_memory, langchain_beacon_memory, llama_index_beacon_memory, vllm_beacon_memory)
    public = [f"{package.__name__}.{name}" for package in packages for name in package.__all__]
    assert sorted(shown) == sorted(name for name in public if not name.endswith("__version__"))


def messages() -> Iterator[str]:
    """All texts in the code that are no docstrings, with … for each field of an f-string."""
    for path in (*(ROOT / "beacon_memory").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                yield node.value


def test_the_messages_on_the_page_of_troubleshooting_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [line.strip("`> ") for line in page.splitlines() if line.startswith("> ")]
    assert len(quoted) > 40
    known = [*messages()]
    for fragment in quoted:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in fragment.split("…")))
        assert any(map(pattern.search, known)), f"no error says {fragment!r}"


def test_the_changelog_names_the_format_of_files_and_every_step_of_the_catalog() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "beacon_memory").rglob("*.py"))
    page = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (now,) = re.findall(r"^FORMAT_VERSION = (\d+)", code, re.MULTILINE)
    assert f"| K/V file | {now} | {now} |" in page
    catalog = ROOT / "beacon_memory" / "storage" / "catalog"
    steps = [
        step
        for file in (catalog / "migrations.py", catalog / "postgres" / "migrations.py")
        for step in sorted(re.findall(r"^def (m\d{3}_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))
    ]
    assert re.findall(r"^\| `(m\d{3}_\w+)`", page, re.MULTILINE) == steps != []


def site() -> Any:
    """What turns pages and docstrings into those of the site."""
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_keeps_the_words_of_links_that_lead_out_of_it() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="results/README.md"))
    text = "[a](../store.md#quota) [b](../../README.md) ![c](ppl.png) [d](https://example.org) [e](../../x.py#L1)"
    assert site().on_page_markdown(text, page=page) == (
        "[a](../store.md#quota) b ![c](ppl.png) [d](https://example.org) e"
    )


def test_the_site_shows_names_with_their_meanings_as_a_list() -> None:
    docstring = """Do it.

ratio: how strongly; or a list with
one for each. seconds, bytes: what it took, for
one: an item. Raises InputError
if it cannot be done.

Note: all the same."""
    assert (
        site().with_lists(docstring, {"ratio", "seconds", "bytes"})
        == """Do it.

* `ratio`: how strongly; or a list with one for each.
* `seconds`, `bytes`: what it took, for one: an item.

Raises InputError if it cannot be done.

Note: all the same."""
    )


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
def test_python_on_the_first_page_of_the_site_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "index.md", "exec"), {})  # noqa: S102  # our own document
    assert "3 May 2031" in capsys.readouterr().out


@pytest.mark.slow
def test_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102  # our own document
    assert [row.id for row in names["memory"].list()] == ["contracts/mill", "owls", "well"]  # type: ignore[attr-defined]
