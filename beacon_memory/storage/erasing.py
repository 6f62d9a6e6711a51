"""Erasing documents: what `remove` only forgets is overwritten, in the catalog, its log and all files.

    erase(store, ["lease"])  # nothing of the document is left
    erase(store)             # nor of any that was removed, replaced or pushed out before

docs/store.md says what no program can reach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from beacon_memory.errors import CorruptFileError, StoreError
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.durable import entries
from beacon_memory.storage.files.marks import marked_labels
from beacon_memory.storage.files.names import file_stem, number_of, stem_of

from .eviction import delete_expired
from .leftovers import suspected_files, unnamed_files
from .publishing import write_label
from .repair import PUT_ASIDE
from .store import MemoryStore
from .unfinished import erase_unfinished

__all__ = ["erase"]


def erase(store: MemoryStore, ids: Iterable[str] = ()) -> None:
    """Remove documents, or none, and whatever the store still holds of them and of all that was removed before.

    When this returns, nothing of their texts, labels, ids and K/V is in the catalog, its log and its full-text index,
    in files, temporary files and the cache, or in the backend; and no power cut brings it back. It takes as long as
    writing the catalog anew, and as much room once more. Nobody else can write meanwhile.

    Raises DocumentNotFoundError if one of them is not stored, or StoreError if somebody does not end writing in two
    minutes or a catalog that `repair` put aside is there, and nothing has changed then. Raises StoreError if something
    cannot be removed: the documents are gone then, and `erase(store)` goes on with what is left.
    """
    ids = list(dict.fromkeys(ids))
    if not store.parts.begun:
        for id in ids:
            store.row(id)
        return
    if aside := [one.name for one in entries(store.folder) if one.name.startswith(PUT_ASIDE)]:
        raise StoreError(
            f"{store.folder} holds {', '.join(aside)}, put aside by `repair` with all texts of that time: when you "
            f"need it no more, remove it, and erase again"
        )
    with store.parts.locks.tidying():
        catalog, files = store.parts.catalog(), store.files
        with catalog.transaction():
            expired, _ = delete_expired(catalog)
            for id in ids:
                if id not in expired:
                    with contextlib.suppress(CorruptFileError):  # one that is damaged beyond repair can be erased, too
                        catalog.documents.require(id)
                    catalog.documents.delete(id)
        stems = set(map(file_stem, ids))
        unnamed = [*unnamed_files(catalog, files, suspected_files(catalog, files))]
        _settle_labels(store, catalog)
        files.erase([name for name, left in unnamed if left or stem_of(name) in stems])
        store.conversations.erase_temps()
        erase_unfinished(store.folder)
        with catalog.transaction():
            catalog.file_names.settle(catalog.file_names.unsettled())
        catalog.wipe()


def _settle_labels(store: MemoryStore, catalog: Catalog) -> None:
    """Write anew the labels that killed processes were changing, while their marks still tell that the rows count."""
    marked = marked_labels(store.files)
    for row in catalog.documents.scan() if marked else ():
        if isinstance(row, DocumentRow) and number_of(row.file) in marked:
            write_label(store.parts, row)
