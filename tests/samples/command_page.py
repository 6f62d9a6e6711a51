"""The section of docs/command-line.md on each command."""

from __future__ import annotations

import re

from repository import ROOT

_PAGE = ROOT / "docs" / "command-line.md"


def sections() -> dict[str, str]:
    """The text of the page under each heading, that before the first one under ""."""
    opening, *parts = re.split(r"(?m)^## (.+)\n", _PAGE.read_text(encoding="utf-8"))
    return {"": opening, **dict(zip(parts[::2], parts[1::2], strict=True))}


def json_fields(command: str) -> list[str]:
    """The fields of the JSON that a command prints, by the page."""
    (said,) = re.findall(r"(?ms)^JSON: (.*?)(?:\n\n|\Z)", sections()[command])
    said = re.split("[.;]", re.sub(r"\([^)]*\)+", "", said))[0]
    if other := re.fullmatch(r"as of `(\w+)`", said):
        return json_fields(other[1])
    return re.findall(r"`(\w+)`", said)
