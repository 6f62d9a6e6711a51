"""Speed of a store whose catalog is a database: the figures of `beacon-memory bench store --url URL`.

The documents are those of `bench.store`. Their rows are copied in at once, and the words' indexes made afterwards.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from beacon_memory.documents import content_hash
from beacon_memory.errors import InputError
from beacon_memory.storage.catalog.postgres.catalog import PostgresCatalog
from beacon_memory.storage.catalog.rows import COLUMNS, DocumentRow, properties_of, to_record
from beacon_memory.storage.store import MemoryStore

from .measuring import Figure
from .store import ROW_MB, document, looking_up, made_up, picking, putting, questions, texts

__all__ = ["run"]

_BATCH = 1000  # rows to a transaction, each of which counts them in a row of its own
_CROWD, _CROWD_SECONDS = 16, 20  # writers, and as many readers
_READ = 100  # rows that readers read
_INDEXES = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = ? AND tablename = 'words'"


def run(url: str, rows: int) -> Iterator[Figure]:
    """Measure a store in a database, whose files lie in a temporary folder; it has to be empty, and is not afterwards.

    Yields figures in turn. Raises InputError if there is a document in it.
    """
    with tempfile.TemporaryDirectory(prefix="beacon-memory-") as folder:
        cache, files = Path(folder) / "cache", (Path(folder) / "files").as_uri()
        with MemoryStore(url, cache=cache) as store:
            if count := store.totals().documents:
                raise InputError(f"{url} has {count} documents; a benchmark needs an empty database of its own")
        with MemoryStore(url, files=files, cache=cache) as store:
            _fill(store, rows)
            yield from looking_up(store)
            yield picking(store)
            yield putting(store)
            ids = [row.id for row in store.list(limit=_READ)]
        yield from _crowded(url, cache, ids)


def _fill(store: MemoryStore, rows: int) -> None:
    """Copy the rows of made-up documents into an empty catalog; they have no files."""
    catalog = cast("PostgresCatalog", store.parts.catalog(create=True))
    connections = catalog.connections
    with connections.transaction() as db:
        indexes = db.execute(_INDEXES, [connections.schema]).fetchall()
        for name, _ in indexes:
            db.execute(f"DROP INDEX {name}")
    for batch in made_up(store, rows, _BATCH):
        with connections.transaction() as db:
            db.copy(f"documents ({', '.join(COLUMNS)})", (_values(row) for row, _ in batch))
            labels = ((row.id, properties_of(row.metadata, row.tags)) for row, _ in batch)
            db.copy("labels (name, value, document)", ((*one, id) for id, some in labels for one in some))
            catalog.texts.add({row.id: text for row, text in batch})
    with connections.transaction() as db:
        for _, definition in indexes:
            db.execute(definition)
        db.execute("ANALYZE")


def _values(row: DocumentRow) -> list[object]:
    record = to_record(row)
    return [record[column] for column in COLUMNS]


def _crowded(url: str, cache: Path, ids: Sequence[str]) -> Iterator[Figure]:
    """Measure writers and readers at the same time, each with connections of its own."""
    header, kv = document("any", "", ROW_MB)
    asked, written = list(itertools.islice(questions(), _CROWD)), list(texts(_CROWD))
    until = time.perf_counter() + _CROWD_SECONDS

    def repeated(work: Callable[[MemoryStore, int], object]) -> int:
        with MemoryStore(url, cache=cache) as store:
            for number in itertools.count():
                if time.perf_counter() > until:
                    return number
                work(store, number)
        raise AssertionError("itertools.count does not end")

    def write(writer: int, store: MemoryStore, number: int) -> None:
        id, text = f"writer-{writer}/{number}", written[writer]
        store.put(replace(header, id=id, content_hash=content_hash(text)), kv, text)

    def read(reader: int, store: MemoryStore, number: int) -> None:
        store.row(ids[number % len(ids)])
        store.search(asked[reader])

    with ThreadPoolExecutor(2 * _CROWD) as threads:
        writers = [threads.submit(repeated, partial(write, number)) for number in range(_CROWD)]
        readers = [threads.submit(repeated, partial(read, number)) for number in range(_CROWD)]
        puts, reads = (sum(one.result() for one in many) for many in (writers, readers))
    beside = f"{_CROWD} writers of {ROW_MB} MB and {_CROWD} readers for {_CROWD_SECONDS} s"
    yield Figure("puts a second, many at once", puts / _CROWD_SECONDS, "-", beside)
    yield Figure("rows and searches a second, many at once", reads / _CROWD_SECONDS, "-", beside)
