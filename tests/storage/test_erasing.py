"""Of a document that is erased nothing is found any more, whatever had become of it before."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from store_samples import put, put_version
from traces import ID, LABELS, TRACES, put_secret, traces
from upkeep_samples import everything, unfinished_put

from beacon_memory.errors import DocumentNotFoundError, StoreError
from beacon_memory.storage.catalog import connections
from beacon_memory.storage.catalog import sqlite as catalog_module
from beacon_memory.storage.erasing import erase
from beacon_memory.storage.files.names import new_temp
from beacon_memory.storage.repair import verify
from beacon_memory.storage.store import MemoryStore


@pytest.fixture
def store(folder: Path) -> MemoryStore:
    """A store with documents before and after the secret one."""
    store = MemoryStore(folder / "store")
    for number in range(8):
        put(store, f"kept {number}", f"{number} owls nest above the hayloft. " * 40)
    put_secret(store)
    for number in range(8, 12):
        put(store, f"kept {number}", f"{number} owls nest above the hayloft. " * 40)
    return store


def expire(store: MemoryStore) -> None:
    store.update(ID, expires_at=datetime.now(UTC).isoformat())


def push_out(store: MemoryStore) -> None:
    store.configure(quota=store.totals().bytes)
    store.parts.catalog().documents.touch({row.id: 2**40 for row in store.list() if row.id != ID})
    put(store, "another", "Nobody else is here.")


FATES: dict[str, Callable[[MemoryStore], object]] = {
    "stored": lambda _: None,
    "closed": MemoryStore.close,
    "replaced": lambda store: put_secret(store, times=5),
    "replaced many times": lambda store: [put_secret(store, times=times) for times in range(1, 25)],
    "labelled": lambda store: store.update(ID, tags=["other"]),
    "converted": lambda store: store.convert(ID, "int4"),
    "kept for another model": lambda store: put_version(store, "another", ID, store.text(ID)),
    "expired": expire,
}
GONE: dict[str, Callable[[MemoryStore], object]] = {
    "removed": lambda store: store.delete(ID),
    "renamed": lambda store: store.rename(ID, "renamed"),
    "replaced by another text": lambda store: put(store, ID, "Nobody must learn of it."),
    "expired": lambda store: (expire(store), store.expire()),
    "pushed out": push_out,
}


@pytest.mark.parametrize("fate", FATES)
def test_nothing_is_found_of_an_erased_document(store: MemoryStore, fate: str) -> None:
    FATES[fate](store)
    before = [one for one in everything(store) if one.row.id != ID]
    assert traces(store.root) == set(TRACES)
    erase(store, [ID])
    assert traces(store.root) == set()
    store.close()
    assert traces(store.root) == set()
    assert ID not in store
    assert len(before) == len(store.list()) == 12
    assert all(one.stands(store) for one in before)
    assert {hit.document for hit in store.search("owls", 1000)} == {one.row.id for one in before}
    assert verify(store) == []


@pytest.mark.parametrize("fate", GONE)
def test_nothing_is_found_of_what_was_removed_before(store: MemoryStore, fate: str) -> None:
    GONE[fate](store)
    assert traces(store.root)
    if fate == "renamed":
        erase(store, ["renamed"])
    else:
        erase(store)
    left = {ID, *LABELS} if fate == "replaced by another text" else set()  # it keeps its label
    assert traces(store.root) == left
    assert verify(store) == []


def test_what_another_sqlite_left_in_free_pages_is_erased(store: MemoryStore) -> None:
    store.close()
    with contextlib.closing(sqlite3.connect(store.folder / "catalog.sqlite3", isolation_level=None)) as db:
        for sql in ("secure_delete = OFF", "foreign_keys = ON"):
            db.execute(f"PRAGMA {sql}")
        db.execute("DELETE FROM documents WHERE id = ?", [ID])
    store.parts.catalog().connections.close()
    assert b"zymurgy" in (store.folder / "catalog.sqlite3").read_bytes()
    erase(store)
    assert traces(store.root) == set()


def test_leftovers_of_crashes_are_erased_too(store: MemoryStore) -> None:
    replaced_file_of(store, ID)
    unfinished_put(store, "another")
    temp = new_temp(store.files.staging)
    temp.write_text(" ".join(TRACES))
    with pytest.raises(DocumentNotFoundError, match="absent"):
        erase(store, [ID, "absent"])
    assert ID in store
    assert temp.exists()
    erase(store, [ID])
    assert traces(store.root) == set()
    assert not list(store.files.temps())
    assert verify(store) == []


def replaced_file_of(store: MemoryStore, id: str) -> None:
    """Leave what a process that was killed leaves when it has replaced a document."""
    number = store.row(id).file.partition("-")[2][:12]
    paths = list((store.folder / "kv").glob(f"*/*-{number}.*"))
    copies = {path: path.read_bytes() for path in paths}
    assert len(copies) == 2
    put_secret(store, id)
    with store.parts.catalog().transaction(), store.parts.catalog().connections.use() as db:
        db.execute("INSERT INTO unsettled VALUES (?)", [number])
    for path, data in copies.items():
        path.write_bytes(data)


def test_a_namespace_is_erased_from_alone(store: MemoryStore) -> None:
    other = store.within("other")
    put_secret(other)
    erase(store, [ID])
    assert traces(other.folder) == set(TRACES)
    erase(other, [ID])
    assert traces(store.root) == set()


def test_a_store_that_was_never_written_to_is_left_so(folder: Path) -> None:
    store = MemoryStore(folder / "store")
    erase(store)
    with pytest.raises(DocumentNotFoundError):
        erase(store, [ID])
    assert not store.folder.exists()


def test_a_catalog_that_was_put_aside_is_named_and_nothing_is_removed(store: MemoryStore) -> None:
    aside = store.folder / "damaged-1700000000000.sqlite3"
    aside.write_text(ID)
    with pytest.raises(StoreError, match=rf"holds {aside.name}, put aside by `repair`.* remove it, and erase again"):
        erase(store, [ID])
    assert ID in store
    aside.unlink()
    erase(store, [ID])
    assert traces(store.root) == set()


def test_what_cannot_be_removed_is_named_and_erased_when_it_can(store: MemoryStore) -> None:
    temp = store.folder / "kv" / ".tmp-in-the-way"  # no file, so it cannot be unlinked
    temp.mkdir()
    with pytest.raises(StoreError, match=f"{temp.name} cannot be removed; see to permissions, and try again"):
        erase(store, [ID])
    assert ID not in store
    temp.rmdir()
    erase(store)
    assert traces(store.root) == set()


def test_the_log_is_emptied_when_nobody_reads_from_it(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (connections, catalog_module):
        monkeypatch.setattr(module, "BUSY_SECONDS", 0.1)
    store.close()
    with MemoryStore(store.root) as other, other.parts.catalog().reading():
        assert other.list()
        with pytest.raises(StoreError, match=r"has been reading for .* try again"):
            erase(store, [ID])
    erase(store)
    assert traces(store.root) == set()


def test_what_is_being_downloaded_and_what_an_upload_left_is_erased(folder: Path) -> None:
    place = folder / "place"
    store = MemoryStore(folder / "store", files=place.as_uri())
    put(store, "kept", "Two owls nest above the hayloft.")
    put_secret(store)
    name = store.row(ID).file
    temps = [place / "kv" / ".tmp-upload", store.folder / "cache" / "downloads" / ".tmp-download"]
    temps[1].parent.mkdir()
    cached = store.folder / "cache" / "kv" / "00" / "00-000000000001.safetensors"  # of an object that is gone
    cached.parent.mkdir(exist_ok=True)
    for path in [*temps, cached]:
        path.write_bytes((place / name).read_bytes())
    assert verify(store) == []  # these are in nobody's way
    erase(store, [ID])
    assert traces(folder) == set()
    assert verify(store) == []
    assert store.files.fetch(store.row("kept").file).exists()


def test_whoever_reads_another_document_meanwhile_is_not_disturbed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore(folder / "store", files=(folder / "place").as_uri())
    put(store, "kept")
    put_secret(store)
    backend = store.files.backend  # type: ignore[attr-defined]
    fetch = backend.fetch

    def fetch_slowly(name: str, target: Path) -> None:
        fetch(name, target)
        monkeypatch.setattr(backend, "fetch", fetch)
        erase(store, [ID])

    store.files.cache.joinpath(store.row("kept").file).unlink()  # type: ignore[attr-defined]
    monkeypatch.setattr(backend, "fetch", fetch_slowly)
    assert store.get("kept").row.id == "kept"
    assert traces(folder) == set()
