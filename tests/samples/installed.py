"""Distributions that tests install, as pip would, without a network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, code: str, **pickers: str) -> None:
    """Put a distribution of one module, with entry points for pickers, into a folder that Python looks in."""
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    points = [f"{name} = {value}" for name, value in pickers.items()]
    (info / "entry_points.txt").write_text("\n".join(["[beacon_memory.pickers]", *points]), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, module, raising=False)
