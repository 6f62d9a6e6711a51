"""One document's K/V as one file that describes itself.

A file is a safetensors file with the tensors of a MemoryKV, `keys` and `values` [entries, head_dim], `places` [entries]
and `counts` [layers, kv_heads], the last two int32, and one metadata entry `beacon_memory`, a JSON object:

    format    version of this form, an integer
    header    a DocumentHeader
    tensors   dtype and shape of each tensor under its name, and the sha256 of all
    sha256    of the three above, so that a damaged header is noticed whenever it is read

Files of format 1 are still read: a stack of beacons, `keys` and `values` [layers, kv_heads, slots, head_dim], with one
dtype and shape for both, and neither compression nor span in the header.

Files are never changed in place: `stage_kv_file` writes and syncs a temporary file, `publish` renames it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import COMPRESSIONS
from .document import check_id, utc_now
from .durable import make_folder, sync_file, sync_folder
from .errors import CorruptFileError, InputError, StoreError
from .fingerprint import Fingerprint
from .kv import BeaconKV, MemoryKV

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

FORMAT_VERSION = 2
TEMP_PREFIX = ".tmp"  # safetensors names its own temporary files so, too: one pattern finds what a crash left
_ENTRY = "beacon_memory"
_REMEDY = "run `beacon-memory verify` to list every damaged file, and add the document again to replace this one"


@dataclass(frozen=True, slots=True)
class WindowSpan:
    """One window of a document.

    tokens: raw tokens in this window
    ratio:  raw tokens per slot; 0: the window is kept raw, one slot a token
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
        """Slots of a head that the window takes, the mean over all heads; its last, incomplete unit has one, too."""
        return -(-self.tokens // self.ratio) if self.ratio else self.tokens


@dataclass(frozen=True, slots=True)
class DocumentHeader:
    """What a file says of its document.

    id, content_hash: the document, and the sha256 of its text in hexadecimal
    tokens:      raw tokens of the text
    windows:     in the order of the text, the last and perhaps incomplete one included
    tail_ids:    raw token ids of the last window if it is incomplete, so that `append` can go on where the text
                 stopped; empty if it is full
    compression: how the text became slots, one of `config.COMPRESSIONS`
    span:        positions of the model that the memory takes
    fingerprint: of the model, adapter and settings that made the K/V
    created_at:  when they were made, ISO 8601, UTC
    """

    id: str
    content_hash: str
    tokens: int
    windows: tuple[WindowSpan, ...]
    tail_ids: tuple[int, ...]
    compression: str
    span: int
    fingerprint: Fingerprint
    created_at: str = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        check_id(self.id)
        for name in ("content_hash", "created_at"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} must be a text, got {getattr(self, name)!r}")
        if self.compression not in COMPRESSIONS:
            raise InputError(f"compression is {self.compression!r}, but must be one of {', '.join(COMPRESSIONS)}")
        for name in ("tokens", "span"):
            _check_count(name, getattr(self, name))
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
        """Slots of a head, the mean over all heads, of all windows together."""
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


def write_kv_file(path: Path, header: DocumentHeader, kv: MemoryKV) -> None:
    """Write a document's K/V to `path`, whole or not at all, replacing what is there."""
    publish(stage_kv_file(path.parent, header, kv), path)


def stage_kv_file(folder: Path, header: DocumentHeader, kv: MemoryKV) -> Path:
    """Write a temporary file into `folder`, created if missing, and sync it to disk; `publish` gives it its name.

    Raises InputError if `kv` is not a memory that the header describes, or is squeezed, StoreError if the file cannot
    be written. Nothing is left behind then.
    """
    if flaw := _misfit(header, kv) or _misplaced(kv):
        raise InputError(f"the K/V of {header.id!r} cannot be stored: {flaw}")
    tensors = {"keys": kv.keys, "values": kv.values, "places": kv.places, "counts": kv.counts.to(torch.int32)}
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    if len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) < len(tensors):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses those that overlap
    described = {
        "format": FORMAT_VERSION,
        "header": asdict(header),
        "tensors": {**{name: _form(tensor) for name, tensor in tensors.items()}, "sha256": _digest(tensors)},
    }
    entry = json.dumps({**described, "sha256": _seal(described)})
    make_folder(folder)
    temp = folder / f"{TEMP_PREFIX}-{secrets.token_hex(8)}"
    try:
        save_file(tensors, temp, metadata={_ENTRY: entry})
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
    return _read(path)[0]


def read_kv_file(path: Path, device: torch.device | str = "cpu") -> tuple[DocumentHeader, MemoryKV]:
    """Read a document's header and its K/V, onto `device`. Damage inside the tensors is left to `check_kv_file`."""
    header, kv = _read(path)
    if flaw := _misplaced(kv):
        raise _corrupt(path, flaw)
    return header, kv.to(device)


def check_kv_file(path: Path) -> DocumentHeader:
    """Read a whole file and compare every byte of its tensors with the digest taken when it was written."""
    header, kv = _read(path, whole=True)
    if flaw := _misplaced(kv):
        raise _corrupt(path, flaw)
    return header


def _read(path: Path, *, whole: bool = False) -> tuple[DocumentHeader, MemoryKV]:
    """A file's header and K/V, checked against each other, and with `whole` against the digest."""
    header, described, tensors = _mapped(path)
    digest = described.pop("sha256")
    if tensors.keys() != described.keys():
        raise _corrupt(path, f"it holds the tensors {', '.join(tensors)}, not {', '.join(sorted(described))}")
    for name, tensor in tensors.items():
        if _form(tensor) != described[name]:
            raise _corrupt(path, f"its {name} are {_form(tensor)}, not {described[name]}")
    try:
        kv = _memory(tensors, header.span)
    except InputError as error:
        raise _corrupt(path, str(error)) from error
    if flaw := _misfit(header, kv):
        raise _corrupt(path, flaw)
    if whole and _digest(tensors) != digest:
        raise _corrupt(path, "its tensors are not those that were written: their digest differs")
    return header, kv


def _mapped(path: Path) -> tuple[DocumentHeader, dict[str, Any], dict[str, Tensor]]:
    """A file's header, what it says of its tensors, and these: mapped, so that only what is used of them is read."""
    if path.is_dir():
        raise _corrupt(path, "it is a folder")
    try:
        with safe_open(path, framework="pt") as file:
            header, described = _read_entry(path, file.metadata() or {})
            return header, described, {name: file.get_tensor(name) for name in sorted(file.keys())}
    except SafetensorError as error:
        raise _corrupt(path, f"it is not a whole safetensors file ({error})") from error
    except RuntimeError as error:
        if path.exists():
            raise
        # safe_open opens a file twice, the second time through torch: it vanished in between
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error


def _memory(tensors: Mapping[str, Tensor], span: int) -> MemoryKV:
    """The K/V that a file's tensors are. Raises InputError for tensors that cannot be any."""
    if "counts" not in tensors:  # format 1
        return MemoryKV.of(BeaconKV(**tensors))
    if tensors["counts"].dtype != torch.int32:
        raise InputError(f"its counts must be int32, got {tensors['counts'].dtype}")
    return MemoryKV(**{**tensors, "counts": tensors["counts"].long()}, span=span)


def _read_entry(path: Path, metadata: Mapping[str, str]) -> tuple[DocumentHeader, dict[str, Any]]:
    """The header in a file's metadata and what it says of the tensors, its version and digest checked.

    What it says is the `_form` of each tensor by name, and `sha256`.
    """
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
        header, tensors = entry["header"], entry["tensors"]
        if version == 1:
            form = {"dtype": tensors["dtype"], "shape": tensors["shape"]}
            header = {**header, "compression": "beacon", "span": form["shape"][2]}
            described = {"keys": form, "values": form, "sha256": tensors["sha256"]}
        else:
            described = {name: tensors[name] for name in ("keys", "values", "places", "counts", "sha256")}
        return DocumentHeader.from_dict(header), described
    except (AttributeError, IndexError, KeyError, TypeError, InputError, CorruptFileError) as error:
        raise _corrupt(path, f"its header cannot be read ({error})") from error


def _corrupt(path: Path, flaw: str) -> CorruptFileError:
    return CorruptFileError(f"{path} cannot be used: {flaw}; {_REMEDY}")


def _check_count(what: str, value: object) -> None:
    if type(value) is not int or value < 0:
        raise InputError(f"{what} must be an integer of at least 0, got {value!r}")


def _seal(described: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _form(tensor: Tensor) -> dict[str, Any]:
    """What a file says of a tensor."""
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of tensors in the order of their names, all contiguous and on the CPU: dtypes, shapes and bytes."""
    hasher = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        hasher.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _misfit(header: DocumentHeader, kv: MemoryKV) -> str | None:
    """What is wrong if a document of this header has other K/V than these. Reads none of them but the counts."""
    if kv.keys.dtype != kv.values.dtype:
        return f"its keys and values must have one dtype, got {kv.keys.dtype} and {kv.values.dtype}"
    if kv.places.dtype != torch.int32:
        return f"its places must be int32, got {kv.places.dtype}; of a squeezed memory, keep what was squeezed"
    if kv.span != header.span:
        return f"it spans {kv.span} positions, but its header says {header.span}"
    heads = kv.counts.numel()
    if not heads or len(kv.keys) != header.slots * heads:
        return f"it holds {len(kv.keys)} entries, but its windows take {header.slots} slots of each of {heads} heads"
    return None


def _misplaced(kv: MemoryKV) -> str | None:
    """What is wrong if a head has less than no entries, or an entry lies outside the span."""
    if (kv.counts < 0).any():
        return f"one of its heads has {int(kv.counts.min())} entries"
    if len(kv.places) and (kv.places.min() < 0 or kv.places.max() >= kv.span):
        return f"its places go from {int(kv.places.min())} to {int(kv.places.max())}, but it spans {kv.span} positions"
    return None
