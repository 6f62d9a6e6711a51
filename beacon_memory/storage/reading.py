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
from beacon_memory.storage.files.access import Files, read_file
from beacon_memory.storage.files.kv_file import StoredFile, StoredIndex, read_index, read_kv_file
from beacon_memory.storage.files.segments import joined_files, joined_indexes, read_back

from .parts import StoreParts
from .records import difference_of

__all__ = [
    "READ_TRIES",
    "find_row",
    "read_document",
    "read_document_index",
    "read_document_part",
    "read_files",
    "require_file",
    "require_same",
]

READ_TRIES = 5  # times that a document may be replaced while it is being read

_File = TypeVar("_File", bound=StoredFile | StoredIndex)


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
    """Read all of a document's K/V and text, given by its id or its row; returns its row and them, compared.

    A file is removed after its row was replaced: if it is gone, the row is read anew. Raises as `MemoryStore.get`.
    """
    return _read(parts, document, fingerprint, read_files)


def read_document_index(parts: StoreParts, document: DocumentRow) -> tuple[DocumentRow, StoredIndex]:
    """Read what could be read of a document, given by its row; returns row and index, compared.

    If the document was replaced since, the row is read anew. Raises as `MemoryStore.get`.
    """
    return _read(parts, document, document.fingerprint, _read_indexes)


def read_document_part(parts: StoreParts, row: DocumentRow, lowest: Sequence[int]) -> StoredFile:
    """Read a part of a document's K/V: of each section the entries from its lowest level on, `LEVELS` for none.

    Raises ConflictError if the document has other files by now than its row says, else as `MemoryStore.get`.
    """
    now, file = _read(parts, row, row.fingerprint, partial(_read_parts, root=row.root, lowest=lowest))
    require_same(row, now)
    return file


def require_same(row: DocumentRow, now: DocumentRow) -> None:
    """Raise ConflictError if a document, by its row of now, has other files than a row of it said."""
    if now.root != row.root:
        raise ConflictError(f"document {row.id!r} was replaced while it was being read; try again")


def read_files(files: Files, row: DocumentRow, namespace: str) -> StoredFile:
    """Read all files that a row names, and compare them with it and with each other; see `read_document`.

    Raises CorruptFileError, or FileNotFoundError if one of them is gone.
    """
    return _together(files, row, namespace, lambda path, _: read_kv_file(path), joined_files, difference_of)


def _read_indexes(files: Files, row: DocumentRow, namespace: str) -> StoredIndex:
    join = partial(joined_indexes, content_hash=row.content_hash)
    return _together(files, row, namespace, lambda path, _: read_index(path), join, _difference_of_index)


def _read_parts(files: Files, row: DocumentRow, namespace: str, root: str, lowest: Sequence[int]) -> StoredFile:
    """Read a part of files; if the row is not that of this root, none, for their sections may be others."""

    def read(path: Path, later: Sequence[StoredFile]) -> StoredFile:
        stop = len(lowest) - sum(len(file.lowest or ()) for file in later)

        def choose(index: StoredIndex) -> Sequence[int]:
            count = len(index.counts)
            own = lowest[max(0, stop - count) : stop] if row.root == root else ()
            return own if len(own) == count else [LEVELS] * count  # of a wrong file, which is refused

        return read_kv_file(path, choose)

    join = partial(joined_files, content_hash=row.content_hash)
    return _together(files, row, namespace, read, join, difference_of)


def _together(
    files: Files,
    row: DocumentRow,
    namespace: str,
    read: Callable[[Path, Sequence[_File]], _File],
    join: Callable[[Sequence[_File]], _File],
    difference_of: Callable[[DocumentRow, str, _File], str | None],
) -> _File:
    """Read the files that a row names, and join them; raises MismatchedFileError if they are others."""
    if not row.segments:
        return read_file(files, row.file, lambda path: _compared(row, namespace, read(path, ()), difference_of))
    found = [*read_back(files, row.files, row.root, read)]
    return _compared(row, namespace, join(found[::-1]), difference_of)


def _compared(
    row: DocumentRow, namespace: str, file: _File, difference_of: Callable[[DocumentRow, str, _File], str | None]
) -> _File:
    """Return what was read of the files that a row names; raises MismatchedFileError if it is of others."""
    if difference := difference_of(row, namespace, file):
        raise MismatchedFileError(f"{row.file} {difference}; `beacon-memory repair` mends it")
    return file


def _difference_of_index(row: DocumentRow, namespace: str, index: StoredIndex) -> str | None:
    own = (row.id, namespace, row.root) == (index.header.id, index.header.namespace, index.root)
    return None if own else "is not the file that its row names"


def _read(
    parts: StoreParts,
    document: str | DocumentRow,
    fingerprint: str | None,
    read: Callable[[Files, DocumentRow, str], _File],
) -> tuple[DocumentRow, _File]:
    id, row = (document, None) if isinstance(document, str) else (document.id, document)
    row = row or find_row(parts.catalog(), id, fingerprint)
    missing = None
    for _ in range(READ_TRIES):
        try:
            return row, read(parts.files, row, parts.namespace)
        except FileNotFoundError:
            now = find_row(parts.catalog(), id, fingerprint)
            if missing == row.files == now.files:  # twice: a remote one may have been dropped from the cache just now
                raise _missing(row) from None
            missing, row = row.files, now
    raise ConflictError(f"document {id!r} was replaced {READ_TRIES} times while it was being read; try again")


def require_file(parts: StoreParts, id: str) -> None:
    """Raise MissingFileError if a K/V file of a document is not there; nothing is read of it.

    A file is removed only after its row was replaced. So a row without its file may be one of before, that came back
    when the last commits of the catalog were lost. A backend is not asked: what is in the catalog needs no network.
    """
    catalog = parts.catalog()
    if parts.settings.files is not None or catalog.connections.in_transaction:  # then rows of before are what is wanted
        return
    gone = None
    while (row := catalog.documents.get(id)) is not None and len(parts.files.present(row.files)) < len(row.files):
        if gone == row.files:  # twice: it was not replaced in between
            raise _missing(row)
        gone = row.files


def _missing(row: DocumentRow) -> MissingFileError:
    names = " or ".join(row.files)
    return MissingFileError(f"{names} of {row.id!r} is missing; `beacon-memory repair` mends it")
