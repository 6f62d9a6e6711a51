"""The benchmark of the store measures what it says, and what it measures does not grow with the store."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from catalog_samples import LONG_AGO
from postgres_server import PostgresServer, postgres  # noqa: F401  # a fixture
from typer.testing import CliRunner

from beacon_memory.bench import database as bench_database
from beacon_memory.bench import measuring
from beacon_memory.bench import store as bench_store
from beacon_memory.bench.store import document, fill, questions, samples, vocabulary
from beacon_memory.cli.main import app
from beacon_memory.documents import Text, content_hash, utc_now
from beacon_memory.storage.catalog import full_text
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.check import find_flaws
from beacon_memory.storage.catalog.passages import split_passages
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.catalog.words import phrase, words
from beacon_memory.storage.files import checked_json, durable, kv_file, local
from beacon_memory.storage.store import MemoryStore

ROWS = 2000
OWN = {
    "documents": ["file", "root", "created_at", "updated_at", "used_at", "checksum"],
    "properties": [],
}  # differ from put to put


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryStore]:
    """A store of some documents, for reading only."""
    with MemoryStore(tmp_path_factory.mktemp("filled")) as store:
        fill(store, ROWS)
        yield store


def contents(store: MemoryStore) -> dict[str, list[tuple[Any, ...]]]:
    """All that a catalog holds, the words of the full-text index too, but for names of files and times."""
    db = sqlite3.connect(store.folder / "catalog.sqlite3")
    db.execute("CREATE VIRTUAL TABLE temp.words USING fts5vocab(main, passages_fts, instance)")
    found = {}
    for table in ("documents", "labels", "passages", "versions", "unsettled", "properties", "words"):
        rows = db.execute(f"SELECT * FROM {table}")
        kept = [n for n, column in enumerate(rows.description) if column[0] not in OWN.get(table, [])]
        found[table] = sorted(tuple(row[n] for n in kept) for row in rows if row[0] not in ("identity", "last"))
    db.close()
    return found


def test_a_filled_store_is_what_as_many_puts_make_it(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "filled") as filled, MemoryStore(tmp_path / "put") as put:
        fill(filled, 30)
        for one in samples(30):
            header, kv = document(one.id, one.text, bench_store.ROW_MB)
            put.put(header, kv, one.text, one.label)
        assert find_flaws(filled.parts.catalog()) == []
        assert contents(filled) == contents(put)


def test_samples_are_like_texts() -> None:
    words: Counter[str] = Counter()
    lengths, tags = [], Counter[str]()
    for one in samples(ROWS):
        assert 1 <= len(split_passages(one.text)) <= 5
        words.update(one.text.lower().replace(".", "").split())
        lengths.append(len(one.text))
        tags.update(one.label.tags)
    assert 550 < sum(lengths) / ROWS < 650
    assert len(set(lengths)) > 300
    counts = sorted(words.values(), reverse=True)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.3)  # Zipf's law
    assert counts[9] / counts[99] == pytest.approx(10, rel=0.3)
    assert tags["one-in-10"] == pytest.approx(ROWS / 10, rel=0.3)


FILTERS: list[dict[str, Any]] = [
    {},
    {"after": "folder-5"},
    {"prefix": "folder-77"},
    {"prefix": "folder-77", "after": "folder-772"},
    {"prefix": "\U0010ffff"},
    {"tags": ["one-in-2"]},
    {"tags": ["one-in-2", "one-in-10"]},
    {"tags": ["one-in-10"], "prefix": "folder-77"},
    {"metadata": {"year": 1987}},
    {"metadata": {"language": "en"}, "after": "folder-5"},
    {"metadata": {"language": "en", "year": 1987}, "tags": ["one-in-2"], "prefix": "f", "after": "folder-5"},
]
Look = Callable[[Catalog, DocumentRow], object]
LOOKUPS: dict[str, Look] = {
    **{
        f"list {filters}": lambda catalog, _, filters=filters: catalog.documents.list(limit=100, **filters)
        for filters in FILTERS
    },
    "get": lambda catalog, row: catalog.documents.get(row.id),
    "text": lambda catalog, row: catalog.documents.text(row.id),
    "files": lambda catalog, row: catalog.file_names.named(row.id),
    "totals": lambda catalog, _: (catalog.properties.count("documents"), catalog.properties.count("bytes")),
    "expired": lambda catalog, _: catalog.documents.expired(utc_now()),
    "least used": lambda catalog, _: catalog.documents.least_used(100),
    "put": lambda catalog, row: catalog.documents.put(replace(row, content_hash=content_hash("new")), Text("new")),
    "update": lambda catalog, row: catalog.documents.update(replace(row, tags=("new",))),
    "rename": lambda catalog, row: catalog.documents.rename(row.id, replace(row, id="new", file="new")),
    "delete": lambda catalog, row: catalog.documents.delete(row.id),
    "keep a version": lambda catalog, row: catalog.versions.keep(row),
    "version": lambda catalog, row: catalog.versions.get(row.id, row.fingerprint),
    "drop versions": lambda catalog, row: catalog.versions.drop(row.id),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_nothing_is_looked_up_by_scanning_or_sorting(filled: MemoryStore, name: str) -> None:
    catalog = filled.parts.catalog()
    (row,) = catalog.documents.list(limit=1)
    asked: list[tuple[str, Any]] = []
    plan = []
    with catalog.connections.use() as db, suppress(ZeroDivisionError), catalog.transaction():
        with db.tracer(lambda sql, values: asked.append((sql, values))):
            LOOKUPS[name](catalog, row)
        for sql, values in asked:
            if sql.lstrip().startswith(("SELECT", "UPDATE", "DELETE")):
                plan += [step for *_, step in db.execute(f"EXPLAIN QUERY PLAN {sql}", values or []).fetchall()]
        raise ZeroDivisionError  # so that nothing has changed
    assert any(step.startswith("SEARCH") for step in plan)
    assert not any(step.startswith("SCAN") or "TEMP B-TREE" in step for step in plan), plan


def exact(store: MemoryStore, query: str, count: int) -> dict[tuple[str, int], float]:
    """The BM25 scores of the best passages, straight from SQLite."""
    match = " OR ".join(phrase(word) for word in words(query) if word not in full_text._QUESTION_WORDS)
    with store.parts.catalog().connections.use() as db:
        found = db.execute(
            "SELECT document, ordinal, -rank FROM passages_fts JOIN passages ON passages.id = passages_fts.rowid "
            "WHERE passages_fts MATCH ? ORDER BY rank, passages.id LIMIT ?",
            [match, count],
        ).fetchall()
    return {(document, ordinal): score for document, ordinal, score in found}


def test_in_a_store_of_ordinary_size_all_passages_are_scored(filled: MemoryStore) -> None:
    for query in islice(questions(), 30):
        found = {(hit.document, hit.ordinal): hit.score for hit in filled.search(query)}
        assert list(found.items()) == list(exact(filled, query, 10).items())


@pytest.fixture
def large(filled: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """The bounds of full-text search are in proportion to it as they are to a store of a million."""
    monkeypatch.setattr(full_text, "_SCORED", ROWS // 100)
    monkeypatch.setattr(full_text, "_COUNTED", ROWS // 10)
    monkeypatch.setattr(full_text, "_TOGETHER", 10)
    return filled


def test_in_a_large_store_good_passages_are_found(large: MemoryStore) -> None:
    kept, best = [], 0
    for query in islice(questions(), 60):
        scores = exact(large, query, ROWS)
        wanted = list(scores)[:10]
        hits = large.search(query)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        found = [(hit.document, hit.ordinal) for hit in hits]
        assert len(set(found)) == 10
        assert all(hit.score < scores[hit.document, hit.ordinal] + 1e-9 for hit in hits)  # less by what is left out
        kept.append(sum(scores[one] for one in found) / sum(scores[one] for one in wanted))
        best += wanted[0] in found
    assert sum(kept) / len(kept) > 0.93
    assert best > 0.8 * len(kept)


@pytest.mark.parametrize("query", ["one rare", "two common", "all common", "misspelt", "unknown", "a book"])
def test_in_a_large_store_a_question_of_any_words_finds_as_many_as_asked(large: MemoryStore, query: str) -> None:
    words = vocabulary()
    rare, common, most = words[20_000:20_200], words[40:80], words[:20]
    rare = [word for word in rare if len(large.search(word, 2)) == 1]
    asked = {
        "one rare": rare[:1],
        "two common": common[:2],
        "all common": most,
        "misspelt": [rare[0], *common[:3]],
        "unknown": ["xyzzy", *common[:3]],
        "a book": words[:5000],
    }[query]
    hits = large.search(" ".join(asked), 7)
    assert len(hits) == (1 if query == "one rare" else 7)
    if query == "misspelt":
        assert any(rare[0] in hit.text.lower() for hit in hits)
    if query == "two common":
        assert all(word in hits[0].text.lower() for word in asked)


def test_in_a_large_store_expired_passages_do_not_take_the_place_of_others(large: MemoryStore) -> None:
    catalog = large.parts.catalog()
    query = next(questions())
    before = [hit.document for hit in large.search(query, 10)]
    with suppress(ZeroDivisionError), catalog.transaction():
        for id in before[:5]:
            row = catalog.documents.get(id)
            assert row is not None
            catalog.documents.update(replace(row, expires_at=LONG_AGO))
        after = [hit.document for hit in large.search(query, 10)]
        raise ZeroDivisionError  # so that nothing has changed
    assert after[:5] == before[5:]
    assert len(after) == 10
    assert not set(before[:5]) & set(after)


def test_names_of_a_new_file_and_its_label_are_synced_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []

    def noting(sync: Callable[[Path], None]) -> Callable[[Path], None]:
        return lambda path: (synced.append(path), sync(path))[1]

    with MemoryStore(tmp_path) as store:
        header, kv = document("doc", "text", 0.1)
        store.put(header, kv, "text")  # makes the folders
        monkeypatch.setattr(kv_file, "sync_file", noting(kv_file.sync_file))
        monkeypatch.setattr(checked_json, "sync_file", noting(checked_json.sync_file))
        for module in (durable, local):
            monkeypatch.setattr(module, "sync_folder", noting(module.sync_folder))
        row = store.put(header, kv, "text")
    assert [path.parent.name if path.name.startswith(".tmp") else path.name for path in synced] == [
        "kv",
        "kv",
        (tmp_path / row.file).parent.name,
        (tmp_path / row.file).parent.name,  # again when the old ones are removed
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark of a few seconds."""
    for name, value in {
        "_LOOKUPS": 3,
        "_PUTS": 2,
        "_TURNS": (1,),
        "_APPENDS": 2,
        "_OPENINGS": 2,
        "_LOADS": 2,
        "_PUT_MB": 0.1,
        "_LOAD_MB": (1,),
        "_PART_MB": 1,
    }.items():
        monkeypatch.setattr(bench_store, name, value)


@pytest.mark.usefixtures("small")
def test_figures_of_a_run_have_bounds_and_parts() -> None:
    figures = bench_store.run(200)
    assert [figure.name.partition(",")[0].partition(":")[0] for figure in figures] == [
        "get by id",
        *["list 100"] * 4,
        "pick 10 passages for a question",
        "put",
        "open",
        "append to a document of 1 turns",
        "load 1 MB",
        "read a quarter of the entries",
        "read all of one section in 16",
    ]
    assert all(figure.value > 0 for figure in figures if not figure.name.startswith("put"))
    assert "95% of them under" in measuring.table(figures)


@pytest.mark.usefixtures("small")
def test_the_command_measures_a_store_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = CliRunner().invoke(app, ["bench", "store", "--rows", "1000", "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures[0]["name"] == "get by id, ms"
    assert figures[0]["bound"] == "under 5"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_a_database_is_measured_once(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(bench_database, "_CROWD", 2)
    monkeypatch.setattr(bench_database, "_CROWD_SECONDS", 1)
    arguments = ["bench", "store", "--rows", "1000", "--json", "--url", postgres.new_database()]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    puts, reads = json.loads(result.stdout)[-2:]
    assert (puts["name"], reads["name"]) == ("puts a second, many at once", "rows and searches a second, many at once")
    assert puts["value"] > 0 < reads["value"]
    again = CliRunner().invoke(app, arguments)
    assert (again.exit_code, "a benchmark needs an empty database" in again.stderr) == (1, True)
