"""One document as one file that describes itself.

A file is a safetensors file with the tensors of a memory, `keys` and `values` [entries, head_dim], `places` [entries]
and `counts` [layers, kv_heads], the last two whole numbers, and `text`, the source text in UTF-8 [bytes]. Quantized
keys and values have their scales beside them, see `QuantizedKV`. One metadata entry `beacon_memory` is a JSON object:

    format    version of this form, an integer
    header    a DocumentHeader
    tensors   dtype and shape of each tensor under its name, `xxh3`, the XXH3 hash (128 bits) of all, and of quantized
              ones `rotated`
    sha256    of the three above, so that a damaged header is noticed whenever it is read

Older files are still read. In format 3 nothing is rotated. In format 2 nothing is quantized, there is no text, windows
have no span of their own, nothing says how tokens were chosen, and a `sha256` is in the place of `xxh3`. In format 1 a
file is a stack of beacons, `keys` and `values` [layers, kv_heads, slots, head_dim], with one dtype and shape for both,
and neither compression nor span in the header.

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

from beacon_memory.documents import check_precision, content_hash
from beacon_memory.errors import CorruptFileError, InputError, StoreError
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.kv.quantize import QuantizedKV, quantized

from .checked_json import json_checksum
from .durable import make_folder, sync_file
from .header import DocumentHeader, WindowSpan
from .names import new_temp

__all__ = [
    "FORMAT_VERSION",
    "StoredFile",
    "StoredKV",
    "precision_of",
    "read_header",
    "read_kv_file",
    "stage_kv_file",
    "stored_bytes",
    "with_precision",
]

FORMAT_VERSION = 4
StoredKV = MemoryKV | QuantizedKV
_ENTRY = "beacon_memory"
_REMEDY = "run `beacon-memory verify` to list every damaged file, and `beacon-memory repair` to mend them"
_LONGEST_HEADER = 32 << 20  # bytes; a window takes about a hundred
_LONGEST_ENTRY = _LONGEST_HEADER // 4  # as JSON in JSON each quotation mark takes more
_LONGEST_FLAW = 500  # characters of an error message: it may quote what somebody wrote to do harm
_LARGEST_EMPTY = 1 << 24  # product of the other axes of a tensor without elements: more is a lie, and would cost memory
_POSITIONS_16 = 1 << 15  # span up to which positions take two bytes
_PLAIN = ("counts", "keys", "places", "values")
_SCALES = ("key_scales", "key_zeros", "value_scales", "value_zeros")


@dataclass(frozen=True, slots=True, eq=False)
class StoredFile:
    """What a file holds. text_bytes: the source text in UTF-8 [bytes]; None in files of a format that had none."""

    header: DocumentHeader
    kv: StoredKV
    text_bytes: Tensor | None

    def memory(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> MemoryKV:
        """The K/V on a device, dequantized there; dtype: as stored, or float32 if they are quantized."""
        kv = self.kv.to(device)
        if isinstance(kv, QuantizedKV):
            return kv.dequantized(dtype or torch.float32)
        return kv if dtype is None else kv.to(dtype=dtype)

    @property
    def text(self) -> str:
        """The source text; raises CorruptFileError if the file has none that fits its header."""
        if self.text_bytes is None:
            raise CorruptFileError(f"the file of {self.header.id!r} is of a format that does not keep the text")
        data = self.text_bytes.numpy().tobytes()
        if hashlib.sha256(data).hexdigest() != self.header.content_hash:
            raise CorruptFileError(f"the text in the file of {self.header.id!r} is not the one that its header names")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CorruptFileError(f"the text in the file of {self.header.id!r} is not UTF-8: {error}") from None


def precision_of(kv: StoredKV) -> str:
    """What K/V are kept in, one of PRECISIONS; raises InputError for a dtype that is none of them."""
    if isinstance(kv, QuantizedKV):
        return f"int{kv.bits}"
    if not kv.keys.dtype.is_floating_point:
        raise InputError(f"keys and values must be of floating point, or quantized, got {kv.keys.dtype}")
    return check_precision(str(kv.keys.dtype).removeprefix("torch."))


def with_precision(kv: StoredKV, precision: str) -> StoredKV:
    """K/V in another precision; raises InputError for one that would need what is no longer there."""
    now, wanted = precision_of(kv), check_precision(precision)
    if now == wanted:
        return kv
    bits = {"int8": 8, "int4": 4}
    if now in bits and bits.get(wanted, 16) > bits[now]:
        raise InputError(f"{now} K/V hold no more than that: to keep them as {wanted}, compress the document anew")
    memory = kv.dequantized(torch.float32) if isinstance(kv, QuantizedKV) else kv
    if wanted in bits:
        return quantized(memory, bits[wanted])
    return memory.to(dtype=getattr(torch, wanted))


def stored_bytes(kv: StoredKV) -> int:
    """Bytes that keys, values and positions take in a file."""
    return kv.nbytes - kv.positions.nbytes + _narrow(kv).nbytes


def stage_kv_file(folder: Path, header: DocumentHeader, kv: StoredKV, text: str) -> Path:
    """Write a temporary file into `folder`, created if missing, and sync it to disk.

    Raises InputError if `kv` is not a memory that the header describes, or is interpolated, or the text is another one;
    StoreError if the file cannot be written. Nothing is left behind then.
    """
    if flaw := _misfit(header, kv) or _misplaced(kv):
        raise InputError(f"the K/V of {header.id!r} cannot be stored: {flaw}")
    if content_hash(text) != header.content_hash:
        raise InputError(f"the header of {header.id!r} was made for another text: its content_hash differs")
    precision_of(kv)  # refuses what has none
    data = text.encode()
    scales, rotated = {}, {}
    if isinstance(kv, QuantizedKV):
        scales, rotated = {name: getattr(kv, name) for name in _SCALES}, {"rotated": kv.rotated}
    tensors = {
        "keys": kv.keys,
        "values": kv.values,
        "places": _narrow(kv),
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
    if len(entry) > _LONGEST_ENTRY:
        raise InputError(f"the header of {header.id!r} would take {len(entry)} bytes; split the document")
    make_folder(folder)
    temp = new_temp(folder)
    try:
        save_file(tensors, temp, metadata={_ENTRY: entry})
        # safetensors creates files that only their owner may read; a store is as open as its folder
        temp.chmod(folder.stat().st_mode & 0o666)
        sync_file(temp)
    except BaseException as error:
        temp.unlink(missing_ok=True)
        if isinstance(error, (SafetensorError, OSError)):
            raise StoreError(f"the K/V of {header.id!r} could not be written into {folder}: {error}") from error
        raise
    return temp


def read_header(path: Path) -> DocumentHeader:
    """Read what a file says of its document, not its tensors.

    This and `read_kv_file` raise CorruptFileError, naming the file and what is wrong, for anything that `stage_kv_file`
    did not write, and let FileNotFoundError through.
    """
    _require_file(path)
    with _opened(path) as file:
        return _read_entry(path, file.metadata() or {})[0]


def read_kv_file(path: Path) -> StoredFile:
    """Read a file and compare every byte with the hash taken when it was written.

    The tensors are mapped: what is not used of them is read once, for the hash, and takes no memory of this process.
    """
    _require_file(path)
    with _opened(path) as file:
        header, described = _read_entry(path, file.metadata() or {})
        checks = {name: described.pop(name) for name in ("xxh3", "sha256") if name in described}
        rotated = described.pop("rotated", False)
        names = sorted(file.keys())
        if names != sorted(described):
            raise _corrupt(
                path, f"it holds {len(names)} tensors, but its header tells of {', '.join(sorted(described))}"
            )
        tensors = {name: file.get_tensor(name) for name in names}
    for name, tensor in tensors.items():
        if _form(tensor) != described[name]:
            raise _corrupt(path, f"its {name} are {_form(tensor)}, not {described[name]}")
        if not tensor.numel() and math.prod(filter(None, tensor.shape)) > _LARGEST_EMPTY:
            raise _corrupt(path, f"its {name} have a shape that no model has: {list(tensor.shape)}")
    if ("xxh3" in checks and checks["xxh3"] != _hash(tensors)) or (
        "sha256" in checks and checks["sha256"] != _digest(tensors)
    ):
        raise _corrupt(path, "its tensors are not those that were written: their hash differs")
    text = tensors.pop("text", None)
    if text is not None and (text.dtype != torch.uint8 or text.ndim != 1):
        raise _corrupt(path, f"its text is {_form(text)}, and no bytes")
    try:
        kv = _kv(tensors, header.span, rotated)
        precision_of(kv)
    except InputError as error:
        raise _corrupt(path, str(error)) from error
    if flaw := _misfit(header, kv) or _misplaced(kv):
        raise _corrupt(path, flaw)
    return StoredFile(header, kv, text)


def _require_file(path: Path) -> None:
    """Refuse what is no plain file, or has a header longer than any of ours, before anything reads it as one."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise _corrupt(path, "it is a link") from error
        raise StoreError(f"{path} cannot be opened: {error.strerror}; see to its permissions") from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise _corrupt(path, "it is no plain file")
        length = int.from_bytes(os.read(handle, 8), "little")
        if length > _LONGEST_HEADER:
            raise _corrupt(path, f"it claims a header of {length} bytes")
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; see to the disk") from error
    finally:
        os.close(handle)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise _corrupt(path, f"it is not a whole safetensors file ({error})") from error
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        if not path.exists():  # safe_open opens a file twice, the second time through torch: it vanished in between
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        if isinstance(error, OSError):
            raise StoreError(f"{path} cannot be read: {error}; see to the disk") from error
        raise _corrupt(path, f"torch cannot read it ({error})") from error


def _kv(tensors: Mapping[str, Tensor], span: int, rotated: bool) -> StoredKV:
    """The K/V that a file's tensors are. Raises InputError for tensors that cannot be any."""
    if "counts" not in tensors:  # format 1
        return MemoryKV.of(BeaconKV(**tensors))
    if tensors["counts"].dtype != torch.int32 or tensors["places"].dtype not in (torch.int16, torch.int32):
        raise InputError(
            f"its counts must be int32 and its places int16 or int32, got {tensors['counts'].dtype} and "
            f"{tensors['places'].dtype}"
        )
    whole = {"counts": tensors["counts"].long(), "positions": _wide(tensors["places"])}
    given = {name: tensor for name, tensor in tensors.items() if name != "places"}
    if "key_scales" not in tensors:
        return MemoryKV(**{**given, **whole}, span=span)
    width, head_dim = (tensors[name].shape[-1] if tensors[name].ndim else 0 for name in ("keys", "key_scales"))
    bits = 8 * width // max(1, head_dim)
    return QuantizedKV(**{**given, **whole}, bits=bits, span=span, dtype=torch.float32, rotated=rotated)


def _wide(positions: Tensor) -> Tensor:
    """Positions of a file as a memory has them; by one thread, see `_misplaced`."""
    return torch.from_numpy(positions.numpy().astype("int32", copy=False))


def _narrow(kv: StoredKV) -> Tensor:
    """The positions as a file keeps them, under their older name `places`."""
    return (
        kv.positions.to(torch.int16) if kv.span <= _POSITIONS_16 and kv.positions.dtype == torch.int32 else kv.positions
    )


def _read_entry(path: Path, metadata: Mapping[str, str]) -> tuple[DocumentHeader, dict[str, Any]]:
    """The header in a file's metadata and what it says of the tensors, its version and digest checked.

    What it says is the `_form` of each tensor by name, and their hash as `xxh3` or `sha256`.
    """
    entry = _checked(path, metadata)
    version = entry["format"]
    try:
        header, tensors = entry["header"], entry["tensors"]
        if version == 1:
            form = {"dtype": tensors["dtype"], "shape": tensors["shape"]}
            header = {**header, "compression": "beacon", "span": form["shape"][2]}
            described = {"keys": form, "values": form, "sha256": tensors["sha256"]}
        elif version == 2:
            described = {name: tensors[name] for name in (*_PLAIN, "sha256")}
        else:
            scales = _SCALES if "key_scales" in tensors else ()
            rotated = ("rotated",) if scales and version > 3 else ()
            described = {name: tensors[name] for name in (*_PLAIN, *scales, "text", "xxh3", *rotated)}
        if version < 3:
            header = {**header, "windows": _with_spans(header), "method": None}
        return DocumentHeader.from_dict(header), described
    except (AttributeError, IndexError, KeyError, TypeError, RecursionError, InputError, CorruptFileError) as error:
        raise _corrupt(path, f"its header cannot be read ({error})") from error


def _checked(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object in a file's metadata, its version and digest checked."""
    if _ENTRY not in metadata:
        raise _corrupt(path, f"it has no metadata entry {_ENTRY!r}, so beacon_memory did not write it")
    if len(metadata[_ENTRY]) > _LONGEST_ENTRY:
        raise _corrupt(path, f"its metadata entry {_ENTRY!r} is longer than any of ours")
    try:
        entry = json.loads(metadata[_ENTRY])
        sound = isinstance(entry, dict) and entry.pop("sha256", None) == json_checksum(entry)
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
    if not sound:
        raise _corrupt(path, "its header is damaged: the digest of the header differs")
    return dict(entry)


def _with_spans(header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The windows of an older header, each with the span that it takes; of `hybrid` the last one has that of all."""
    windows = [WindowSpan(**window, span=0) for window in header["windows"]]
    by_compression = {"beacon": [one.slots for one in windows], "select": [one.tokens for one in windows]}
    spans = by_compression.get(header["compression"], [0] * (len(windows) - 1) + [header["span"]] * bool(windows))
    return [asdict(window) | {"span": span} for window, span in zip(windows, spans, strict=True)]


def _corrupt(path: Path, flaw: str) -> CorruptFileError:
    shown = "".join(char if char.isprintable() else "?" for char in flaw[:_LONGEST_FLAW])
    return CorruptFileError(f"{path} cannot be used: {shown}; {_REMEDY}")


def _form(tensor: Tensor) -> dict[str, Any]:
    """What a file says of a tensor."""
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """The XXH3 hash of tensors: several times as fast as memory is read, and as good against all but an attacker."""
    return _feed(xxhash.xxh3_128(), tensors)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of tensors, which older files have."""
    return _feed(hashlib.sha256(), tensors)


def _feed(hasher: Any, tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors in the order of their names, all contiguous and on the CPU: dtypes, shapes and bytes."""
    for _, tensor in sorted(tensors.items()):
        hasher.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy().data)
    return str(hasher.hexdigest())


def _misfit(header: DocumentHeader, kv: StoredKV) -> str | None:
    """What is wrong if a document of this header has other K/V than these. Reads none of them but the counts."""
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
    """What is wrong if a head has less than no entries, or an entry lies outside the span."""
    if (kv.counts < 0).any():
        return f"one of its heads has {int(kv.counts.min())} entries"
    positions = (
        kv.positions.cpu().numpy()
    )  # torch would share this among threads, and wait for the last of them to wake
    if len(positions) and (positions.min() < 0 or positions.max() >= kv.span):
        return f"its positions go from {positions.min()} to {positions.max()}, but it spans {kv.span} positions"
    return None
