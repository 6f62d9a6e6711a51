"""Where documents live: for each a K/V file and a catalog row, written and removed as one.

    folder/catalog.sqlite3                                the rows, source texts and their full-text index
    folder/kv/<2 hex>/<hash of id>-<version>.safetensors  the K/V, a new file for each version of a document

A file is complete and on disk before a row names it, and is removed only after the commit of the row that replaced it.
So a reader sees the old version or the new one, and a crash leaves at worst a file that no row names.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

import torch

from .catalog import Catalog, DocumentRow, PassageHit
from .document import check_id, check_metadata, content_hash, utc_now
from .durable import make_folder
from .errors import CorruptFileError, DocumentNotFoundError, InputError, StoreError
from .kv import MemoryKV
from .kv_file import TEMP_PREFIX, DocumentHeader, check_kv_file, publish, read_header, read_kv_file, stage_kv_file

__all__ = ["MemoryStore", "Problem", "ProblemKind", "StoredDocument"]

_READ_TRIES = 5  # times that a document may be replaced while it is being read
_STALE_HOURS = 1.0  # age from which a temporary file is taken for a crashed writer's
_CLOCK_SECONDS = 2.0  # what the times of a file system and of Python may differ by

ProblemKind = Literal["missing-file", "damaged-file", "mismatched-file", "orphan-file", "stale-temp"]
_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True, eq=False)
class StoredDocument:
    """A document as it was stored: its catalog row, its file's header and its K/V."""

    row: DocumentRow
    header: DocumentHeader
    kv: MemoryKV


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that `MemoryStore.verify` found: in which document or file, if known, and if the file was removed."""

    kind: ProblemKind
    document: str | None
    path: Path | None
    message: str
    removed: bool = False


class _MissingFileError(CorruptFileError):
    """A row names a file that is not there."""


class MemoryStore:
    """A folder of documents, safe to use from several threads and processes at a time.

    The folder is created by the first write; before, the store reads as empty.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file; a store needs a folder, or a path where it can create one")
        self._opening = threading.Lock()
        self._catalog: Catalog | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the catalog; the next use opens it again."""
        with self._opening:
            if self._catalog is not None:
                self._catalog.close()
                self._catalog = None

    def __contains__(self, id: object) -> bool:
        try:
            return isinstance(id, str) and self._open().get(id) is not None
        except InputError:  # not a possible id, so none that is stored
            return False

    def get(self, id: str, *, device: torch.device | str = "cpu") -> StoredDocument:
        """Read a document, its K/V onto `device`.

        Raises DocumentNotFoundError with similar ids, or CorruptFileError if its file is missing, damaged or of
        another document. Whether the loaded model can use the K/V is for the caller to ask of `header.fingerprint`.
        """
        row, (header, kv) = self._read(id, lambda path: read_kv_file(path, device))
        if difference := _difference(row, header):
            raise CorruptFileError(f"{self.folder / row.file} {difference}; add {id!r} again to replace it")
        return StoredDocument(row, header, kv)

    def row(self, id: str) -> DocumentRow:
        """The catalog row of a document; raises DocumentNotFoundError with similar ids."""
        return self._open().require(id)

    def check(self, id: str) -> DocumentHeader:
        """The header of a document's file, after reading the file in full.

        Raises DocumentNotFoundError, or CorruptFileError if the file is missing or damaged.
        """
        return self._read(id, check_kv_file)[1]

    def list(self) -> builtins.list[DocumentRow]:
        """The rows of all documents by id, without their texts."""
        return self._open().list()

    def text(self, id: str) -> str:
        """The source text of a document; raises DocumentNotFoundError."""
        return self._open().text(id)

    def search(self, query: str, limit: int = 10) -> builtins.list[PassageHit]:
        """The passages of all documents that share words with `query`, best first; see `Catalog.search`."""
        return self._open().search(query, limit)

    def put(
        self, header: DocumentHeader, kv: MemoryKV, text: str, metadata: Mapping[str, object] | None = None
    ) -> DocumentRow:
        """Store a document, or replace the one of the same id; returns its row.

        Without `metadata` a replaced document keeps its own. Raises InputError if header, K/V, text and metadata do
        not fit together or cannot be stored; then, and if anything else fails, everything stays as it was.
        """
        if header.content_hash != content_hash(text):
            raise InputError(f"the header of {header.id!r} was made for another text: its content_hash differs")
        if header.windows and max(window.stop for window in header.windows) > len(text):
            raise InputError(f"a window of {header.id!r} ends after the text's {len(text)} characters")
        metadata = None if metadata is None else check_metadata(metadata)
        catalog = self._open(create=True)
        path = self._new_path(header.id)
        temp = stage_kv_file(path.parent, header, kv)
        try:
            with catalog.transaction():
                old = catalog.get(header.id)
                now = utc_now()
                row = DocumentRow(
                    id=header.id,
                    file=path.relative_to(self.folder).as_posix(),
                    content_hash=header.content_hash,
                    fingerprint=header.fingerprint.digest,
                    compression=header.compression,
                    tokens=header.tokens,
                    slots=header.slots,
                    bytes=kv.nbytes,
                    ratios=header.ratios,
                    metadata=metadata if metadata is not None else old.metadata if old else {},
                    created_at=now,
                    updated_at=now,
                )
                row = catalog.put(row, text)
                publish(temp, path)
        except BaseException:
            temp.unlink(missing_ok=True)
            self._unlink_unless_named(catalog, header.id, path)
            raise
        if old is not None:
            _unlink(self.folder / old.file)
        return row

    def delete(self, id: str) -> DocumentRow:
        """Remove a document; returns the row it had, or raises DocumentNotFoundError."""
        row = self._open().delete(id)
        _unlink(self.folder / row.file)
        return row

    def set_metadata(self, id: str, metadata: Mapping[str, object]) -> DocumentRow:
        """Replace the metadata of a document as a whole; returns its new row, or raises DocumentNotFoundError."""
        return self._open().set_metadata(id, metadata)

    def verify(self, *, repair: bool = False) -> builtins.list[Problem]:
        """Read every file in full and report what is wrong; [] is a sound store.

        With `repair`, files that no row names and temporary files older than an hour are removed, which
        `Problem.removed` says. A row or a source text never is: to mend a document, add it again.
        """
        catalog = self._open()
        problems = [problem for row in catalog.list() if (problem := self._check(row.id))]
        return [*problems, *self._orphans(catalog, repair), *self._stale_temps(repair)]

    def _open(self, *, create: bool = False) -> Catalog:
        path = self.folder / "catalog.sqlite3"
        with self._opening:
            if self._catalog is None:
                if not create and not path.exists():
                    return self._nothing
                make_folder(self.folder)
                self._catalog = Catalog(path)
            return self._catalog

    @functools.cached_property
    def _nothing(self) -> Catalog:
        """What a store that was never written to reads as; leaves nothing on disk."""
        return Catalog(":memory:")

    def _new_path(self, id: str) -> Path:
        digest = hashlib.sha256(check_id(id).encode()).hexdigest()[:32]
        return self.folder / "kv" / digest[:2] / f"{digest}-{secrets.token_hex(4)}.safetensors"

    def _read(self, id: str, read: Callable[[Path], _Read]) -> tuple[DocumentRow, _Read]:
        """A document's row and what `read` makes of its file, both of the same version."""
        row = self._open().require(id)
        for _ in range(_READ_TRIES):
            try:
                return row, read(self.folder / row.file)
            except FileNotFoundError:
                missing, row = row.file, self._open().require(id)
                if row.file == missing:
                    raise _MissingFileError(f"{self.folder / missing} of {id!r} is missing; add it again") from None
        raise StoreError(f"document {id!r} was replaced {_READ_TRIES} times while it was being read; try again")

    def _check(self, id: str) -> Problem | None:
        try:
            row, header = self._read(id, check_kv_file)
        except DocumentNotFoundError:  # deleted since the rows were listed
            return None
        except CorruptFileError as error:
            kind: ProblemKind = "missing-file" if isinstance(error, _MissingFileError) else "damaged-file"
            named = self._open().get(id)
            return Problem(kind, id, self.folder / named.file if named else None, str(error))
        if difference := _difference(row, header):
            path = self.folder / row.file
            return Problem("mismatched-file", id, path, f"{path} {difference}; add {id!r} again to replace it")
        return None

    def _orphans(self, catalog: Catalog, repair: bool) -> Iterator[Problem]:
        # Under the write lock nobody is between naming a file and committing its row: what no row names now,
        # none will. The reader of a version that was just replaced may still need its file, and reads the new one.
        with catalog.transaction():
            named = catalog.files()
            oldest = catalog.created_at().timestamp() - _CLOCK_SECONDS
            for path in sorted(self.folder.glob("kv/*/*.safetensors")):
                if path.relative_to(self.folder).as_posix() not in named:
                    with contextlib.suppress(FileNotFoundError):  # whoever replaced it removes it just now
                        yield _orphan(path, repair, ours=path.stat().st_mtime >= oldest)

    def _stale_temps(self, repair: bool) -> Iterator[Problem]:
        for path in sorted(self.folder.glob(f"kv/*/{TEMP_PREFIX}*")):
            with contextlib.suppress(FileNotFoundError):  # a put that is going on renames its own
                hours = (time.time() - path.stat().st_mtime) / 3600
                if hours > _STALE_HOURS:
                    removed = repair and _unlink(path)
                    message = f"{path} is temporary and {hours:.0f} h old: a crash left it behind; {_done(removed)}"
                    yield Problem("stale-temp", None, path, message, removed)

    def _unlink_unless_named(self, catalog: Catalog, id: str, path: Path) -> None:
        """Remove the file of a failed put, unless the failure came after its commit."""
        with contextlib.suppress(StoreError):  # then the catalog cannot tell, and the file is left for verify
            row = catalog.get(id)
            if row is None or self.folder / row.file != path:
                _unlink(path)


def _difference(row: DocumentRow, header: DocumentHeader) -> str | None:
    """In what a file's header disagrees with the row that names the file."""
    pairs = {
        "id": (row.id, header.id),
        "content hash": (row.content_hash, header.content_hash),
        "fingerprint": (row.fingerprint, header.fingerprint.digest),
        "compression": (row.compression, header.compression),
        "number of tokens": (row.tokens, header.tokens),
        "number of slots": (row.slots, header.slots),
    }
    different = [name for name, (ours, theirs) in pairs.items() if ours != theirs]
    return f"disagrees with its row in the {', '.join(different)}" if different else None


def _orphan(path: Path, repair: bool, *, ours: bool) -> Problem:
    """What to say of a file that no row names, and to do if a put into this catalog left it (`ours`)."""
    document = None
    with contextlib.suppress(CorruptFileError, PermissionError):
        document = read_header(path).id
    if not ours:  # its catalog was lost, and may be found again
        message = f"{path} has no row and is older than the catalog, which must have been replaced; kept"
        return Problem("orphan-file", document, path, message)
    removed = repair and _unlink(path)
    return Problem("orphan-file", document, path, f"{path} has no row: a crash left it; {_done(removed)}", removed)


def _unlink(path: Path) -> bool:
    """Remove a file that no row names. One that cannot be removed now, `verify` finds again: no reason to fail."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _done(removed: bool) -> str:
    return "removed" if removed else "verify(repair=True) removes it"
