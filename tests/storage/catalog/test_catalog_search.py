from __future__ import annotations

from collections.abc import Iterator

import pytest
from catalog_samples import add
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_memory.errors import InputError
from beacon_memory.storage.catalog.catalog import Catalog

FACTS = {
    "bees": "Honey bees communicate the direction of nectar by a waggle dance on the comb.",
    "volcano": "Mount Tambora erupted in 1815, and the following year had no summer in Europe.",
    "bridge": "The Golden Gate Bridge in San Francisco was opened to traffic in May 1937.",
    "bread": "Sourdough bread rises slowly because wild yeast works beside lactic acid bacteria.",
    "cat": "The cat of the bridge keeper sleeps all day, and what it does at night nobody knows.",
}


@pytest.fixture
def catalog() -> Iterator[Catalog]:
    catalog = Catalog(":memory:")
    yield catalog
    catalog.close()


def test_the_right_document_is_found_first(catalog: Catalog) -> None:
    for id, text in FACTS.items():
        add(catalog, id, text)
    for query, best in {
        "How do bees tell each other where the nectar is?": "bees",
        "When did Tambora erupt?": "volcano",
        "In what year was the Golden Gate Bridge opened?": "bridge",
        "Why does sourdough rise so slowly?": "bread",
        "what is the cat doing at night": "cat",
        "SAN FRANCISCO": "bridge",
        "communicating": "bees",
    }.items():
        hits = catalog.texts.search(query)
        assert hits[0].document == best, query
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert len(catalog.texts.search("bridge summer bees bread", limit=2)) == 2


def test_a_hit_says_where_in_the_text_it_lies(catalog: Catalog) -> None:
    text = "\n\n".join(
        [*["Nothing of interest happens in this paragraph. " * 15] * 6, "A zebra crosses.", "The end. " * 90]
    )
    add(catalog, "doc", text)
    (hit,) = catalog.texts.search("Is there a zebra?")
    assert "zebra" in hit.text == text[hit.start : hit.stop]
    assert hit.ordinal > 0


def test_question_words_count_when_there_are_no_others(catalog: Catalog) -> None:
    add(catalog, "doc", "to be or not to be")
    add(catalog, "other", "apples and pears")
    assert [hit.document for hit in catalog.texts.search("Where to be?")] == ["doc"]


@pytest.mark.parametrize("query", ["", "  ", "?!", "👍🏽", "\0", '""', "*", "\ud800", "- + ^ ( ) { } : ~"])
def test_a_query_without_words_finds_nothing(catalog: Catalog, query: str) -> None:
    add(catalog, "doc", "a text 👍🏽 with ? ! marks")
    assert catalog.texts.search(query) == []


@pytest.mark.parametrize(
    "query",
    [
        '"apple',
        "apple*",
        "text:apple",
        "NEAR(apple, 2)",
        "apple AND",
        "NOT apple",
        "(apple",
        "^apple",
        "apple\0\0",
        "don't apple",
        "-apple",
        "👍 apple",
        "{text}: apple",
        'a"b"c apple',
        "apple -- ;DROP TABLE documents",
        "ápple",
        "APPLE\ud800",
    ],
)
def test_quotes_and_operators_in_a_query_are_only_text(catalog: Catalog, query: str) -> None:
    add(catalog, "doc", "an apple a day")
    assert [hit.document for hit in catalog.texts.search(query)] == ["doc"]


@given(query=st.text())
@settings(max_examples=150, deadline=None)
def test_any_text_is_a_safe_query(query: str) -> None:
    catalog = _shared()
    for hit in catalog.texts.search(query):
        assert hit.document in FACTS


def _shared(catalogs: list[Catalog] = []) -> Catalog:  # noqa: B006 -- made once for all examples
    if not catalogs:
        catalogs.append(Catalog(":memory:"))
        for id, text in FACTS.items():
            add(catalogs[0], id, text)
    return catalogs[0]


def test_a_whole_book_is_a_safe_query(catalog: Catalog) -> None:
    add(catalog, "doc", "an apple a day")
    assert catalog.texts.search(" ".join(f"word{n}" for n in range(5_000)) + " apple")


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
def test_a_limit_that_is_none_is_refused(catalog: Catalog, limit: int) -> None:
    with pytest.raises(InputError, match="limit must be an integer of at least 1"):
        catalog.texts.search("apple", limit)
    with pytest.raises(InputError, match="must be a str"):
        catalog.texts.search(None)  # type: ignore[arg-type]  # wrong on purpose
