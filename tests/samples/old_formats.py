"""Catalogs, and stores of files and labels, as earlier versions of the package wrote them, by hand."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from kv_samples import sample
from safetensors.torch import save_file

from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.storage.catalog.passages import split_passages
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.label_file import label_name
from beacon_memory.storage.files.names import file_stem

# What `m001_documents`, `m002_passages` and `m003_compression` left together, as SQLite tells of it.
_CATALOG = """
CREATE TABLE "_sqlite_migrations" ("id" INTEGER PRIMARY KEY, "migration_set" TEXT, "name" TEXT, "applied_at" TEXT);
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name" ON "_sqlite_migrations" ("migration_set", "name");
CREATE TABLE documents (
    id TEXT PRIMARY KEY NOT NULL, file TEXT NOT NULL UNIQUE, content_hash TEXT NOT NULL, fingerprint TEXT NOT NULL,
    tokens INTEGER NOT NULL, slots INTEGER NOT NULL, bytes INTEGER NOT NULL, ratios TEXT NOT NULL,
    metadata TEXT NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
    compression TEXT NOT NULL DEFAULT 'beacon', text TEXT NOT NULL DEFAULT ''
);
CREATE TABLE passages (
    id INTEGER PRIMARY KEY, document TEXT NOT NULL REFERENCES documents(id) ON DELETE CASCADE,
    ordinal INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL, text TEXT NOT NULL,
    UNIQUE (document, ordinal)
);
CREATE VIRTUAL TABLE "passages_fts" USING FTS5 ("text", tokenize='porter unicode61', content="passages");
CREATE TRIGGER "passages_ai" AFTER INSERT ON "passages" BEGIN
    INSERT INTO "passages_fts" (rowid, "text") VALUES (new.rowid, new."text");
END;
CREATE TRIGGER "passages_ad" AFTER DELETE ON "passages" BEGIN
    INSERT INTO "passages_fts" ("passages_fts", rowid, "text") VALUES('delete', old.rowid, old."text");
END;
CREATE TRIGGER "passages_au" AFTER UPDATE ON "passages" BEGIN
    INSERT INTO "passages_fts" ("passages_fts", rowid, "text") VALUES('delete', old.rowid, old."text");
    INSERT INTO "passages_fts" (rowid, "text") VALUES (new.rowid, new."text");
END;
"""
_STEPS = ("m001_documents", "m002_passages", "m003_compression")


def create_old_catalog(path: Path) -> sqlite3.Connection:
    """A catalog of three steps, without documents; whoever adds some closes it."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(_CATALOG)
    for name in _STEPS:
        values = ("beacon_memory", name, "2025-01-01 12:00:00.000000+00:00")
        db.execute("INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES (?, ?, ?)", values)
    return db


def insert_old_row(db: sqlite3.Connection, text: str, passages: bool = True, **fields: object) -> dict[str, object]:
    """Add a document to an old catalog: its row, text and passages; returns the row."""
    row = {
        "id": "doc",
        "content_hash": hashlib.sha256(text.encode()).hexdigest(),
        "fingerprint": "f" * 16,
        "tokens": 13,
        "slots": 6,
        "bytes": 1024,
        "ratios": "[2, 4]",
        "metadata": "{}",
        "created_at": "2025-01-02T00:00:00.000+00:00",
        "updated_at": "2025-01-03T00:00:00.000+00:00",
        "compression": "beacon",
        "text": text,
        **fields,
    }
    row.setdefault("file", f"kv/{row['id']}")
    columns = ", ".join(row)
    db.execute(f"INSERT INTO documents ({columns}) VALUES ({', '.join('?' * len(row))})", [*row.values()])
    for n, (start, stop) in enumerate(split_passages(text) if passages else ()):
        insert = "INSERT INTO passages (document, ordinal, start, stop, text) VALUES (?, ?, ?, ?, ?)"
        db.execute(insert, [row["id"], n, start, stop, text[start:stop]])
    return row


def write_old_store(folder: Path, documents: dict[str, str]) -> None:
    """A store of files of format 4, with labels of that time, under an old catalog: texts by id."""
    folder.mkdir()
    db = create_old_catalog(folder / "catalog.sqlite3")
    for n, (id, text) in enumerate(documents.items()):
        header, kv = sample(id, text)
        file = f"{file_stem(id)}-{n:012x}.safetensors"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_format_4(folder / file, header, kv, text)
        old = {"fingerprint": header.fingerprint.digest, "compression": "select", "metadata": json.dumps({"n": n})}
        row = insert_old_row(db, text, id=id, file=file, **old)
        label = {"format": 1, "id": id, "created_at": row["created_at"], "updated_at": row["updated_at"]}
        label |= {"metadata": {"n": n}, "tags": [], "pinned": False, "expires_at": None}
        (folder / label_name(file)).write_text(json.dumps({**label, "sha256": _sha256(label)}))
    db.close()


def write_format_4(path: Path, header: DocumentHeader, kv: MemoryKV, text: str) -> None:
    """A file as the fourth version wrote it."""
    old = asdict(header)
    del old["namespace"]
    for window in old["windows"]:
        del window["cuts"]
    tensors = {
        "keys": kv.keys,
        "values": kv.values,
        "places": kv.positions.to(torch.int16),
        "counts": kv.counts.to(torch.int32),
        "text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8),
    }
    said: dict[str, Any] = {one: {"dtype": str(t.dtype), "shape": [*t.shape]} for one, t in tensors.items()}
    hasher = xxhash.xxh3_128()
    for _, tensor in sorted(tensors.items()):
        hasher.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.contiguous().view(torch.uint8).numpy().data)
    entry = {"format": 4, "header": old, "tensors": said | {"xxh3": hasher.hexdigest()}}
    save_file(tensors, path, metadata={"beacon_memory": json.dumps({**entry, "sha256": _sha256(entry)})})


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
