"""What disks, crashes and people do to files: bytes that are flipped, cut off, zeroed, swapped, added.

And files as somebody would write them to do harm: a metadata entry proves nothing but that no byte changed by chance.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from hypothesis import strategies as st
from kv_samples import TEXT, sample
from safetensors.torch import load, save
from torch import Tensor

from beacon_memory.documents import Text
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.kv_file import stage_kv_file
from beacon_memory.storage.files.stored_kv import StoredKV, with_precision

PAGE = 4096  # bytes that a disk or SQLite loses together


@dataclass(frozen=True)
class Damage:
    """Something that happens to the bytes of a file at a share of its length, the same share of any file."""

    kind: str
    at: float
    size: int
    seed: int

    def done_to(self, data: bytes) -> bytes:
        where = min(int(self.at * len(data)), len(data) - 1)
        page = where // PAGE * PAGE
        other = self.seed * PAGE % len(data) // PAGE * PAGE
        changed = bytearray(data)
        match self.kind:
            case "flip":
                changed[where] ^= 1 << self.seed % 8
            case "cut":
                del changed[where:]
            case "extend":
                changed += self._noise(self.size)
            case "zero":
                changed[where : where + self.size] = bytes(len(data[where : where + self.size]))
            case "noise":
                changed[where : where + self.size] = self._noise(len(data[where : where + self.size]))
            case "zero page":
                changed[page : page + PAGE] = bytes(len(data[page : page + PAGE]))
            case "move page":
                changed[page : page + PAGE] = data[other : other + PAGE]
            case "swap":
                far = self.seed % len(data)
                changed[where], changed[far] = changed[far], changed[where]
        return bytes(changed)

    def _noise(self, size: int) -> bytes:
        return hashlib.shake_128(str(self.seed).encode()).digest(size)


FORMS = ("bfloat16", "float32", "int8", "int4")
_KINDS = ("flip", "flip", "flip", "cut", "extend", "zero", "noise", "zero page", "move page", "swap")
damages = st.builds(
    Damage,
    kind=st.sampled_from(_KINDS),
    at=st.floats(0, 1, exclude_max=True),
    size=st.sampled_from([1, 2, 4, 16, 100, 1000]),
    seed=st.integers(0, 2**16),
)


def sealed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A metadata entry with the hash that it must have."""
    bare = {name: value for name, value in entry.items() if name != "sha256"}
    return {**bare, "sha256": hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()}


def crafted(head: Mapping[str, Any], data: bytes) -> bytes:
    """A safetensors file of any header and data."""
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts(file: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, metadata entry and data of a safetensors file of ours."""
    end = 8 + int.from_bytes(file[:8], "little")
    head = json.loads(file[8:end])
    return head, json.loads(head["__metadata__"]["beacon_memory"]), file[end:]


def with_entry(file: bytes, entry: Mapping[str, Any]) -> bytes:
    """The file with another metadata entry, sealed."""
    head, _, data = parts(file)
    return crafted({**head, "__metadata__": {"beacon_memory": json.dumps(sealed(entry))}}, data)


ROWS = ("keys", "values", "places", "value_scales", "value_zeros")  # tensors with a row for each entry
INDEX = ("counts", "hashes", "key_scales", "key_zeros")


def forged(file: bytes, changed: Mapping[str, Tensor | None] | None = None, **header: Any) -> bytes:
    """The file with other tensors, or without some, all hashes as they must be, and other fields in its header.

    Written by docs/file-format.md. Where counts are none, `hashes` stay as they are.
    """
    _, entry, _ = parts(file)
    tensors = {name: one for name, one in {**load(file), **(changed or {})}.items() if one is not None}
    if "hashes" in tensors and "hashes" not in (changed or {}):
        with contextlib.suppress(KeyError, IndexError, RuntimeError):
            tensors["hashes"] = hash_rows(tensors)
    said = {name: {"dtype": str(one.dtype), "shape": [*one.shape]} for name, one in tensors.items()}
    entry = {**entry, "header": {**entry["header"], **header}, "tensors": said, "index": hash_index(tensors)}
    return with_entry(save(tensors, metadata={"beacon_memory": json.dumps(entry)}), entry)


def hash_rows(tensors: Mapping[str, Tensor]) -> Tensor:
    """Of each section and level the hash of its rows."""
    counts = tensors["counts"]
    stops = counts.sum((2, 3), dtype=torch.int64).flatten().cumsum(0).tolist()
    found = b""
    for start, stop in zip([0, *stops], stops, strict=False):
        hasher = xxhash.xxh3_128()
        for name in (name for name in ROWS if name in tensors):
            hasher.update(_raw(tensors[name][start:stop]))
        found += hasher.digest()
    return torch.tensor([*found], dtype=torch.uint8).view(*counts.shape[:2], 16)


def hash_index(tensors: Mapping[str, Tensor]) -> str:
    """The hash of the tensors that tell of the others."""
    hasher = xxhash.xxh3_128()
    for name in (name for name in INDEX if name in tensors):
        hasher.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode() + _raw(tensors[name]))
    return hasher.hexdigest()


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def file_of(form: str, id: str = "doc", text: str = TEXT) -> tuple[bytes, DocumentHeader, StoredKV]:
    """The bytes of a file, and what must be read from it; form: one of FORMS."""
    header, kv = sample(id, text)
    stored = with_precision(kv, form, header.window_starts)
    with tempfile.TemporaryDirectory() as folder:
        return stage_kv_file(Path(folder), header, stored, Text(text)).path.read_bytes(), header, stored
