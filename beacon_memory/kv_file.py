"""One document's K/V as one file that describes itself.

A file is a safetensors file with the tensors `keys` and `values`, [layers, kv_heads, slots, head_dim], keys before
RoPE, and one metadata entry `beacon_memory`, a JSON object:

    format    version of this form, an integer
    header    a DocumentHeader
    tensors   dtype and shape of keys and of values, and the sha256 of both
    sha256    of the three above, so that a damaged header is noticed whenever it is read

Files are never changed in place: `stage_kv_file` writes and syncs a temporary file, `publish` renames it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .document import check_id, utc_now
from .durable import make_folder, sync_file, sync_folder
from .errors import CorruptFileError, InputError, StoreError
from .fingerprint import Fingerprint
from .kv import BeaconKV

__all__ = [
    "FORMAT_VERSION",
    "TEMP_PREFIX",
    "DocumentHeader",
    "WindowSpan",
    "check_kv_file",
    "publish",
    "read_header",
    "read_kv_file",
    "stage_kv_file",
    "write_kv_file",
]

FORMAT_VERSION = 1
TEMP_PREFIX = ".tmp"  # safetensors names its own temporary files so, too: one pattern finds what a crash left
_ENTRY = "beacon_memory"
_REMEDY = "run `beacon-memory verify` to list every damaged file, and add the document again to replace this one"


@dataclass(frozen=True, slots=True)
class WindowSpan:
    """One window of a document.

    tokens: raw tokens in this window
    ratio:  raw tokens per beacon; 0: the window is kept raw, one slot a token
    start, stop: where in the text the window lies, in characters
    """

    tokens: int
    ratio: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        for name in ("tokens", "ratio", "start", "stop"):
            _check_count(f"a window's {name}", getattr(self, name))
        if self.stop < self.start:
            raise InputError(f"a window's stop {self.stop} lies before its start {self.start}")

    @property
    def slots(self) -> int:
        """Memory slots that the window takes; its last, incomplete unit has a beacon as well."""
        return -(-self.tokens // self.ratio) if self.ratio else self.tokens


@dataclass(frozen=True, slots=True)
class DocumentHeader:
    """What a file says of its document.

    id, content_hash: the document, and the sha256 of its text in hexadecimal
    tokens:      raw tokens of the text
    windows:     in the order of the text, the last and perhaps incomplete one included
    tail_ids:    raw token ids of the last window if it is incomplete, so that `append` can go on where the text
                 stopped; empty if it is full
    fingerprint: of the model, adapter and settings that made the K/V
    created_at:  when they were made, ISO 8601, UTC
    """

    id: str
    content_hash: str
    tokens: int
    windows: tuple[WindowSpan, ...]
    tail_ids: tuple[int, ...]
    fingerprint: Fingerprint
    created_at: str = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        check_id(self.id)
        for name in ("content_hash", "created_at"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} must be a text, got {getattr(self, name)!r}")
        _check_count("tokens", self.tokens)
        for token in self.tail_ids:
            _check_count("a token id of tail_ids", token)
        if self.tokens != sum(window.tokens for window in self.windows):
            raise InputError(
                f"tokens is {self.tokens}, but the windows hold {sum(window.tokens for window in self.windows)}"
            )
        if self.tail_ids and (not self.windows or len(self.tail_ids) != self.windows[-1].tokens):
            raise InputError(
                f"tail_ids has {len(self.tail_ids)} tokens, but the last window holds "
                f"{self.windows[-1].tokens if self.windows else 0}; give all of them, or none if the window is full"
            )

    @property
    def slots(self) -> int:
        """Memory slots of all windows together."""
        return sum(window.slots for window in self.windows)

    @property
    def ratios(self) -> tuple[int, ...]:
        """The different ratios of the windows, ascending."""
        return tuple(sorted({window.ratio for window in self.windows}))

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> DocumentHeader:
        """Read what `dataclasses.asdict` gave; raises InputError, TypeError or CorruptFileError for anything else."""
        read: dict[str, Any] = {
            "windows": tuple(WindowSpan(**window) for window in stored.get("windows", ())),
            "tail_ids": tuple(stored.get("tail_ids", ())),
            "fingerprint": Fingerprint.from_dict(stored.get("fingerprint", {})),
        }
        if missing := {"windows", "tail_ids", "created_at"} - set(stored):
            raise InputError(f"the header has no {', '.join(sorted(missing))}")
        return cls(**{**stored, **read})


def write_kv_file(path: Path, header: DocumentHeader, kv: BeaconKV) -> None:
    """Write a document's K/V to `path`, whole or not at all, replacing what is there."""
    publish(stage_kv_file(path.parent, header, kv), path)


def stage_kv_file(folder: Path, header: DocumentHeader, kv: BeaconKV) -> Path:
    """Write a temporary file into `folder`, created if missing, and sync it to disk; `publish` gives it its name.

    Raises InputError if `kv` has not the slots that the header's windows take, StoreError if the file cannot be
    written. Nothing is left behind then.
    """
    if kv.slots != header.slots:
        raise InputError(f"the windows of {header.id!r} take {header.slots} slots, but its K/V have {kv.slots}")
    if kv.keys.dtype != kv.values.dtype:
        raise InputError(f"keys and values must have one dtype, got {kv.keys.dtype} and {kv.values.dtype}")
    keys = kv.keys.detach().to("cpu").contiguous()
    values = kv.values.detach().to("cpu").contiguous()
    if keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr():
        values = values.clone()  # safetensors refuses tensors that overlap in memory
    described = {"format": FORMAT_VERSION, "header": asdict(header), "tensors": _describe(keys, values)}
    entry = json.dumps({**described, "sha256": _seal(described)})
    make_folder(folder)
    temp = folder / f"{TEMP_PREFIX}-{secrets.token_hex(8)}"
    try:
        save_file({"keys": keys, "values": values}, temp, metadata={_ENTRY: entry})
        # safetensors creates files that only their owner may read; a store is as open as its folder
        temp.chmod(folder.stat().st_mode & 0o666)
        sync_file(temp)
    except BaseException as error:
        temp.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise StoreError(f"the K/V of {header.id!r} could not be written into {folder}: {error}") from error
        raise
    return temp


def publish(temp: Path, path: Path) -> None:
    """Give a staged file its name, at once and durably; if that fails the staged file is removed."""
    try:
        temp.replace(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_header(path: Path) -> DocumentHeader:
    """Read what a file says of its document, not its tensors.

    This and the other readers raise CorruptFileError, naming the file and what is wrong, for anything that
    `write_kv_file` did not write, and let FileNotFoundError through.
    """
    with _opened(path, "cpu") as (_, header, _):
        return header


def read_kv_file(path: Path, device: torch.device | str = "cpu") -> tuple[DocumentHeader, BeaconKV]:
    """Read a document's header and its K/V, onto `device`. Damage inside the tensors is left to `check_kv_file`."""
    with _opened(path, device) as (file, header, tensors):
        kv = BeaconKV(file.get_tensor("keys"), file.get_tensor("values"))
        if {str(kv.keys.dtype), str(kv.values.dtype)} != {tensors["dtype"]}:
            raise _corrupt(path, f"its tensors are {kv.keys.dtype} and {kv.values.dtype}, not {tensors['dtype']}")
        return header, kv


def check_kv_file(path: Path) -> DocumentHeader:
    """Read a whole file and compare every byte of its tensors with the digest taken when it was written."""
    with _opened(path, "cpu") as (file, header, tensors):
        if _describe(file.get_tensor("keys"), file.get_tensor("values")) != tensors:
            raise _corrupt(path, "its tensors are not those that were written: their digest differs")
        return header


@contextlib.contextmanager
def _opened(path: Path, device: torch.device | str) -> Iterator[tuple[Any, DocumentHeader, dict[str, Any]]]:
    """An open file, its header and what it says of its tensors, checked against each other."""
    if path.is_dir():
        raise _corrupt(path, "it is a folder")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header, tensors = _read_entry(path, file.metadata() or {})
            if sorted(file.keys()) != ["keys", "values"]:
                raise _corrupt(path, f"it holds the tensors {sorted(file.keys())}, not keys and values")
            shapes = [list(file.get_slice(name).get_shape()) for name in ("keys", "values")]
            if shapes != [tensors["shape"]] * 2 or len(shapes[0]) != 4:
                raise _corrupt(path, f"its keys are {shapes[0]} and its values {shapes[1]}, not {tensors['shape']}")
            if shapes[0][2] != header.slots:
                raise _corrupt(path, f"it holds {shapes[0][2]} slots, but its windows take {header.slots}")
            yield file, header, tensors
    except SafetensorError as error:
        raise _corrupt(path, f"it is not a whole safetensors file ({error})") from error
    except RuntimeError as error:
        if path.exists():
            raise
        # safe_open opens a file twice, the second time through torch: it vanished in between
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error


def _read_entry(path: Path, metadata: Mapping[str, str]) -> tuple[DocumentHeader, dict[str, Any]]:
    """The header in a file's metadata and what it says of the tensors, its version and digest checked."""
    if _ENTRY not in metadata:
        raise _corrupt(path, f"it has no metadata entry {_ENTRY!r}, so beacon_memory did not write it")
    try:
        entry = json.loads(metadata[_ENTRY])
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its metadata entry {_ENTRY!r} is not JSON ({error})") from error
    version = entry.get("format") if isinstance(entry, dict) else None
    if type(version) is not int or version < 1:
        raise _corrupt(path, f"its metadata entry {_ENTRY!r} states no format version")
    if version > FORMAT_VERSION:
        raise CorruptFileError(
            f"{path} has format {version}, written by a newer beacon_memory; this one reads formats up to "
            f"{FORMAT_VERSION}: upgrade beacon_memory, or add the document again with this version"
        )
    if entry.pop("sha256", None) != _seal(entry):
        raise _corrupt(path, "its header is damaged: the digest of the header differs")
    try:
        tensors = {name: entry["tensors"][name] for name in ("dtype", "shape", "sha256")}
        return DocumentHeader.from_dict(entry["header"]), tensors
    except (AttributeError, KeyError, TypeError, InputError, CorruptFileError) as error:
        raise _corrupt(path, f"its header cannot be read ({error})") from error


def _corrupt(path: Path, flaw: str) -> CorruptFileError:
    return CorruptFileError(f"{path} cannot be used: {flaw}; {_REMEDY}")


def _check_count(what: str, value: object) -> None:
    if type(value) is not int or value < 0:
        raise InputError(f"{what} must be an integer of at least 0, got {value!r}")


def _seal(described: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _describe(keys: Tensor, values: Tensor) -> dict[str, Any]:
    """What a file says of its tensors, both contiguous and on the CPU: dtype, shape and the sha256 of their bytes."""
    hasher = hashlib.sha256()
    for tensor in (keys, values):
        hasher.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy().data)
    return {"dtype": str(keys.dtype), "shape": list(keys.shape), "sha256": hasher.hexdigest()}
