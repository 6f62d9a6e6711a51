"""Documents on the move: into one file and out of it again, or from store to store.

An archive is a plain tar file, without compression (K/V do not shrink):

    beacon-memory.json               format, and the number of documents that were asked for
    documents/<number>.safetensors   K/V and text as a store keeps them, see `kv_file`
    documents/<number>.json          the label, see `label_file`
    manifest.json                    for each of these its size and sha256, and a sha256 of the list

The manifest comes last, so an archive that was cut has none.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from beacon_memory.documents import Label, utc_now
from beacon_memory.errors import CorruptFileError, DocumentNotFoundError, InputError, StoreError
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.checked_json import json_checksum
from beacon_memory.storage.files.durable import make_folder, sync_file, sync_folder, unlink
from beacon_memory.storage.files.kv_file import StoredFile, read_kv_file, stage_kv_file
from beacon_memory.storage.files.label_file import StoredLabel, read_label, stage_label
from beacon_memory.storage.files.locks import writing
from beacon_memory.storage.files.names import new_temp

from .store import MemoryStore

__all__ = ["copy_documents", "export_documents", "import_documents"]

_FORMAT = 1
_HEAD, _MANIFEST = "beacon-memory.json", "manifest.json"
_MEMBER = re.compile(r"documents/\d{9}\.(safetensors|json)")
_TRIES = 5  # times that a document may be replaced while it is being read
_PIECE = 1 << 20  # bytes read at a time
_LISTED = 256  # bytes of a manifest for each file, at most

OnDocument = Callable[[str], None]
OnEvicted = Callable[[DocumentRow], None]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a manifest says of a file, and where in the archive it begins."""

    name: str
    start: int
    size: int
    sha256: str

    @property
    def listed(self) -> list[object]:
        """As the manifest has it."""
        return [self.name, self.size, self.sha256]


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
    entries: list[_Entry] = []
    try:
        # GNU: each file has one header and no more, however large it is
        with tarfile.open(temp, "w", format=tarfile.GNU_FORMAT) as tar:
            _add_json(tar, _HEAD, {"format": _FORMAT, "documents": len(chosen), "created_at": utc_now()})
            for number, id in enumerate(chosen):
                with _document_files(store, id, path.parent) as files:
                    entries += [_add(tar, f"documents/{number:09}{end}", file) for end, file in files.items()]
                on_document(id)
            listed = [entry.listed for entry in entries]
            _add_json(tar, _MANIFEST, {"files": listed, "sha256": json_checksum(listed)})
        sync_file(temp)
        temp.replace(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        unlink(temp)
    sync_folder(path.parent)
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
        pairs = _checked(file, path)
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
    """Row, file and text of one version."""
    for _ in range(_TRIES):
        row, file = store.read(id)
        text = store.text(id)
        if store.row(id).file == row.file:
            return row, file, text
    raise StoreError(f"document {id!r} was replaced {_TRIES} times while it was being read; try again")


@contextlib.contextmanager
def _document_files(store: MemoryStore, id: str, folder: Path) -> Iterator[dict[str, Path]]:
    """A document as the two files that an archive holds, written anew: older formats become the present one."""
    row, file, text = _read(store, id)
    with contextlib.ExitStack() as stack:
        kv = stage_kv_file(folder, file.header, file.kv, text)
        stack.callback(unlink, kv)
        label = stage_label(folder, StoredLabel(id, row.created_at, row.label))
        stack.callback(unlink, label)
        yield {".safetensors": kv, ".json": label}


def _add(tar: tarfile.TarFile, name: str, path: Path) -> _Entry:
    info = tarfile.TarInfo(name)
    info.size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        tar.addfile(info, file)
    return _Entry(name, 0, info.size, digest)


def _add_json(tar: tarfile.TarFile, name: str, value: object) -> None:
    data = json.dumps(value).encode()
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _members(file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """Name, start and size of each file of an archive. Raises TarError for all else that a tar file can hold.

    Python's own reader follows whatever headers say: it reads any length of them into memory, and even goes backwards.
    """
    end, place = os.fstat(file.fileno()).st_size, 0
    while True:
        file.seek(place)
        block = file.read(tarfile.BLOCKSIZE)
        if not any(block):  # two such blocks are the mark of the end
            return
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        start = place + tarfile.BLOCKSIZE
        if member.type != tarfile.REGTYPE:
            raise tarfile.ReadError(f"{member.name!r} is not a plain file")
        if not 0 <= member.size <= end - start:
            raise tarfile.ReadError(f"{member.name!r} claims {member.size} bytes, which are not there")
        yield member.name, start, member.size
        place = start + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _checked(file: IO[bytes], path: Path) -> list[tuple[_Entry, _Entry]]:
    """The K/V file and label of each document of an archive that is whole; reads all of it, and writes nothing."""
    found: list[_Entry] = []
    manifest: Any = None
    try:
        for number, (name, start, size) in enumerate(_members(file)):
            if number == 0 and name == _HEAD:
                head = _json(file, start, size, _PIECE)
                if not isinstance(head, dict) or head.get("format") != _FORMAT:
                    raise _corrupt(path, "it is of another format; upgrade beacon_memory, or export it again")
            elif number and manifest is None and name == _MANIFEST:
                manifest = _json(file, start, size, _LISTED * (len(found) + 1))
            elif number and manifest is None and _MEMBER.fullmatch(name):
                found.append(_Entry(name, start, size, _digest(file, start, size)))
            else:
                raise _corrupt(path, f"it holds {name!r}, which no export writes there")
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise _corrupt(path, str(error)) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; see to the disk") from error
    listed = [entry.listed for entry in found]
    if not isinstance(manifest, dict) or manifest != {"files": listed, "sha256": json_checksum(listed)}:
        raise _corrupt(path, "what it holds is not what its manifest lists, or it was cut")
    pairs = list(zip(found[::2], found[1::2], strict=False))
    numbered = [f"documents/{number:09}{end}" for number in range(len(pairs)) for end in (".safetensors", ".json")]
    if [entry.name for entry in found] != numbered:
        raise _corrupt(path, "its documents are not numbered as an export does it")
    return pairs


def _look_through(
    store: MemoryStore, file: IO[bytes], pairs: list[tuple[_Entry, _Entry]], path: Path, replace: bool
) -> None:
    """Raise for the first document that would be refused while others had been stored already."""
    ids, there = set(), []
    for pair in pairs:
        with _extracted(store, file, pair, path) as (stored, label):
            if label.id in ids:
                raise _corrupt(path, f"it holds {label.id!r} twice")
            if max((window.stop for window in stored.header.windows), default=0) > len(stored.text):
                raise _corrupt(path, f"a window of {label.id!r} ends after its text")
        ids.add(label.id)
        if not replace and label.id in store:
            there.append(label.id)
    if there:
        raise InputError(_there(there))


@contextlib.contextmanager
def _extracted(
    store: MemoryStore, file: IO[bytes], pair: tuple[_Entry, _Entry], path: Path
) -> Iterator[tuple[StoredFile, StoredLabel]]:
    """A document of an archive, read from temporary files."""
    staging = store.files.staging
    make_folder(staging)
    temps = [new_temp(staging) for _ in pair]
    try:
        try:
            for temp, entry in zip(temps, pair, strict=True):
                with temp.open("wb") as target:
                    target.writelines(_pieces(file, entry.start, entry.size))
        except OSError as error:
            raise StoreError(f"{path} cannot be extracted into {staging}: {error.strerror}") from error
        try:
            stored, label = read_kv_file(temps[0]), read_label(temps[1])
            _ = stored.text
        except CorruptFileError as error:
            raise _corrupt(path, f"{pair[0].name} cannot be read: {error}") from error
        if label.id != stored.header.id:
            raise _corrupt(path, f"{pair[0].name} is of {stored.header.id!r}, but its label of {label.id!r}")
        yield stored, label
    finally:
        for temp in temps:
            unlink(temp)


def _pieces(file: IO[bytes], start: int, size: int) -> Iterator[bytes]:
    """The bytes of a part of a file."""
    file.seek(start)
    while size:
        piece = file.read(min(size, _PIECE))
        if not piece:
            raise tarfile.ReadError("it ends too early")
        size -= len(piece)
        yield piece


def _json(file: IO[bytes], start: int, size: int, longest: int) -> Any:
    if size > longest:
        raise tarfile.ReadError(f"{size} bytes are too many for what it should say of its documents")
    return json.loads(b"".join(_pieces(file, start, size)))


def _digest(file: IO[bytes], start: int, size: int) -> str:
    hasher = hashlib.sha256()
    for piece in _pieces(file, start, size):
        hasher.update(piece)
    return hasher.hexdigest()


def _corrupt(path: Path, flaw: str) -> CorruptFileError:
    return CorruptFileError(f"{os.fspath(path)} cannot be imported: {flaw}")


def _there(ids: list[str]) -> str:
    named = ", ".join(map(repr, ids[:3])) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
    return f"{named} would replace stored documents: allow that with replace, or remove them first"
