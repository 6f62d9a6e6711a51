"""Rows for the catalog, without K/V."""

from __future__ import annotations

from beacon_memory.documents import Text, content_hash, utc_now
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.rows import DocumentRow

LONG_AGO, LATER = "2020-01-01T00:00:00.000+00:00", "2999-01-01T00:00:00.000+00:00"


def row(id: str, text: str, **changes: object) -> DocumentRow:
    now = utc_now()
    fields: dict[str, object] = {
        "id": id,
        "file": f"kv/{id!r}",
        "content_hash": content_hash(text),
        "fingerprint": "f" * 16,
        "compression": "beacon",
        "precision": "bfloat16",
        "tokens": 13,
        "slots": 6,
        "bytes": 1024,
        "ratios": (2, 4),
        "metadata": {},
        "tags": (),
        "pinned": False,
        "expires_at": None,
        "created_at": now,
        "updated_at": now,
        "root": "e" * 64,
    }
    return DocumentRow(**{**fields, **changes})  # type: ignore[arg-type]  # by field name


def add(catalog: Catalog, id: str, text: str, **changes: object) -> DocumentRow:
    return catalog.documents.put(row(id, text, **changes), Text(text))


def clear(catalog: Catalog) -> None:
    """Remove all documents."""
    with catalog.transaction():
        for one in catalog.documents.scan():
            catalog.documents.delete(one.id)
