from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from catalog_samples import LATER, row
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_memory.documents import Label
from beacon_memory.errors import CorruptFileError
from beacon_memory.storage.catalog.rows import COLUMNS, DocumentRow, checksum, from_record, properties_of, to_record

_PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_NESTED = st.recursive(_PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
_ANYTHING = st.text(alphabet=st.characters(exclude_categories=()))  # surrogates too


def labelled() -> DocumentRow:
    return row(
        "doc",
        "text",
        metadata={"a": [1, None]},
        tags=("x", "y"),
        pinned=True,
        expires_at=LATER,
        method={"score": "repeat"},
    )


@given(
    metadata=st.dictionaries(_ANYTHING, _NESTED, max_size=3),
    tags=st.sets(st.text(min_size=1), max_size=3),
    pinned=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_row_survives_as_a_record(metadata: dict[str, object], tags: set[str], pinned: bool) -> None:
    label = Label(metadata, tags, pinned)
    kept = row("doc", "text").labelled(label)
    record = to_record(kept)
    assert tuple(record) == COLUMNS
    assert all(isinstance(value, (str, int, type(None))) for value in record.values())
    assert from_record(record) == kept
    assert from_record(json.loads(json.dumps(record))) == kept
    assert from_record(record).label == label


@pytest.mark.parametrize("column", [name for name in COLUMNS if name != "used_at"])
def test_a_changed_column_breaks_the_seal(column: str) -> None:
    record = to_record(labelled())
    value = record[column]
    for other in (1 - value, f"{value}") if isinstance(value, int) else (value[:-1], f"{value} ", None, value.encode()):
        with pytest.raises(CorruptFileError, match="is damaged; `beacon-memory repair` makes it anew"):
            from_record(record | {column: other})


def test_values_that_changed_places_break_the_seal() -> None:
    record = to_record(labelled())
    with pytest.raises(CorruptFileError, match="'doc' is damaged"):
        from_record(record | {"created_at": record["updated_at"], "updated_at": record["expires_at"]})


def test_use_is_noted_without_a_new_seal() -> None:
    record = to_record(labelled())
    assert from_record(record | {"used_at": 99}) == replace(labelled(), used_at=99, **_times(record))
    assert checksum(record) == record["checksum"] == checksum(record | {"used_at": 99})


def _times(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("created_at", "updated_at")}


def test_another_label_leaves_all_else() -> None:
    kept = labelled()
    changed = kept.labelled(Label({"b": 2}, ["z"]))
    assert (changed.metadata, changed.tags, changed.pinned, changed.expires_at) == ({"b": 2}, ("z",), False, None)
    assert changed.labelled(kept.label) == kept


def test_a_document_is_found_by_tags_and_plain_values_at_the_top() -> None:
    metadata = {"a": 1, "b": "1", "c": None, "d": True, "e": 1.5, "f": {"a": 1}, "g": [1], "tag": "x"}
    assert dict(properties_of({"a": 1}, ())) != dict(properties_of({"a": "1"}, ()))
    names = [name for name, _ in properties_of(metadata, ("x", "y"))]
    assert names[:2] == ["tag", "tag"]
    assert len(set(names[2:])) == 6
    assert "tag" not in names[2:]


@given(st.dictionaries(_ANYTHING, _ANYTHING))
@settings(max_examples=60, deadline=None)
def test_what_a_document_is_found_by_has_a_utf8_form(metadata: dict[str, str]) -> None:
    found = [pair for name, value in properties_of(metadata, ()) for pair in (name, value)]
    assert "".join(found).isascii()
    assert len({*properties_of(metadata, ())}) == len(metadata)
