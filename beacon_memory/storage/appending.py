"""Text appended to a document: whether it fits there, and which segments before it become a part of its own."""

from __future__ import annotations

from beacon_memory.documents import content_hash
from beacon_memory.errors import InputError
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.access import Files, read_file
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.kv_file import StoredFile, read_header, read_kv_file
from beacon_memory.storage.files.segments import read_back

__all__ = ["check_appended", "taken_in"]


def check_appended(row: DocumentRow, header: DocumentHeader, text: str) -> None:
    """Raise InputError unless a header is of what stands in a text behind that of a row, with K/V made in one way."""
    start, stop = (header.windows[0].start, header.windows[-1].stop) if header.windows else (0, 0)
    if not start or stop > len(text):
        raise InputError(f"what is appended to {row.id!r} must stand behind its text, got characters {start} to {stop}")
    if [content_hash(text[:start]), content_hash(text[start:])] != [row.content_hash, header.content_hash]:
        raise InputError(f"the text of {row.id!r} is not the one that it has with what is appended: a hash differs")
    ours = row.id, row.fingerprint, row.compression, header.method if row.method is None else row.method
    if ours != (header.id, header.fingerprint.digest, header.compression, header.method):
        raise InputError(
            f"what is appended to {row.id!r} is of another document, or was made by another model or method"
        )


def taken_in(files: Files, row: DocumentRow, slots: int) -> tuple[list[StoredFile], str]:
    """Read those of a document's files that a new segment of so many slots takes in, the last ones.

    Returns them in their order, and the root of the file before them. Raises FileNotFoundError if one of them is gone.
    """
    taken: list[StoredFile] = []
    behind, left = row.root, row.slots
    reading = read_back(files, row.files, row.root, lambda path, _: read_kv_file(path))
    for name in reversed(row.files):
        size = left if name == row.file else read_file(files, name, read_header).slots
        if size >= 2 * slots:
            break
        taken.insert(0, next(reading))
        behind, slots, left = taken[0].behind, slots + size, left - size
    return taken, behind
