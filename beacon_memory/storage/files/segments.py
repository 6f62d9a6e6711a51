"""A document in several files: the first, and behind it segments with what was appended.

Each file is a K/V file of its own, and names the root of the one before. So the root of the last one stands for all.
The files are read from the last one to the first, each compared with the root that is known of it by then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch

from beacon_memory.errors import CorruptFileError, MismatchedFileError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import QuantizedKV

from .access import Files, read_file
from .header import DocumentHeader
from .kv_file import StoredFile, StoredIndex
from .stored_kv import StoredKV, precision_of

__all__ = ["joined_files", "joined_headers", "joined_indexes", "joined_kv", "read_back"]

_File = TypeVar("_File", bound=StoredFile | StoredIndex)


def read_back(
    files: Files, names: Sequence[str], root: str, read: Callable[[Path, Sequence[_File]], _File]
) -> Iterator[_File]:
    """Read the files of a document from the last one to the first, when each is asked for.

    root: of the last one.
    read: called with the path of a file, and the files behind it, which were read already.

    Raises MismatchedFileError for a file that is not the one that the next one continues, or as `read`.
    """
    later: list[_File] = []
    for number, name in reversed([*enumerate(names)]):
        file = read_file(files, name, partial(_continued, name, root, number > 0, read, later))
        yield file
        root, later = file.behind, [file, *later]


def _continued(
    name: str,
    root: str,
    is_segment: bool,
    read: Callable[[Path, Sequence[_File]], _File],
    later: Sequence[_File],
    path: Path,
) -> _File:
    """Read a file that must have this root, and continue another one or none; raises MismatchedFileError."""
    file = read(path, later)
    if file.root != root or bool(file.behind) != is_segment:
        raise MismatchedFileError(f"{name} is not the file that its row names; `beacon-memory repair` mends it")
    return file


def joined_files(parts: Sequence[StoredFile], content_hash: str | None = None) -> StoredFile:
    """Return what files of a document hold together, in their order.

    content_hash: of their texts, joined; None to take it from them.
    """
    first, last = parts[0], parts[-1]
    text = torch.cat([part.text_bytes for part in parts])
    content_hash = content_hash or hashlib.sha256(text.numpy().tobytes()).hexdigest()
    whole = all(part.lowest is None for part in parts)
    return StoredFile(
        joined_headers([part.header for part in parts], content_hash),
        joined_kv([part.kv for part in parts]),
        text,
        last.root,
        None if whole else [*chain.from_iterable(part.lowest or () for part in parts)],
        first.behind,
    )


def joined_indexes(parts: Sequence[StoredIndex], content_hash: str) -> StoredIndex:
    """Return the index of several files of a document together, in their order; see `joined_files`."""
    depth = max(part.counts.shape[1] for part in parts)
    counts = [part.counts.new_zeros(len(part.counts), depth, *part.counts.shape[2:]) for part in parts]
    for all_levels, part in zip(counts, parts, strict=True):
        all_levels[:, : part.counts.shape[1]] = part.counts
    header = joined_headers([part.header for part in parts], content_hash)
    return StoredIndex(header, torch.cat(counts), parts[-1].root, parts[0].behind)


def joined_headers(parts: Sequence[DocumentHeader], content_hash: str) -> DocumentHeader:
    """Return the header of several files of a document together, in their order; see `joined_files`.

    Raises CorruptFileError if they are not of one document, made in one way.
    """
    if any(_same_in_all(part) != _same_in_all(parts[0]) for part in parts):
        raise CorruptFileError(f"the segments of {parts[0].id!r} are of different documents, or of different models")
    return replace(
        parts[0],
        content_hash=content_hash,
        tokens=sum(part.tokens for part in parts),
        windows=tuple(chain.from_iterable(part.windows for part in parts)),
        tail_ids=parts[-1].tail_ids,
        span=sum(part.span for part in parts),
        created_at=parts[-1].created_at,
    )


def joined_kv(parts: Sequence[StoredKV]) -> StoredKV:
    """Return K/V one behind another; raises CorruptFileError unless all are in one precision."""
    if len(precisions := {precision_of(part) for part in parts}) > 1:
        raise CorruptFileError(f"segments of one document are in {' and '.join(sorted(precisions))}")
    plain = [part for part in parts if isinstance(part, MemoryKV)]
    quantized = [part for part in parts if isinstance(part, QuantizedKV)]
    return MemoryKV.concat(plain) if plain else QuantizedKV.concat(quantized)


def _same_in_all(header: DocumentHeader) -> tuple[object, ...]:
    """Return what each file of a document says alike."""
    return header.id, header.namespace, header.compression, header.fingerprint, header.method
