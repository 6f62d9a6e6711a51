"""Move documents: export them into an archive, import them from one, or copy them from store to store.

With all documents go all conversations; with some, none.
"""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from beacon_memory.conversation import Conversation
from beacon_memory.documents import SESSION_TAG, Label, Text, utc_now
from beacon_memory.errors import CorruptFileError, DocumentNotFoundError, InputError, StoreError
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.checked_json import json_checksum
from beacon_memory.storage.files.conversation_file import read_conversation, stage_conversation
from beacon_memory.storage.files.durable import is_there, move_into_place, sync_file, unlink
from beacon_memory.storage.files.kv_file import StoredFile, read_kv_file, stage_kv_file
from beacon_memory.storage.files.label_file import StoredLabel, read_label, stage_label
from beacon_memory.storage.files.locks import alone
from beacon_memory.storage.files.names import new_temp, temps_in
from beacon_memory.storage.files.stored_kv import not_finite

from .archive_file import (
    FORMAT,
    HEAD,
    MANIFEST,
    Contents,
    Member,
    add_file,
    add_json,
    checked_contents,
    corrupt,
    pieces,
)
from .reading import READ_TRIES
from .records import label_of
from .store import MemoryStore, taken

__all__ = ["copy_documents", "export_documents", "import_documents"]

OnDocument = Callable[[str], None]
OnEvicted = Callable[[DocumentRow], None]
_Read = tuple[DocumentRow, StoredFile]


def export_documents(
    store: MemoryStore,
    path: Path,
    ids: Iterable[str] | None = None,
    *,
    on_document: OnDocument = lambda _: None,
    on_gone: OnDocument = lambda _: None,
) -> int:
    """Write documents, or all with all conversations, into a new archive; returns how many documents.

    `path` appears when it is whole.

    Others may go on writing. Each document is exported as it is when its turn comes, under the id that it has then, and
    a conversation together with its documents.

    on_gone: called with the id of each document that was removed, or has expired, before its turn.

    Raises InputError if `path` exists, DocumentNotFoundError or CorruptFileError; then nothing is left behind.
    """
    chosen = _chosen(store, ids)
    done: set[str] = set()
    entries: list[Member] = []
    with _workshop(path) as folder:
        temp = new_temp(folder)
        try:
            # GNU: each file has one header and no more, however large it is
            with tarfile.open(temp, "w", format=tarfile.GNU_FORMAT) as tar:

                def add(row: DocumentRow, file: StoredFile) -> None:
                    with _document_files(row, file, folder) as files:
                        entries.extend(add_file(tar, f"documents/{len(done):09}{end}", files[end]) for end in files)
                    done.add(row.id)
                    on_document(row.id)

                add_json(tar, HEAD, {"format": FORMAT, "documents": len(chosen), "created_at": utc_now()})
                for number, (conversation, own) in enumerate(_conversations(store) if ids is None else ()):
                    for document in own:
                        add(*document)
                    with _staged(stage_conversation(folder, conversation)) as staged:
                        entries.append(add_file(tar, f"conversations/{number:09}.json", staged))
                for document in _documents(store, [row for row in chosen if row.id not in done], on_gone):
                    add(*document)
                listed = [entry.listed for entry in entries]
                add_json(tar, MANIFEST, {"files": listed, "sha256": json_checksum(listed)})
            sync_file(temp)
            move_into_place(temp, path)
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error
    return len(done)


def import_documents(
    store: MemoryStore,
    path: Path,
    *,
    replace: bool = False,
    on_document: OnDocument = lambda _: None,
    on_evicted: OnEvicted = lambda _: None,
) -> int:
    """Take all documents and conversations of an archive into a store; returns how many documents.

    The archive is read in full, and each of its documents as `store.get` would, before anything is changed. replace:
    let them take the place of stored ones. on_evicted: see `MemoryStore.put`.

    Raises CorruptFileError for an archive that is damaged, cut or not made by an export, InputError if one of them is
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
        contents = checked_contents(file, path)
        pairs = _look_through(store, file, contents, path, replace)
        grouped: dict[str, list[str]] = {}
        for id in pairs:
            grouped.setdefault(id.rpartition("/")[0], []).append(id)

        def put(ids: Iterable[str]) -> None:
            for id in ids:
                with _extracted_document(store, file, pairs[id], path) as (stored, label):
                    _put(store, stored, label.label, label.created_at, replace, on_evicted)
                on_document(id)

        for member in contents.conversations:
            conversation = _extracted_conversation(store, file, member, path)
            with store.conversations.alone(conversation.id):
                put(grouped.pop(conversation.id, ()))
                _put_conversation(store, conversation, replace)
        for ids in grouped.values():
            put(ids)
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
    """Copy documents, or all with all conversations, into another store or namespace; returns how many documents.

    on_gone:    see `export_documents`.
    on_evicted: see `MemoryStore.put`.

    Raises DocumentNotFoundError, or InputError for what the target has and must not be replaced; both before anything
    is copied, unless it was stored there meanwhile: then documents before it are copied.
    """
    if source.folder.resolve() == target.folder.resolve():
        raise InputError(f"{source.folder} cannot be copied into itself; name another store or namespace")
    rows = _chosen(source, ids)
    if not replace and (there := [row.id for row in rows if row.id in target]):
        raise taken(there)
    if ids is None and not replace:
        _require_new(target, source.conversations.ids())
    done: set[str] = set()

    def put(row: DocumentRow, file: StoredFile) -> None:
        _put(target, file, row.label, row.created_at, replace, on_evicted)
        done.add(row.id)
        on_document(row.id)

    for conversation, own in _conversations(source) if ids is None else ():
        with target.conversations.alone(conversation.id):
            for document in own:
                put(*document)
            _put_conversation(target, conversation, replace)
    for document in _documents(source, [row for row in rows if row.id not in done], on_gone):
        put(*document)
    return len(done)


def _put(
    store: MemoryStore,
    file: StoredFile,
    label: Label,
    created_at: str,
    replace: bool,
    on_evicted: OnEvicted,
) -> None:
    store.put(
        file.header,
        file.kv,
        file.text,
        label,
        precision="as-is",
        created_at=created_at,
        only_new=not replace,
        on_evicted=on_evicted,
    )


def _put_conversation(store: MemoryStore, conversation: Conversation, replace: bool) -> None:
    """Store a conversation; nobody else may be changing it."""
    if not replace:
        _require_new(store, [conversation.id])
    store.conversations.put(conversation)


def _require_new(store: MemoryStore, conversations: Iterable[str]) -> None:
    """Raise InputError if the store has one of these conversations."""
    if there := [id for id in conversations if store.conversations.get(id) is not None]:
        raise taken(there, "conversations")


def _chosen(store: MemoryStore, ids: Iterable[str] | None) -> list[DocumentRow]:
    """Return the rows of documents, each once, or of all; raises DocumentNotFoundError."""
    return store.list() if ids is None else [store.row(id) for id in dict.fromkeys(ids)]


def _conversations(store: MemoryStore) -> Iterator[tuple[Conversation, list[_Read]]]:
    """Read all conversations, each with its documents as they are at one moment."""
    for id in store.conversations.ids():
        for _ in range(READ_TRIES):
            conversation, own = store.conversations.get(id), []
            for one in reversed(conversation.document_ids if conversation else ()):
                # The last first: a fold writes it last, and tells by it whether all is folded
                with contextlib.suppress(DocumentNotFoundError):
                    if one in store and SESSION_TAG in (document := store.read(one))[0].tags:
                        own.append(document)
            if store.conversations.get(id) == conversation:
                break
        else:
            raise StoreError(f"the conversation {id!r} was changed {READ_TRIES} times while it was read; try again")
        if conversation is not None:
            yield conversation, own[::-1]


def _documents(store: MemoryStore, rows: list[DocumentRow], on_gone: OnDocument) -> Iterator[_Read]:
    """Read documents, each as it is when its turn comes; one that was renamed meanwhile has its new id by then.

    It is known by its text and its time of creation, which a new id does not change.
    """
    done: set[str] = set()
    gone: dict[tuple[str, str], str] = {}
    while rows:
        for row in rows:
            try:
                now, file = store.read(row.id)
            except DocumentNotFoundError:
                gone[row.content_hash, row.created_at] = row.id
                continue
            gone.pop((row.content_hash, row.created_at), None)
            done.add(row.id)
            yield now, file
        found = store.list() if gone else []
        rows = [row for row in found if row.id not in done and (row.content_hash, row.created_at) in gone]
    for id in gone.values():
        on_gone(id)


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
            # what cannot be removed now is by the next export: it does not make this one fail
            with contextlib.suppress(StoreError):
                for left in (*temps_in(folder), lock):
                    unlink(left)
            with contextlib.suppress(OSError):  # of somebody who has put something of their own there
                folder.rmdir()


@contextlib.contextmanager
def _document_files(row: DocumentRow, file: StoredFile, folder: Path) -> Iterator[dict[str, Path]]:
    """Write a document into the two files that an archive holds."""
    with (
        _staged(stage_kv_file(folder, file.header, file.kv, Text(file.text)).path) as kv,
        _staged(stage_label(folder, label_of(row, file.header.namespace))) as label,
    ):
        yield {".safetensors": kv, ".json": label}


@contextlib.contextmanager
def _staged(temp: Path) -> Iterator[Path]:
    """Remove a temporary file in the end."""
    try:
        yield temp
    finally:
        unlink(temp)


def _look_through(
    store: MemoryStore, file: IO[bytes], contents: Contents, path: Path, replace: bool
) -> dict[str, tuple[Member, Member]]:
    """Raise for the first document or conversation that would be refused while others had been stored already.

    Returns the documents by their ids.
    """
    pairs, there = {}, []
    for pair in contents.documents:
        with _extracted_document(store, file, pair, path) as (stored, label):
            if label.id in pairs:
                raise corrupt(path, f"it holds {label.id!r} twice")
            if flaw := not_finite(stored.kv):
                raise corrupt(path, f"{label.id!r} cannot be stored: {flaw}")
            if max((window.stop for window in stored.header.windows), default=0) > len(stored.text):
                raise corrupt(path, f"a window of {label.id!r} ends after its text")
        pairs[label.id] = pair
        if not replace and label.id in store:
            there.append(label.id)
    if there:
        raise taken(there)
    ids: set[str] = set()
    for member in contents.conversations:
        conversation = _extracted_conversation(store, file, member, path)
        if conversation.id in ids:
            raise corrupt(path, f"it holds the conversation {conversation.id!r} twice")
        ids.add(conversation.id)
    if not replace:
        _require_new(store, sorted(ids))
    return pairs


@contextlib.contextmanager
def _extracted_document(
    store: MemoryStore, file: IO[bytes], pair: tuple[Member, Member], path: Path
) -> Iterator[tuple[StoredFile, StoredLabel]]:
    """Copy a document of an archive into temporary files, and read it from there."""
    with _extracted(store, file, pair, path) as temps:
        try:
            stored, label = read_kv_file(temps[0]), read_label(temps[1])
        except CorruptFileError as error:
            raise corrupt(path, f"{pair[0].name} cannot be read: {error}") from error
        if stored.behind:
            raise corrupt(path, f"{pair[0].name} is a segment of a document, not a whole one")
        of_file, of_label = ((one.namespace, one.id) for one in (stored.header, label))
        if of_file != of_label:
            raise corrupt(path, f"{pair[0].name} is of {of_file!r}, but its label of {of_label!r}")
        yield stored, label


def _extracted_conversation(store: MemoryStore, file: IO[bytes], member: Member, path: Path) -> Conversation:
    """Copy a conversation of an archive into a temporary file, and read it from there."""
    with _extracted(store, file, [member], path) as (temp,):
        try:
            return read_conversation(temp)[0]
        except CorruptFileError as error:
            raise corrupt(path, f"{member.name} cannot be read: {error}") from error


@contextlib.contextmanager
def _extracted(store: MemoryStore, file: IO[bytes], members: Sequence[Member], path: Path) -> Iterator[list[Path]]:
    """Copy files of an archive into temporary ones."""
    store.parts.make_folder()
    temps: list[Path] = []
    with store.parts.locks.writing(), contextlib.ExitStack() as extracted:  # nobody sweeps what is being extracted
        staging = store.files.make_staging()
        for _ in members:
            temps.append(new_temp(staging))
            extracted.callback(unlink, temps[-1])
        try:
            for temp, entry in zip(temps, members, strict=True):
                with temp.open("wb") as target:
                    target.writelines(pieces(file, entry.start, entry.size))
        except OSError as error:
            raise StoreError(f"{path} cannot be extracted into {staging}: {error.strerror}") from error
        yield temps
