from __future__ import annotations

import random

import pytest
from catalog_samples import add
from postgres_server import PostgresServer

from beacon_memory.storage.catalog.postgres.catalog import PostgresCatalog
from beacon_memory.storage.catalog.postgres.connections import PostgresConnections
from beacon_memory.storage.catalog.sqlite import SQLiteCatalog

WORDS = "mill mills rent miller daughter larch roof owls hayloft Zoë naïve 磨坊 租金 2½ Straße paying paid".split()  # noqa: SIM905


def test_passages_are_found_and_scored_as_in_sqlite(postgres: PostgresServer) -> None:
    catalogs = SQLiteCatalog(":memory:"), PostgresCatalog(PostgresConnections(postgres.new_database(), "beacon_memory"))
    chance = random.Random(7)
    for number in range(60):
        text = " ".join(chance.choices(WORDS, k=chance.randrange(5, 120)))
        for catalog in catalogs:
            add(catalog, f"doc{number}", text)
    for query in ("the mill", "Who pays the rent?", "larch owls 2½", "坊", "租金 daughter", "naive STRASSE", "zebra"):
        ours, theirs = (
            [((hit.document, hit.ordinal), hit.score) for hit in catalog.texts.search(query, 40)]
            for catalog in catalogs
        )
        assert [place for place, _ in theirs] == [place for place, _ in ours]
        assert [score for _, score in theirs] == pytest.approx([score for _, score in ours])
        documents = [f"doc{number}" for number in range(0, 60, 7)]
        found = [catalog.texts.places_of_words(query, documents) for catalog in catalogs]
        assert {word: sorted(places) for word, places in found[0].items()} == {
            word: sorted(places) for word, places in found[1].items()
        }
    for catalog in catalogs:
        catalog.close()
