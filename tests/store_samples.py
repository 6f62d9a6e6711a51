"""A store to write to, and short ways to write."""

from __future__ import annotations

from pathlib import Path

from kv_samples import TEXT, sample

from beacon_memory.kv import MemoryKV
from beacon_memory.store import MemoryStore


def files(store: MemoryStore) -> list[Path]:
    return sorted(path for path in (store.folder / "kv").rglob("*") if path.is_file())


def put(store: MemoryStore, id: str = "doc", text: str = TEXT, **metadata: object) -> MemoryKV:
    header, kv = sample(id, text)
    store.put(header, kv, text, metadata or None)
    return kv
