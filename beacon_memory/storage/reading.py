"""Reading a document: its row, then its file, though others may replace the document in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from beacon_memory.errors import ConflictError, MismatchedFileError, MissingFileError
from beacon_memory.kv.levels import LEVELS
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.access import read_file
from beacon_memory.storage.files.kv_file import StoredFile, StoredIndex, read_index, read_kv_file

from .parts import StoreParts
from .records import difference_of

__all__ = [
    "READ_TRIES",
    "find_row",
    "read_document",
    "read_document_index",
    "read_document_part",
    "require_file",
    "require_same",
]

READ_TRIES = 5  # times that a document may be replaced while it is being read


def find_row(catalog: Catalog, id: str, fingerprint: str | None = None) -> DocumentRow:
    """Return the row of a document; raises DocumentNotFoundError.

    fingerprint: of the model that shall read the K/V; a version that was kept for it is returned instead.
    """
    row = catalog.documents.require(id)
    if fingerprint is not None and row.fingerprint != fingerprint:
        version = catalog.versions.get(id, fingerprint)
        return version.labelled(row.label) if version else row
    return row


def read_document(
    parts: StoreParts, document: str | DocumentRow, fingerprint: str | None = None
) -> tuple[DocumentRow, StoredFile]:
    """Read the whole file of a document, given by its id or its row; returns its row and file, compared.

    A file is removed after its row was replaced: if it is gone, the row is read anew. Raises as `MemoryStore.get`.
    """
    return _read(parts, document, fingerprint, read_kv_file, difference_of)


def read_document_index(parts: StoreParts, document: DocumentRow) -> tuple[DocumentRow, StoredIndex]:
    """Read what could be read of a document's file, given by its row; returns row and index, compared.

    If the document was replaced since, the row is read anew. Raises as `MemoryStore.get`.
    """
    return _read(parts, document, document.fingerprint, read_index, _difference_of_index)


def read_document_part(parts: StoreParts, row: DocumentRow, lowest: Sequence[int]) -> StoredFile:
    """Read a part of a document's K/V: of each section the entries from its lowest level on, `LEVELS` for none.

    Raises ConflictError if the document has another file by now than its row says, else as `MemoryStore.get`.
    """
    now, file = _read(parts, row, row.fingerprint, partial(_part, root=row.root, lowest=lowest), difference_of)
    require_same(row, now)
    return file


def require_same(row: DocumentRow, now: DocumentRow) -> None:
    """Raise ConflictError if a document, by its row of now, has another file than a row of it said."""
    if now.root != row.root:
        raise ConflictError(f"document {row.id!r} was replaced while it was being read; try again")


def _part(path: Path, *, root: str, lowest: Sequence[int]) -> StoredFile:
    """Read a part of a file; of any other one than that of this root no row at all, for its sections may be others."""

    def choose(index: StoredIndex) -> Sequence[int]:
        return lowest if index.root == root else [LEVELS] * len(index.counts)

    return read_kv_file(path, choose)


def _difference_of_index(row: DocumentRow, namespace: str, index: StoredIndex) -> str | None:
    own = (row.id, namespace, row.root) == (index.header.id, index.header.namespace, index.root)
    return None if own else "is not the file that its row names"


_File = TypeVar("_File")


def _read(
    parts: StoreParts,
    document: str | DocumentRow,
    fingerprint: str | None,
    read: Callable[[Path], _File],
    difference_of: Callable[[DocumentRow, str, _File], str | None],
) -> tuple[DocumentRow, _File]:
    id, row = (document, None) if isinstance(document, str) else (document.id, document)
    row = row or find_row(parts.catalog(), id, fingerprint)
    missing = None
    for _ in range(READ_TRIES):
        try:
            return row, read_file(parts.files, row.file, partial(_compared, row, parts.namespace, read, difference_of))
        except FileNotFoundError:
            now = find_row(parts.catalog(), id, fingerprint)
            if missing == row.file == now.file:  # twice: a remote one may have been dropped from the cache just now
                raise _missing(row) from None
            missing, row = row.file, now
    raise ConflictError(f"document {id!r} was replaced {READ_TRIES} times while it was being read; try again")


def _compared(
    row: DocumentRow,
    namespace: str,
    read: Callable[[Path], _File],
    difference_of: Callable[[DocumentRow, str, _File], str | None],
    path: Path,
) -> _File:
    """Read the file that a row names; raises MismatchedFileError if it is another one."""
    file = read(path)
    if difference := difference_of(row, namespace, file):
        raise MismatchedFileError(f"{row.file} {difference}; `beacon-memory repair` mends it")
    return file


def require_file(parts: StoreParts, id: str) -> None:
    """Raise MissingFileError if the K/V file of a document is not there; nothing is read of it.

    A file is removed only after its row was replaced. So a row without its file may be one of before, that came back
    when the last commits of the catalog were lost. A backend is not asked: what is in the catalog needs no network.
    """
    catalog = parts.catalog()
    if parts.settings.files is not None or catalog.connections.in_transaction:  # then rows of before are what is wanted
        return
    gone = None
    while (row := catalog.documents.get(id)) is not None and not parts.files.present([row.file]):
        if gone == row.file:  # twice: it was not replaced in between
            raise _missing(row)
        gone = row.file


def _missing(row: DocumentRow) -> MissingFileError:
    return MissingFileError(f"{row.file} of {row.id!r} is missing; `beacon-memory repair` mends it")
