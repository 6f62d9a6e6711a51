"""One document as one file that describes itself.

A file is a safetensors file with the tensors of a memory, `keys` and `values` [entries, head_dim], `places` [entries]
and `counts` [layers, kv_heads], the last two whole numbers, and `text`, the source text in UTF-8 [bytes]. Quantized
keys and values have their scales beside them, see `QuantizedKV`. The metadata tells the rest: see `kv_formats`, which
also says in what older formats differ.

Files are never changed in place: `stage_kv_file` writes and syncs a temporary file, which `files` gives its name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from beacon_memory.documents import Text
from beacon_memory.errors import CorruptFileError, InputError, StoreError
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.kv.quantize import QuantizedKV

from .checked_json import json_checksum
from .durable import identity, make_folder, share_file, sync_file
from .header import DocumentHeader
from .kv_formats import ENTRY, FORMAT_VERSION, LONGEST_ENTRY, LONGEST_HEADER, SCALES, corrupt, read_entry
from .names import new_temp
from .stored_kv import StoredKV, narrow, precision_of

__all__ = [
    "StoredFile",
    "read_header",
    "read_kv_file",
    "stage_kv_file",
]

# What safetensors and torch raise for these is of types of their own, and names the error of the machine in words
_OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
_LARGEST_EMPTY = 1 << 24  # product of the other axes of a tensor without elements: more is a lie, and would cost memory


@dataclass(frozen=True, slots=True, eq=False)
class StoredFile:
    """Hold the content of a file. text_bytes: the source text in UTF-8 [bytes]; None in files of a format without."""

    header: DocumentHeader
    kv: StoredKV
    text_bytes: Tensor | None

    def memory(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> MemoryKV:
        """Return the K/V on a device, dequantized there; dtype: as stored, or float32 if they are quantized."""
        kv = self.kv.to(device)
        if isinstance(kv, QuantizedKV):
            return kv.dequantized(dtype or torch.float32)
        return kv if dtype is None else kv.to(dtype=dtype)

    @property
    def text(self) -> str:
        """Return the source text; raises CorruptFileError if the file has none that fits its header."""
        if self.text_bytes is None:
            raise CorruptFileError(f"the file of {self.header.id!r} is of a format that does not keep the text")
        data = self.text_bytes.numpy().tobytes()
        if hashlib.sha256(data).hexdigest() != self.header.content_hash:
            raise CorruptFileError(f"the text in the file of {self.header.id!r} is not the one that its header names")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CorruptFileError(f"the text in the file of {self.header.id!r} is not UTF-8: {error}") from None


def stage_kv_file(folder: Path, header: DocumentHeader, kv: StoredKV, text: Text) -> Path:
    """Write a temporary file into `folder`, created if missing, and sync it to disk.

    Raises InputError if `kv` is not a memory that the header describes, or is interpolated, or the text is another one;
    StoreError if the file cannot be written. Nothing is left behind then.
    """
    if flaw := _misfit(header, kv) or _misplaced(kv):
        raise InputError(f"the K/V of {header.id!r} cannot be stored: {flaw}")
    if text.sha256 != header.content_hash:
        raise InputError(f"the header of {header.id!r} was made for another text: its content_hash differs")
    precision_of(kv)  # refuses what has none
    data = text.value.encode()
    scales, rotated = {}, {}
    if isinstance(kv, QuantizedKV):
        scales, rotated = {name: getattr(kv, name) for name in SCALES}, {"rotated": kv.rotated}
    tensors = {
        "keys": kv.keys,
        "values": kv.values,
        "places": narrow(kv),
        "counts": kv.counts.to(torch.int32),
        "text": torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8),
        **scales,
    }
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    if len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) < len(tensors):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses those that overlap
    described = {
        "format": FORMAT_VERSION,
        "header": asdict(header),
        "tensors": {**{name: _form(tensor) for name, tensor in tensors.items()}, "xxh3": _hash(tensors), **rotated},
    }
    entry = json.dumps({**described, "sha256": json_checksum(described)})
    if len(entry) > LONGEST_ENTRY:
        raise InputError(f"the header of {header.id!r} would take {len(entry)} bytes; split the document")
    make_folder(folder)
    temp = new_temp(folder)
    try:
        save_file(tensors, temp, metadata={ENTRY: entry})
        share_file(temp)  # a file of safetensors' own has taken the place of the one with the right permissions
        sync_file(temp)
    except BaseException as error:
        temp.unlink(missing_ok=True)
        if isinstance(error, (SafetensorError, OSError)):
            raise StoreError(f"the K/V of {header.id!r} could not be written into {folder}: {error}") from error
        raise
    return temp


def read_header(path: Path) -> DocumentHeader:
    """Read the header of a file, not its tensors.

    This and `read_kv_file` raise CorruptFileError, naming the file and what is wrong, for anything that `stage_kv_file`
    did not write, and let FileNotFoundError through.
    """
    _require_file(path)
    with _opened(path) as file:
        return read_entry(path, file.metadata() or {})[0]


def read_kv_file(path: Path) -> StoredFile:
    """Read a file and compare every byte with the hash taken when it was written.

    The tensors are mapped: what is not used of them is read once, for the hash, and takes no memory of this process.
    """
    _require_file(path)
    with _opened(path) as file:
        header, described = read_entry(path, file.metadata() or {})
        checks = {name: described.pop(name) for name in ("xxh3", "sha256") if name in described}
        rotated = described.pop("rotated", False)
        names = sorted(file.keys())
        if names != sorted(described):
            raise corrupt(
                path, f"it holds {len(names)} tensors, but its header tells of {', '.join(sorted(described))}"
            )
        tensors = {name: file.get_tensor(name) for name in names}
    for name, tensor in tensors.items():
        if _form(tensor) != described[name]:
            raise corrupt(path, f"its {name} are {_form(tensor)}, not {described[name]}")
        if not tensor.numel() and math.prod(filter(None, tensor.shape)) > _LARGEST_EMPTY:
            raise corrupt(path, f"its {name} have a shape that no model has: {list(tensor.shape)}")
    if ("xxh3" in checks and checks["xxh3"] != _hash(tensors)) or (
        "sha256" in checks and checks["sha256"] != _digest(tensors)
    ):
        raise corrupt(path, "its tensors are not those that were written: their hash differs")
    text = tensors.pop("text", None)
    if text is not None and (text.dtype != torch.uint8 or text.ndim != 1):
        raise corrupt(path, f"its text is {_form(text)}, and no bytes")
    try:
        kv = _kv(tensors, header.span, rotated)
        precision_of(kv)
    except InputError as error:
        raise corrupt(path, str(error)) from error
    if flaw := _misfit(header, kv) or _misplaced(kv):
        raise corrupt(path, flaw)
    return StoredFile(header, kv, text)


def _require_file(path: Path) -> None:
    """Refuse what is no plain file, or has a header longer than any of ours, before anything reads it as one."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise corrupt(path, "it is a link") from error
        raise StoreError(f"{path} cannot be opened: {error.strerror}; see to its permissions") from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise corrupt(path, "it is no plain file")
        length = int.from_bytes(os.read(handle, 8), "little")
        if length > LONGEST_HEADER:
            raise corrupt(path, f"it claims a header of {length} bytes")
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; see to the disk") from error
    finally:
        os.close(handle)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        if not identity(path):  # safe_open opens a file twice, the second time through torch: it vanished in between
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        if isinstance(error, OSError) or any(os.strerror(one) in str(error) for one in _OF_THE_MACHINE):
            raise StoreError(f"{path} cannot be read: {error}; see to the disk and the machine's limits") from error
        if isinstance(error, SafetensorError):
            raise corrupt(path, f"it is not a whole safetensors file ({error})") from error
        raise corrupt(path, f"torch cannot read it ({error})") from error


def _kv(tensors: Mapping[str, Tensor], span: int, rotated: bool) -> StoredKV:
    """Make K/V of the tensors of a file; raises InputError for tensors that cannot be any."""
    if "counts" not in tensors:  # format 1
        return MemoryKV.of(BeaconKV(**tensors))
    if tensors["counts"].dtype != torch.int32 or tensors["places"].dtype not in (torch.int16, torch.int32):
        raise InputError(
            f"its counts must be int32 and its places int16 or int32, got {tensors['counts'].dtype} and "
            f"{tensors['places'].dtype}"
        )
    # by one thread, see `_misplaced`
    positions = torch.from_numpy(tensors["places"].numpy().astype("int32", copy=False))
    whole = {"counts": tensors["counts"].long(), "positions": positions}
    given = {name: tensor for name, tensor in tensors.items() if name != "places"}
    if "key_scales" not in tensors:
        return MemoryKV(**{**given, **whole}, span=span)
    width, head_dim = (tensors[name].shape[-1] if tensors[name].ndim else 0 for name in ("keys", "key_scales"))
    bits = 8 * width // max(1, head_dim)
    return QuantizedKV(**{**given, **whole}, bits=bits, span=span, dtype=torch.float32, rotated=rotated)


def _form(tensor: Tensor) -> dict[str, Any]:
    """Describe a tensor as the metadata does."""
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors with XXH3, which is fast and finds every accident; a sha256 would also find an attack."""
    return _feed(xxhash.xxh3_128(), tensors)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors with sha256, as older files have it."""
    return _feed(hashlib.sha256(), tensors)


def _feed(hasher: Any, tensors: Mapping[str, Tensor]) -> str:
    """Hash dtypes, shapes and bytes of tensors in the order of their names; all contiguous and on the CPU."""
    for _, tensor in sorted(tensors.items()):
        hasher.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy().data)
    return str(hasher.hexdigest())


def _misfit(header: DocumentHeader, kv: StoredKV) -> str | None:
    """Say in what K/V differ from the header of their document, None if in nothing; reads the counts only."""
    if kv.keys.dtype != kv.values.dtype:
        return f"its keys and values must have one dtype, got {kv.keys.dtype} and {kv.values.dtype}"
    if kv.positions.dtype != torch.int32:
        return f"its positions must be int32, got {kv.positions.dtype}; keep it before it is interpolated"
    if kv.span != header.span:
        return f"it spans {kv.span} positions, but its header says {header.span}"
    heads = kv.counts.numel()
    if not heads or len(kv.positions) != header.slots * heads:
        return (
            f"it holds {len(kv.positions)} entries, but its windows take {header.slots} slots of each of {heads} heads"
        )
    return None


def _misplaced(kv: StoredKV) -> str | None:
    """Say whether a head has fewer than no entries or an entry lies outside the span, None if neither."""
    if (kv.counts < 0).any():
        return f"one of its heads has {int(kv.counts.min())} entries"
    positions = (
        kv.positions.cpu().numpy()
    )  # torch would share this among threads, and wait for the last of them to wake
    if len(positions) and (positions.min() < 0 or positions.max() >= kv.span):
        return f"its positions go from {positions.min()} to {positions.max()}, but it spans {kv.span} positions"
    return None
