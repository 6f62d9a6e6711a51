from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from catalog_samples import LATER, LONG_AGO, add, clear
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beacon_memory.documents import Label
from beacon_memory.errors import InputError
from beacon_memory.storage.catalog.catalog import Catalog

_ANY = st.text(alphabet=st.characters(exclude_categories=()), max_size=2)  # surrogates too
IDS = st.text(alphabet="ab\0\U0010ffff\ud7ff\ue000é", min_size=1, max_size=4)
VALUES = st.sampled_from([None, True, False, 0, 1, 1.0, -0.5, "", "1", "true", "\0", "\ud800", 10**30])
METADATA = st.dictionaries(st.sampled_from(["a", "b", "tag", "\udfff", ""]), VALUES | st.lists(VALUES, max_size=1))
TAGS = st.sets(st.sampled_from(["a", "b", "metadata.a", "\0", "é"]), max_size=3)


@dataclass
class Filters:
    """What `list` is asked for."""

    prefix: str
    tags: set[str]
    metadata: dict[str, object]
    after: str
    limit: int | None

    def let_through(self, id: str, label: Label) -> bool:
        """What a filter is, said in Python."""
        return (
            id.startswith(self.prefix)
            and id > self.after
            and self.tags <= set(label.tags)
            and all(same_json(label.metadata.get(name, []), value) for name, value in self.metadata.items())
            and label.expires_at != LONG_AGO
        )


def same_json(one: object, other: object) -> bool:
    return json.dumps(one) == json.dumps(other)


FILTERS = st.builds(
    Filters,
    prefix=st.just("") | IDS,
    tags=st.just(set()) | TAGS,
    metadata=st.just({}) | st.dictionaries(st.sampled_from(["a", "b", "tag", "\udfff", ""]), VALUES, max_size=2),
    after=st.just("") | IDS,
    limit=st.none() | st.integers(1, 3),
)
LABELS = st.builds(Label, METADATA, TAGS, st.booleans(), st.sampled_from([None, LONG_AGO, LATER]))


@given(documents=st.dictionaries(IDS, LABELS, max_size=8), asked=st.lists(FILTERS, min_size=1, max_size=8))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_filters_let_through_what_they_say(catalog: Catalog, documents: dict[str, Label], asked: list[Filters]) -> None:
    clear(catalog)
    for id, label in documents.items():
        add(
            catalog, id, "text", **{name: getattr(label, name) for name in ("metadata", "tags", "pinned", "expires_at")}
        )
    for filters in asked:
        expected = sorted(id for id, label in documents.items() if filters.let_through(id, label))
        assert [row.id for row in catalog.documents.list(**vars(filters))] == expected[: filters.limit]


@pytest.mark.parametrize("filters", [{}, {"tags": ["x"]}, {"metadata": {"a": 1}}, {"prefix": "doc"}])
def test_pages_together_are_the_whole_list(catalog: Catalog, filters: dict[str, Any]) -> None:
    for n in range(23):
        add(catalog, f"doc{n}", "text", metadata={"a": n % 2}, tags=("x",) if n % 3 else ())
    whole = catalog.documents.list(**filters)
    pages, after = [], ""
    while page := catalog.documents.list(**filters, after=after, limit=4):
        pages.append(page)
        after = page[-1].id
    assert [row for page in pages for row in page] == whole
    assert {len(page) for page in pages[:-1]} == {4}


def test_a_prefix_means_characters_and_no_pattern(catalog: Catalog) -> None:
    for id in ("a%b", "a_b", "axb", "A%b", "a\0b", "a\U0010ffffb", "a"):
        add(catalog, id, "text")
    for prefix, found in {
        "a%": ["a%b"],
        "a_": ["a_b"],
        "a\0": ["a\0b"],
        "a\U0010ffff": ["a\U0010ffffb"],
        "A": ["A%b"],
        "b": [],
    }.items():
        assert [row.id for row in catalog.documents.list(prefix=prefix)] == found
    assert len(catalog.documents.list(prefix="a")) == 6


def test_a_value_must_be_the_same_in_kind(catalog: Catalog) -> None:
    add(catalog, "number", "text", metadata={"a": 1})
    add(catalog, "text", "text", metadata={"a": "1"})
    add(catalog, "truth", "text", metadata={"a": True})
    add(catalog, "nothing", "text", metadata={"a": None})
    add(catalog, "missing", "text", metadata={"b": None})
    add(catalog, "nested", "text", metadata={"a": {"a": 1}, "b": [1]})
    for value, id in ((1, "number"), ("1", "text"), (True, "truth"), (None, "nothing")):
        assert [row.id for row in catalog.documents.list(metadata={"a": value})] == [id]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"limit": 0}, "limit must be an integer of at least 1, or None for all, got 0"),
        ({"limit": -1}, "got -1"),
        ({"limit": True}, "got True"),
        ({"limit": "3"}, "got '3'"),
        ({"prefix": "\ud800"}, "surrogate"),
        ({"prefix": 3}, "must be a str"),
        ({"after": "a\udfff"}, "surrogate"),
        ({"after": b"a"}, "must be a str"),
        ({"tags": "abc"}, "tags must be several texts, got the one text 'abc'"),
        ({"tags": [""]}, "a tag must be a text that is not empty"),
        ({"tags": 3}, "tags must be several texts, got 3"),
        ({"metadata": {"a": [1]}}, r"metadata a=\[1\]: only a text, number, true, false or null can be looked for"),
        ({"metadata": {"a": {}}}, "can be looked for"),
        ({"metadata": {"a": float("nan")}}, "is nan"),
        ({"metadata": {3: 3}}, "the key 3"),
        ({"metadata": [("a", 1)]}, "metadata"),
    ],
)
def test_what_nothing_could_be_found_by_is_refused(catalog: Catalog, filters: dict[str, Any], message: str) -> None:
    add(catalog, "doc", "text")
    with pytest.raises(InputError, match=message):
        catalog.documents.list(**filters)


def test_a_filter_that_there_is_not_is_refused(catalog: Catalog) -> None:
    with pytest.raises(TypeError, match="colour"):
        catalog.documents.list(colour="red")  # type: ignore[call-arg]  # wrong on purpose
