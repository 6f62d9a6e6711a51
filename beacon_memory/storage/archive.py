"""Move documents: export them into an archive, import them from one, or copy them from store to store."""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from beacon_memory.documents import Label, Text, utc_now
from beacon_memory.errors import CorruptFileError, DocumentNotFoundError, InputError, StoreError
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.checked_json import json_checksum
from beacon_memory.storage.files.durable import make_folder, move_into_place, sync_file, unlink
from beacon_memory.storage.files.kv_file import StoredFile, read_kv_file, stage_kv_file
from beacon_memory.storage.files.label_file import StoredLabel, read_label, stage_label
from beacon_memory.storage.files.locks import writing
from beacon_memory.storage.files.names import new_temp

from .archive_file import FORMAT, HEAD, MANIFEST, Member, add_file, add_json, checked_documents, corrupt, pieces
from .reading import READ_TRIES
from .store import MemoryStore

__all__ = ["copy_documents", "export_documents", "import_documents"]

OnDocument = Callable[[str], None]
OnEvicted = Callable[[DocumentRow], None]


def export_documents(
    store: MemoryStore, path: Path, ids: Iterable[str] | None = None, on_document: OnDocument = lambda _: None
) -> int:
    """Write documents, or all, into a new archive; returns how many. `path` appears when it is whole.

    Raises InputError if `path` exists, DocumentNotFoundError or CorruptFileError; then nothing is left behind.
    """
    if os.path.lexists(path):
        raise InputError(f"{path} exists; remove it, or choose another name")
    chosen = [row.id for row in store.list()] if ids is None else [store.row(id).id for id in dict.fromkeys(ids)]
    make_folder(path.parent)
    temp = new_temp(path.parent)
    entries: list[Member] = []
    try:
        # GNU: each file has one header and no more, however large it is
        with tarfile.open(temp, "w", format=tarfile.GNU_FORMAT) as tar:
            add_json(tar, HEAD, {"format": FORMAT, "documents": len(chosen), "created_at": utc_now()})
            for number, id in enumerate(chosen):
                with _document_files(store, id, path.parent) as files:
                    entries += [add_file(tar, f"documents/{number:09}{end}", file) for end, file in files.items()]
                on_document(id)
            listed = [entry.listed for entry in entries]
            add_json(tar, MANIFEST, {"files": listed, "sha256": json_checksum(listed)})
        sync_file(temp)
        move_into_place(temp, path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        unlink(temp)
    return len(chosen)


def import_documents(
    store: MemoryStore,
    path: Path,
    *,
    replace: bool = False,
    on_document: OnDocument = lambda _: None,
    on_evicted: OnEvicted = lambda _: None,
) -> int:
    """Take all documents of an archive into a store; returns how many.

    The archive is read in full, and each of its documents as `store.get` would, before anything is changed. replace:
    let documents take the place of stored ones. on_evicted: see `MemoryStore.put`.

    Raises CorruptFileError for an archive that is damaged, cut or not made by an export, InputError if a document is
    there already and must not be replaced; then nothing has changed. What the store refuses, for want of room or quota,
    ends the import: documents before it stay.
    """
    if not path.is_file():
        raise StoreError(f"{path} is not there, or no file; name an archive that an export has written")
    try:
        file = path.open("rb")
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; see to its permissions") from error
    with file, writing(store.folder):  # nobody sweeps what is being extracted
        pairs = checked_documents(file, path)
        _look_through(store, file, pairs, path, replace)
        for pair in pairs:
            with _extracted(store, file, pair, path) as (stored, label):
                _put(store, stored, stored.text, label.label, label.created_at, on_evicted)
            on_document(label.id)
    return len(pairs)


def copy_documents(
    source: MemoryStore,
    target: MemoryStore,
    ids: Iterable[str] | None = None,
    *,
    replace: bool = False,
    on_document: OnDocument = lambda _: None,
    on_evicted: OnEvicted = lambda _: None,
) -> int:
    """Copy documents, or all, into another store or namespace; returns how many. on_evicted: see `MemoryStore.put`.

    Raises DocumentNotFoundError, or InputError for a document that the target has and must not be replaced; both before
    anything is copied.
    """
    if source.folder.resolve() == target.folder.resolve():
        raise InputError(f"{source.folder} cannot be copied into itself; name another store or namespace")
    rows = source.list() if ids is None else [source.row(id) for id in dict.fromkeys(ids)]
    if not replace and (there := [row.id for row in rows if row.id in target]):
        raise InputError(_there(there))
    copied = 0
    for row in rows:
        with contextlib.suppress(DocumentNotFoundError):  # removed since they were listed
            now, file, text = _read(source, row.id)
            _put(target, file, text, now.label, now.created_at, on_evicted)
            copied += 1
            on_document(row.id)
    return copied


def _put(store: MemoryStore, file: StoredFile, text: str, label: Label, created_at: str, on_evicted: OnEvicted) -> None:
    store.put(file.header, file.kv, text, label, precision="as-is", created_at=created_at, on_evicted=on_evicted)


def _read(store: MemoryStore, id: str) -> tuple[DocumentRow, StoredFile, str]:
    """Read row, file and text of one version of a document."""
    for _ in range(READ_TRIES):
        row, file = store.read(id)
        text = store.text(id)
        if store.row(id).file == row.file:
            return row, file, text
    raise StoreError(f"document {id!r} was replaced {READ_TRIES} times while it was being read; try again")


@contextlib.contextmanager
def _document_files(store: MemoryStore, id: str, folder: Path) -> Iterator[dict[str, Path]]:
    """Write a document into the two files that an archive holds; older formats become the present one."""
    row, file, text = _read(store, id)
    with contextlib.ExitStack() as stack:
        kv = stage_kv_file(folder, file.header, file.kv, Text(text))
        stack.callback(unlink, kv)
        label = stage_label(folder, StoredLabel(id, row.created_at, row.label))
        stack.callback(unlink, label)
        yield {".safetensors": kv, ".json": label}


def _look_through(
    store: MemoryStore, file: IO[bytes], pairs: list[tuple[Member, Member]], path: Path, replace: bool
) -> None:
    """Raise for the first document that would be refused while others had been stored already."""
    ids, there = set(), []
    for pair in pairs:
        with _extracted(store, file, pair, path) as (stored, label):
            if label.id in ids:
                raise corrupt(path, f"it holds {label.id!r} twice")
            if max((window.stop for window in stored.header.windows), default=0) > len(stored.text):
                raise corrupt(path, f"a window of {label.id!r} ends after its text")
        ids.add(label.id)
        if not replace and label.id in store:
            there.append(label.id)
    if there:
        raise InputError(_there(there))


@contextlib.contextmanager
def _extracted(
    store: MemoryStore, file: IO[bytes], pair: tuple[Member, Member], path: Path
) -> Iterator[tuple[StoredFile, StoredLabel]]:
    """Copy a document of an archive into temporary files, and read it from there."""
    staging = store.files.staging
    make_folder(staging)
    temps = [new_temp(staging) for _ in pair]
    try:
        try:
            for temp, entry in zip(temps, pair, strict=True):
                with temp.open("wb") as target:
                    target.writelines(pieces(file, entry.start, entry.size))
        except OSError as error:
            raise StoreError(f"{path} cannot be extracted into {staging}: {error.strerror}") from error
        try:
            stored, label = read_kv_file(temps[0]), read_label(temps[1])
            _ = stored.text
        except CorruptFileError as error:
            raise corrupt(path, f"{pair[0].name} cannot be read: {error}") from error
        if label.id != stored.header.id:
            raise corrupt(path, f"{pair[0].name} is of {stored.header.id!r}, but its label of {label.id!r}")
        yield stored, label
    finally:
        for temp in temps:
            unlink(temp)


def _there(ids: list[str]) -> str:
    named = ", ".join(map(repr, ids[:3])) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
    return f"{named} would replace stored documents: allow that with replace, or remove them first"
