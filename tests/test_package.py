"""The front of the package: public names, errors, and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import beacon_memory
from beacon_memory import errors

PUBLIC = {
    "Added",
    "Answer",
    "BeaconCompressor",
    "BeaconConfig",
    "BeaconKV",
    "BeaconMemory",
    "BeaconModel",
    "BeaconSequence",
    "CompressionMethod",
    "Document",
    "Evidence",
    "ExplainedPassage",
    "ExplainedWord",
    "Explanation",
    "FilesBackend",
    "Label",
    "LoadedDocument",
    "MemoryKV",
    "MemoryStore",
    "Passage",
    "Pick",
    "Picker",
    "Precision",
    "Progress",
    "Query",
    "Question",
    "ReadWindow",
    "ScoredMethod",
    "Session",
    "SourcePassage",
    "ToolCall",
    "UnreadCall",
    "Usage",
    "Work",
    "__version__",
}


def test_public_names_are_exactly_these() -> None:
    assert set(beacon_memory.__all__) == PUBLIC | set(errors.__all__)
    for name in beacon_memory.__all__:
        assert getattr(beacon_memory, name) is not None


def test_every_error_has_one_base_class_and_is_drawn_in_the_tree() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(errors.__all__)
    for name in defined:
        assert issubclass(getattr(errors, name), errors.BeaconMemoryError)
        assert name in (errors.__doc__ or "")


def test_importing_the_package_imports_no_torch() -> None:
    script = "import sys, beacon_memory; sys.exit(bool({'torch', 'transformers', 'sqlite3'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        beacon_memory.nothing_of_the_kind  # noqa: B018
