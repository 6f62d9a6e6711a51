"""The catalog row of a K/V file, and the comparison of the two."""

from __future__ import annotations

import time

from beacon_memory.documents import Label, Precision, utc_now
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.kv_file import StoredFile
from beacon_memory.storage.files.label_file import StoredLabel
from beacon_memory.storage.files.stored_kv import precision_of

__all__ = ["difference_of", "label_of", "row_of"]


def row_of(
    name: str, root: str, header: DocumentHeader, precision: Precision, nbytes: int, label: Label, created_at: str
) -> DocumentRow:
    """Return the catalog row of a document whose file has this name and root; nbytes: see `stored_bytes`."""
    now = utc_now()
    return DocumentRow(
        id=header.id,
        file=name,
        content_hash=header.content_hash,
        fingerprint=header.fingerprint.digest,
        compression=header.compression,
        precision=precision.value,
        tokens=header.tokens,
        slots=header.slots,
        bytes=nbytes,
        ratios=header.ratios,
        metadata=label.metadata,
        tags=tuple(label.tags),
        pinned=label.pinned,
        expires_at=label.expires_at,
        created_at=created_at,
        updated_at=now,
        used_at=int(time.time()),
        method=header.method,
        root=root,
    )


def label_of(row: DocumentRow, namespace: str) -> StoredLabel:
    """Return what the label file of a row says."""
    return StoredLabel(row.id, namespace, row.created_at, row.label, row.updated_at)


def difference_of(row: DocumentRow, namespace: str, file: StoredFile) -> str | None:
    """Return in which fields a file disagrees with the row that names it; None if in none."""
    header, precision = file.header, precision_of(file.kv)
    pairs = {
        "id": (row.id, header.id),
        "namespace": (namespace, header.namespace),
        "content hash": (row.content_hash, header.content_hash),
        "fingerprint": (row.fingerprint, header.fingerprint.digest),
        "compression": (row.compression, header.compression),
        "parameters of the method": (header.method if row.method is None else row.method, header.method),
        "precision": (row.precision or precision, precision),
        "number of tokens": (row.tokens, header.tokens),
        "number of slots": (row.slots, header.slots),
        "hash of the whole file": (row.root, file.root),
    }
    different = [name for name, (ours, theirs) in pairs.items() if ours != theirs]
    return f"disagrees with its row in the {', '.join(different)}" if different else None
