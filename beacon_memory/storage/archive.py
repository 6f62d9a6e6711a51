"""Move documents: export them into an archive, import them from one, or copy them from store to store."""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from beacon_memory.documents import Label, Text, utc_now
from beacon_memory.errors import CorruptFileError, DocumentNotFoundError, InputError, StoreError
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.checked_json import json_checksum
from beacon_memory.storage.files.durable import is_there, move_into_place, sync_file, unlink
from beacon_memory.storage.files.kv_file import StoredFile, read_kv_file, stage_kv_file
from beacon_memory.storage.files.label_file import StoredLabel, read_label, stage_label
from beacon_memory.storage.files.locks import alone, writing
from beacon_memory.storage.files.names import new_temp, temps_in
from beacon_memory.storage.files.stored_kv import not_finite

from .archive_file import FORMAT, HEAD, MANIFEST, Member, add_file, add_json, checked_documents, corrupt, pieces
from .reading import READ_TRIES
from .records import label_of
from .store import MemoryStore, taken

__all__ = ["copy_documents", "export_documents", "import_documents"]

OnDocument = Callable[[str], None]
OnEvicted = Callable[[DocumentRow], None]


def export_documents(
    store: MemoryStore,
    path: Path,
    ids: Iterable[str] | None = None,
    *,
    on_document: OnDocument = lambda _: None,
    on_gone: OnDocument = lambda _: None,
) -> int:
    """Write documents, or all, into a new archive; returns how many. `path` appears when it is whole.

    Others may go on writing. Each document is exported as it is when its turn comes, under the id that it has then.

    on_gone: called with the id of each document that was removed, or has expired, before its turn.

    Raises InputError if `path` exists, DocumentNotFoundError or CorruptFileError; then nothing is left behind.
    """
    chosen = _chosen(store, ids)
    count = 0
    entries: list[Member] = []
    with _workshop(path) as folder:
        temp = new_temp(folder)
        try:
            # GNU: each file has one header and no more, however large it is
            with tarfile.open(temp, "w", format=tarfile.GNU_FORMAT) as tar:
                add_json(tar, HEAD, {"format": FORMAT, "documents": len(chosen), "created_at": utc_now()})
                for row, file, text in _documents(store, chosen, on_gone):
                    with _document_files(row, file, text, folder) as files:
                        entries += [add_file(tar, f"documents/{count:09}{end}", one) for end, one in files.items()]
                    count += 1
                    on_document(row.id)
                listed = [entry.listed for entry in entries]
                add_json(tar, MANIFEST, {"files": listed, "sha256": json_checksum(listed)})
            sync_file(temp)
            move_into_place(temp, path)
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error
    return count


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
    or since another one was stored under its id meanwhile, ends the import: documents before it stay.
    """
    try:
        if not path.is_file():
            raise StoreError(f"{path} is not there, or no file; name an archive that an export has written")
        file = path.open("rb")
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; see to its permissions") from error
    with file:
        pairs = checked_documents(file, path)
        _look_through(store, file, pairs, path, replace)
        for pair in pairs:
            with _extracted(store, file, pair, path) as (stored, label):
                _put(store, stored, stored.text, label.label, label.created_at, replace, on_evicted)
            on_document(label.id)
    return len(pairs)


def copy_documents(
    source: MemoryStore,
    target: MemoryStore,
    ids: Iterable[str] | None = None,
    *,
    replace: bool = False,
    on_document: OnDocument = lambda _: None,
    on_gone: OnDocument = lambda _: None,
    on_evicted: OnEvicted = lambda _: None,
) -> int:
    """Copy documents, or all, into another store or namespace; returns how many.

    on_gone:    see `export_documents`.
    on_evicted: see `MemoryStore.put`.

    Raises DocumentNotFoundError, or InputError for a document that the target has and must not be replaced; both before
    anything is copied, unless it was stored there meanwhile: then documents before it are copied.
    """
    if source.folder.resolve() == target.folder.resolve():
        raise InputError(f"{source.folder} cannot be copied into itself; name another store or namespace")
    rows = _chosen(source, ids)
    if not replace and (there := [row.id for row in rows if row.id in target]):
        raise taken(there)
    copied = 0
    for row, file, text in _documents(source, rows, on_gone):
        _put(target, file, text, row.label, row.created_at, replace, on_evicted)
        copied += 1
        on_document(row.id)
    return copied


def _put(
    store: MemoryStore,
    file: StoredFile,
    text: str,
    label: Label,
    created_at: str,
    replace: bool,
    on_evicted: OnEvicted,
) -> None:
    store.put(
        file.header,
        file.kv,
        text,
        label,
        precision="as-is",
        created_at=created_at,
        only_new=not replace,
        on_evicted=on_evicted,
    )


def _chosen(store: MemoryStore, ids: Iterable[str] | None) -> list[DocumentRow]:
    """Return the rows of documents, each once, or of all; raises DocumentNotFoundError."""
    return store.list() if ids is None else [store.row(id) for id in dict.fromkeys(ids)]


def _documents(
    store: MemoryStore, rows: list[DocumentRow], on_gone: OnDocument
) -> Iterator[tuple[DocumentRow, StoredFile, str]]:
    """Read documents, each as it is when its turn comes; one that was renamed meanwhile has its new id by then.

    It is known by its text and its time of creation, which a new id does not change.
    """
    done: set[str] = set()
    gone: dict[tuple[str, str], str] = {}
    while rows:
        for row in rows:
            try:
                now, file, text = _read(store, row.id)
            except DocumentNotFoundError:
                gone[row.content_hash, row.created_at] = row.id
                continue
            gone.pop((row.content_hash, row.created_at), None)
            done.add(row.id)
            yield now, file, text
        found = store.list() if gone else []
        rows = [row for row in found if row.id not in done and (row.content_hash, row.created_at) in gone]
    for id in gone.values():
        on_gone(id)


def _read(store: MemoryStore, id: str) -> tuple[DocumentRow, StoredFile, str]:
    """Read row, file and text of one version of a document."""
    for _ in range(READ_TRIES):
        row, file = store.read(id)
        if file.text_bytes is not None:
            return row, file, file.text
        text = store.text(id)  # of an old format
        if store.row(id).file == row.file:
            return row, file, text
    raise StoreError(f"document {id!r} was replaced {READ_TRIES} times while it was being read; try again")


@contextlib.contextmanager
def _workshop(path: Path) -> Iterator[Path]:
    """Make a private folder, `<path>.part`, for what becomes the file `path`; it is gone afterwards.

    What a killed process left in it is removed. Raises InputError if `path` exists.
    """
    folder = path.with_name(f"{path.name}.part")
    lock = folder / "export.lock"
    if is_there(path):
        raise InputError(f"{path} exists; remove it, or choose another name")
    with alone(lock, f"{path} is being exported by another"):
        if is_there(path):
            raise InputError(f"{path} has been exported by another meanwhile; choose another name")
        try:
            for temp in temps_in(folder):
                unlink(temp)
            yield folder
        finally:
            for left in (*temps_in(folder), lock):
                unlink(left)
            with contextlib.suppress(OSError):  # of somebody who has put something of their own there
                folder.rmdir()


@contextlib.contextmanager
def _document_files(row: DocumentRow, file: StoredFile, text: str, folder: Path) -> Iterator[dict[str, Path]]:
    """Write a document into the two files that an archive holds; older formats become the present one."""
    with contextlib.ExitStack() as stack:
        kv = stage_kv_file(folder, file.header, file.kv, Text(text))
        stack.callback(unlink, kv)
        label = stage_label(folder, label_of(row))
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
            if flaw := not_finite(stored.kv):
                raise corrupt(path, f"{label.id!r} cannot be stored: {flaw}")
            if max((window.stop for window in stored.header.windows), default=0) > len(stored.text):
                raise corrupt(path, f"a window of {label.id!r} ends after its text")
        ids.add(label.id)
        if not replace and label.id in store:
            there.append(label.id)
    if there:
        raise taken(there)


@contextlib.contextmanager
def _extracted(
    store: MemoryStore, file: IO[bytes], pair: tuple[Member, Member], path: Path
) -> Iterator[tuple[StoredFile, StoredLabel]]:
    """Copy a document of an archive into temporary files, and read it from there."""
    store.parts.make_folder()
    temps: list[Path] = []
    with writing(store.folder), contextlib.ExitStack() as extracted:  # nobody sweeps what is being extracted
        staging = store.files.make_staging()
        for _ in pair:
            temps.append(new_temp(staging))
            extracted.callback(unlink, temps[-1])
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
