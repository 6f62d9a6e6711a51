from __future__ import annotations

import pytest
from catalog_samples import LONG_AGO, add, row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beacon_memory.errors import InputError
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.check import find_flaws

FACTS = {
    "bees": "Honey bees communicate the direction of nectar by a waggle dance on the comb.",
    "volcano": "Mount Tambora erupted in 1815, and the following year had no summer in Europe.",
    "bridge": "The Golden Gate Bridge in San Francisco was opened to traffic in May 1937.",
    "bread": "Sourdough bread rises slowly because wild yeast works beside lactic acid bacteria.",
    "cat": "The cat of the bridge keeper sleeps all day, and what it does at night nobody knows.",
}


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


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("What happens in May?", {"bridge"}),
        ("what happens in may", {"bridge"}),
        ("What do bees do in May?", {"bees", "bridge"}),
        ("what may bees do", {"bees"}),
        ("When does IT sleep?", {"cat"}),
        ("WHAT DO BEES DO IN THE COMB?", {"bees"}),
        ("Where is the key to the cellar?", set()),
    ],
)
def test_question_words_that_are_names_find_documents(catalog: Catalog, query: str, found: set[str]) -> None:
    for id, text in FACTS.items():
        add(catalog, id, text)
    assert {hit.document for hit in catalog.texts.search(query)} == found


@pytest.fixture(params=["few", "many"])
def bounded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search as among few passages, where all are scored, and as among very many."""
    if request.param == "many":
        for name, bound in {"_SCORED": 30, "_COUNTED": 200, "_TOGETHER": 10}.items():
            monkeypatch.setattr(f"beacon_memory.storage.catalog.full_text.{name}", bound)


@pytest.mark.usefixtures("bounded")
def test_conversations_leave_their_places_to_documents(catalog: Catalog) -> None:
    add(catalog, "manual", "The manual says how the pump is primed: " + "turn the key and wait. " * 30)
    for n in range(100):
        add(catalog, f"talk {n}", f"The pump, the primed pump! {n}", tags=("session", "talk"))
    assert "manual" not in {hit.document for hit in catalog.texts.search("pump", 50)}
    for query in ("pump", "How is the pump primed?", "pump talk", "pump keys"):
        assert {hit.document for hit in catalog.texts.search(query, 50, conversations=False)} == {"manual"}
    add(catalog, "talk 1", "The pump, the pump! 1")
    catalog.documents.update(row("talk 2", "The pump, the primed pump! 2"))
    catalog.documents.rename("talk 3", row("talk three", "The pump, the primed pump! 3", tags=("session",)))
    hits = catalog.texts.search("pump", 50, conversations=False)
    assert {hit.document for hit in hits} == {"manual", "talk 1", "talk 2"}
    catalog.documents.update(row("manual", catalog.documents.text("manual"), tags=("session",)))
    assert catalog.texts.search("manual", conversations=False) == []
    assert find_flaws(catalog) == []


@pytest.mark.usefixtures("bounded")
def test_only_passages_of_the_documents_that_are_asked_for_are_found(catalog: Catalog) -> None:
    """Though others match better, and there are more of them than are ever scored."""
    add(catalog, "manual", "The manual says how it is primed. " * 20 + "Wait for the pump. " + "Turn the key. " * 30)
    add(catalog, "leaflet", "A leaflet on pumps.")
    add(catalog, "talk", "The pump that was talked of.", tags=("session",))
    add(catalog, "gone", "The pump of last year.", expires_at=LONG_AGO)
    for n in range(100):
        add(catalog, f"other {n}", f"The pump, the primed pump! {n}")
    for query in ("pump", "How is the pump primed?"):
        hits = catalog.texts.search(query, 50, documents=["manual"])
        assert {hit.document for hit in hits} == {"manual"}
        assert any("Wait for the pump" in hit.text for hit in hits)
        assert all(catalog.documents.text("manual")[hit.start : hit.stop] == hit.text for hit in hits)
        hits = catalog.texts.search(query, 50, documents=("talk", "leaflet", "gone", "unknown"))
        assert {hit.document for hit in hits} == {"talk", "leaflet"}
        assert catalog.texts.search(query, 50, documents=[]) == []
    assert len(catalog.texts.search("pump", 200)) > 50


@pytest.mark.usefixtures("bounded")
def test_long_text_leaves_places_to_others(catalog: Catalog) -> None:
    paragraph = "The pump runs and the pump stops, says page {}. " + "It is a long page. " * 40
    add(catalog, "other", "Wells, pumps and wells. " + "There is little else. " * 40)
    add(catalog, "long", "\n\n".join(paragraph.format(n) for n in range(25)))
    add(catalog, "far", "The zebra. " * 1000)
    assert {hit.document for hit in catalog.texts.search("pump", 20)} == {"long"}
    hits = catalog.texts.search("pump", 20, per_text=15)
    assert [hit.document for hit in hits] == ["long"] * 15 + ["other"]
    assert hits[:15] == catalog.texts.search("pump", 15)
    assert [hit.document for hit in catalog.texts.search("pump zebra", 20, per_text=2)].count("other") == 1


@pytest.mark.usefixtures("bounded")
def test_one_text_counts_once_under_the_row_that_was_written_last(catalog: Catalog) -> None:
    text = "The pump stands behind the mill. " * 90
    later = {"a": "2030-01-02", "b": "2030-01-03", "c": "2030-01-01", "expired": "2030-01-09", "talk": "2030-01-08"}
    for id, day in later.items():
        tags, expires_at = ("session",) * (id == "talk"), LONG_AGO if id == "expired" else None
        add(catalog, id, text, updated_at=f"{day}T00:00:00.000+00:00", tags=tags, expires_at=expires_at)
    for n in range(40):
        add(catalog, f"other {n}", f"Another pump, the {n}th.")
    assert {hit.document for hit in catalog.texts.search("mill", 50)} == {"a", "b", "c", "talk"}
    for query in ("mill", "pump mill"):
        hits = catalog.texts.search(query, 100, per_text=100, conversations=False)
        assert {hit.document for hit in hits if not hit.document.startswith("other")} == {"b"}
    assert {hit.document for hit in catalog.texts.search("mill", 50, per_text=1)} == {"talk"}


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
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_safe_query(catalog: Catalog, query: str) -> None:
    if "cat" not in [row.id for row in catalog.documents.list()]:  # once for all examples
        for id, text in FACTS.items():
            add(catalog, id, text)
    for hit in catalog.texts.search(query):
        assert hit.document in FACTS


def test_a_whole_book_is_a_safe_query(catalog: Catalog) -> None:
    add(catalog, "doc", "an apple a day")
    assert catalog.texts.search(" ".join(f"word{n}" for n in range(5_000)) + " apple")


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
def test_a_limit_that_is_none_is_refused(catalog: Catalog, limit: int) -> None:
    with pytest.raises(InputError, match="limit must be an integer of at least 1"):
        catalog.texts.search("apple", limit)
    with pytest.raises(InputError, match="per_text must be an integer of at least 1"):
        catalog.texts.search("apple", per_text=limit)
    with pytest.raises(InputError, match="must be a str"):
        catalog.texts.search(None)  # type: ignore[arg-type]  # wrong on purpose
