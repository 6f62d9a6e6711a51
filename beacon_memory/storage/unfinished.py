"""Documents that are being read: the memories of their windows on disk, until the last one is there.

    <store>/unfinished/<hash of what decides them>/000000.safetensors  the memory of a window
    <store>/unfinished/<hash of what decides them>.lock                empty: held by who reads the document

So a document of any length takes the RAM of a few windows, and one that was interrupted goes on where it was. Nothing
is synced: what a power cut takes is read again, since a window whose hash does not fit is not there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from beacon_memory.errors import ConflictError, InputError, StoreError
from beacon_memory.kv.memory_kv import MemoryKV

from .files.durable import entries, identity, make_folder, refuse_links, share_file, status, sync_folder, unlink
from .files.locks import claimed
from .files.names import hash_id, new_temp, temps_in
from .files.tensor_file import tensor_bytes

__all__ = ["UnfinishedDocument", "erase_unfinished", "remove_unfinished", "stale_unfinished"]

_FOLDER = "unfinished"
_ENTRY = "beacon_memory"
_IDLE_SECONDS = 7 * 24 * 3600  # after which nobody will go on with it
_TENSORS = ("counts", "keys", "levels", "positions", "values")


class UnfinishedDocument:
    """The memories of the first windows of a document, on disk; a `WindowMemories`.

    root:    the folder of a store's namespace.
    decides: what decides the memories, in JSON: another text, model, method or ratio is another document.

    It is of one process at a time, up to `close` or `remove`: raises ConflictError if another has it. Raises StoreError
    if it cannot be read or written.
    """

    def __init__(self, root: Path, decides: Mapping[str, object]) -> None:
        name = hash_id(json.dumps(decides, sort_keys=True))
        self._folder = root / _FOLDER / name
        refuse_links(root, self._folder)
        make_folder(self._folder.parent, root)
        self._held = contextlib.ExitStack()
        if not self._held.enter_context(claimed(_lock_of(self._folder))):
            raise ConflictError(
                f"document {decides.get('id')!r} is being added by another process: wait until it is done, or stop it"
            )
        try:
            make_folder(self._folder, root)
            for temp in temps_in(self._folder):
                unlink(temp)
            self._count = 0
            while self._read(self._count) is not None:
                self._count += 1
        except BaseException:
            self._held.close()
            raise

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[MemoryKV]:
        return (self[number] for number in range(self._count))

    def __getitem__(self, number: int) -> MemoryKV:
        if not 0 <= number < self._count:
            raise IndexError(number)
        memory = self._read(number)
        if memory is None:
            raise StoreError(f"{self._path(number)} was damaged or removed while its document was read; add it again")
        return memory

    def append(self, memory: MemoryKV) -> None:
        """Write the memory of the next window."""
        memory = memory.to("cpu")
        tensors = {name: getattr(memory, name) for name in _TENSORS if getattr(memory, name) is not None}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        entry = json.dumps({"span": memory.span, "hash": _hash(tensors)})
        try:
            temp = new_temp(self._folder)
            save_file(tensors, temp, metadata={_ENTRY: entry})
            share_file(temp)  # a file of safetensors' own has taken the place of the one with the right permissions
            temp.replace(self._path(self._count))
        except (SafetensorError, OSError) as error:
            raise StoreError(f"the K/V of a window could not be written into {self._folder}: {error}") from error
        self._count += 1

    def close(self) -> None:
        """Leave the document to whoever goes on with it."""
        self._held.close()

    def remove(self) -> None:
        """Remove all of it."""
        try:
            _remove(self._folder)
        finally:
            self._held.close()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06}.safetensors"

    def _read(self, number: int) -> MemoryKV | None:
        """Read the memory of a window; None if there is none, or not as it was written."""
        try:
            with safe_open(self._path(number), framework="pt") as file:
                entry = json.loads((file.metadata() or {})[_ENTRY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            if entry["hash"] == _hash(tensors):
                return MemoryKV(**tensors, span=entry["span"])
        except (FileNotFoundError, SafetensorError, KeyError, ValueError, TypeError, InputError):
            return None
        except OSError as error:
            raise StoreError(f"{self._path(number)} cannot be read: {error}; see to the disk") from error
        return None


def stale_unfinished(root: Path) -> list[Path]:
    """Return what was left of documents that nobody has gone on with for a week; raises StoreError."""
    found = [Path(one.path) for one in entries(root / _FOLDER) if one.is_dir(follow_symlinks=False)]
    oldest = time.time() - _IDLE_SECONDS
    return [one for one in found if (at := status(one)) is not None and at.st_mtime < oldest]


def remove_unfinished(folder: Path) -> None:
    """Remove what was left of a document, unless somebody goes on with it now; raises StoreError."""
    with claimed(_lock_of(folder)) as held:
        if held:
            _remove(folder)


def erase_unfinished(root: Path) -> None:
    """Remove what was left of all documents, so that no power cut brings it back; raises StoreError."""
    if identity(root / _FOLDER):
        _remove(root / _FOLDER)
        try:
            sync_folder(root)
        except OSError as error:
            raise StoreError(f"{root} cannot be synced: {error.strerror}; see to the disk") from error


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{folder} cannot be removed: {error.strerror}; see to permissions, and try again") from error


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _hash(tensors: Mapping[str, Tensor]) -> str:
    hasher = xxhash.xxh3_128()
    for name in sorted(tensors):
        hasher.update(tensor_bytes(tensors[name]))
    return hasher.hexdigest()
