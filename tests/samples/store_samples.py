"""A store to write to, and short ways to write and to damage."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from kv_samples import FINGERPRINT, TEXT, sample

from beacon_memory.documents import Label
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.storage.store import MemoryStore

# For tests that look into the folder of a store or into its SQLite file
IN_A_FOLDER = pytest.mark.parametrize("open_store", ["folder"], indirect=True)
BYTES = 36 * (2 * 4 * 2 + 1)  # of the K/V of a `sample`: entries, of keys and values in bfloat16 and a place


def place(store: MemoryStore) -> Path:
    """The folder where the files lie, which may be that of the store."""
    return Path(urlsplit(store.settings.files or store.folder.as_uri()).path)


def files(store: MemoryStore) -> list[Path]:
    """All files of documents but their labels."""
    return sorted(path for path in (place(store) / "kv").rglob("*") if path.is_file() and path.suffix != ".json")


def labels(store: MemoryStore) -> list[Path]:
    """All files of labels."""
    return sorted((place(store) / "kv").rglob("*.json"))


def put(store: MemoryStore, id: str = "doc", text: str = TEXT, **metadata: object) -> MemoryKV:
    header, kv = sample(id, text)
    store.put(header, kv, text, Label(metadata) if metadata else None)
    return kv


def put_version(
    store: MemoryStore, adapter: str, id: str = "doc", text: str = TEXT, *, keep_version: bool = True
) -> MemoryKV:
    """Store a document as a model with another adapter makes it."""
    header, kv = sample(id, text)
    store.put(replace(header, fingerprint=replace(FINGERPRINT, adapter=adapter)), kv, text, keep_version=keep_version)
    return kv


def version(adapter: str) -> str:
    """The digest of what `put_version` stores with this adapter."""
    return replace(FINGERPRINT, adapter=adapter).digest


def kept_text(store: MemoryStore, id: str = "doc") -> str:
    """The text that the catalog keeps, also of a document whose file is gone, of which the store gives out none."""
    return store.parts.catalog().documents.text(id)


def change(store: MemoryStore, sql: str) -> None:
    """Change the catalog behind the store's back, and behind that of the triggers which count rows."""
    with contextlib.closing(sqlite3.connect(store.folder / "catalog.sqlite3", isolation_level=None)) as db:
        ours = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name IN ('documents', 'versions')"
        triggers = db.execute(ours).fetchall()
        db.executescript("".join(f"DROP TRIGGER {name};" for name, _ in triggers) + sql)
        for _, trigger in triggers:
            db.execute(trigger)
