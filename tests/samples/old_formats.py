"""Files and catalogs as earlier versions of the package wrote them, by hand."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kv_samples import sample, write_kv_file
from safetensors import safe_open
from safetensors.torch import save_file

from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.kv.quantize import QuantizedKV, _quantized
from beacon_memory.storage.catalog.passages import split_passages
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.names import file_stem
from beacon_memory.storage.files.stored_kv import stored_bytes

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


def write_old_store(folder: Path, documents: dict[str, str]) -> dict[str, MemoryKV]:
    """A store of files of format 2 under an old catalog, texts by id; returns the K/V that it holds."""
    folder.mkdir()
    db = create_old_catalog(folder / "catalog.sqlite3")
    kept = {}
    for n, (id, text) in enumerate(documents.items()):
        header, kv = sample(id, text)
        file = f"{file_stem(id)}-{n:08x}.safetensors"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_format_2(folder / file, header, kv)
        old = {"fingerprint": header.fingerprint.digest, "compression": "select", "metadata": json.dumps({"n": n})}
        insert_old_row(db, text, id=id, file=file, bytes=stored_bytes(kv) + kv.positions.nbytes // 2, **old)
        kept[id] = kv
    db.close()
    return kept


def write_format_3(path: Path, header: DocumentHeader, kv: MemoryKV) -> QuantizedKV:
    """A file as the third version wrote it, in 4 bits, and what is in it: nothing was rotated then."""
    stored = _quantized(kv.to(dtype=torch.float32), 4, rotated=False)
    write_kv_file(path, header, stored)
    with safe_open(path, framework="pt") as file:
        entry = json.loads(file.metadata()["beacon_memory"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    said = {name: form for name, form in entry["tensors"].items() if name != "rotated"}
    _save(path, tensors, {"format": 3, "header": entry["header"], "tensors": said})
    return stored


def write_format_2(path: Path, header: DocumentHeader, kv: MemoryKV, **changes: object) -> None:
    """A file as the second version wrote it; changes: to what it says of its tensors."""
    tensors = {"keys": kv.keys, "values": kv.values, "places": kv.positions, "counts": kv.counts.to(torch.int32)}
    said = {name: {"dtype": str(tensor.dtype), "shape": [*tensor.shape]} for name, tensor in tensors.items()}
    entry = {
        "format": 2,
        "header": _older(header, "method"),
        "tensors": {**said, "sha256": _digest(tensors), **changes},
    }
    _save(path, tensors, entry)


def write_format_1(path: Path, header: DocumentHeader, kv: BeaconKV, **changes: object) -> None:
    """A file as the first version wrote it; changes: to what it says of its tensors."""
    tensors = {"keys": kv.keys, "values": kv.values}
    said = {"dtype": str(kv.keys.dtype), "shape": [*kv.keys.shape], "sha256": _digest(tensors), **changes}
    entry = {"format": 1, "header": _older(header, "method", "compression", "span"), "tensors": said}
    _save(path, tensors, entry)


def _older(header: DocumentHeader, *lacks: str) -> dict[str, Any]:
    """A header of a time when windows had no span of their own."""
    fields = {name: value for name, value in asdict(header).items() if name not in lacks}
    windows = [{name: value for name, value in window.items() if name != "span"} for window in fields["windows"]]
    return {**fields, "windows": windows}


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    hasher = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        hasher.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _save(path: Path, tensors: dict[str, torch.Tensor], entry: dict[str, Any]) -> None:
    entry["sha256"] = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
    save_file(tensors, path, metadata={"beacon_memory": json.dumps(entry)})
