"""What is written beside the code is plain, and no class or module takes everything in."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

SOURCES = sorted(path for folder in ("beacon_memory", "integrations") for path in (ROOT / folder).rglob("*.py"))
# A docstring says what a thing does or is: it does not begin with a question, or with a place to look it up at.
EMPTY_OPENINGS = ("what", "see")
NAMES_OF_ANYTHING = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "misc"}
MOST_PUBLIC = 20
FRAMEWORK = {"forward"}  # torch's spelling of `__call__`
# Classes that may have more public methods and properties, and why.
LARGE_CLASSES = {
    "BeaconMemory": "the facade: one method for each thing that a user does",
    "MemoryStore": "documents as files and rows: one method for each thing that is done with them",
    "BeaconModel": "the stock model and all that is read with it: half are its properties",
}

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())


def documented(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The name and the docstring of a module and of all classes and functions in it that have one."""
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (docstring := ast.get_docstring(node)):
            yield getattr(node, "name", "the module"), docstring


def public_methods(node: ast.ClassDef) -> set[str]:
    """Public methods and properties that a class adds; a property and its setter count once."""
    functions = (part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef))
    return {function.name for function in functions if not function.name.startswith("_")} - FRAMEWORK


def classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@every_source
def test_docstrings_begin_with_what_they_describe(path: Path) -> None:
    found = [
        f"{name}: {docstring.splitlines()[0]}"
        for name, docstring in documented(parsed(path))
        if docstring.split()[0].lower().rstrip(".,:;") in EMPTY_OPENINGS
    ]
    assert not found


@every_source
def test_classes_have_few_public_methods(path: Path) -> None:
    counts = {node.name: len(public_methods(node)) for node in classes(path)}
    assert {name: count for name, count in counts.items() if count > MOST_PUBLIC and name not in LARGE_CLASSES} == {}


def test_every_class_that_may_be_large_is_there() -> None:
    assert set(LARGE_CLASSES) <= {node.name for path in SOURCES for node in classes(path)}


@every_source
def test_modules_are_named_for_what_is_in_them(path: Path) -> None:
    named = [path.stem, *path.relative_to(ROOT).parent.parts]
    assert not NAMES_OF_ANYTHING & set(named)


def test_questions_and_large_classes_are_found() -> None:
    methods = "\n".join(f"    def m{number}(self): ..." for number in range(MOST_PUBLIC + 1))
    tree = ast.parse(f'"""See there."""\nclass A:\n    """What it is."""\n    def _m(self): ...\n{methods}\n')
    assert [docstring.split()[0] for _, docstring in documented(tree)] == ["See", "What"]
    (large,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    assert len(public_methods(large)) == MOST_PUBLIC + 1
