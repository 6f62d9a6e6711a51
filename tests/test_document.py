from __future__ import annotations

from beacon_memory.document import check_metadata


def test_metadata_are_copied() -> None:
    given = {"tags": ["a"], "pair": (1, 2), "odd": "\ud800"}
    copy = check_metadata(given)
    given["tags"].append("b")  # type: ignore[attr-defined]  # a list
    assert copy == {"tags": ["a"], "pair": [1, 2], "odd": "\ud800"}
