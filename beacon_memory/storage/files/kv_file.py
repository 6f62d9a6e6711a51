"""One document as one file that describes itself.

A file is a safetensors file. These tensors have a row for each entry of the memory, in the order that `nesting` tells
of: `keys` and `values` [entries, head_dim] and `places` [entries], and quantized ones `value_scales` and `value_zeros`.
These make up the index: `counts`, how many entries there are of each section, level, layer and head; `hashes`, of each
section and level the XXH3 hash of its rows; and of quantized ones `key_scales` and `key_zeros` [groups, head_dim].
`text` [bytes] is the source text in UTF-8. The metadata tells the rest: see `kv_metadata`. docs/file-format.md is the
whole of it.

So a part of a file can be read, and what is read is compared with its hash, without reading the rest. A document may
have several files, see `segments`.

Files are never changed in place: `stage_kv_file` writes and syncs a temporary file, which `files` gives its name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad

from beacon_memory.documents import Text
from beacon_memory.errors import CorruptFileError, InputError, StoreError
from beacon_memory.kv.levels import LEVELS
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import QuantizedKV, group_count, group_numbers

from .durable import identity, make_folder, sync_file
from .header import DocumentHeader, SectionSpan
from .kv_metadata import ENTRY, LONGEST_HEADER, KVMetadata, corrupt, read_metadata
from .names import new_temp
from .nesting import file_order, groups_of, head_sizes, rows_of, run_sizes
from .stored_kv import StoredKV, WindowedKV, precision_of, require_finite
from .tensor_file import Form, TensorFile, tensor_bytes

__all__ = [
    "Choose",
    "StagedFile",
    "StoredFile",
    "StoredIndex",
    "read_header",
    "read_index",
    "read_kv_file",
    "stage_kv_file",
]

# What safetensors and torch raise for these is of types of their own, and names the error of the machine in words
_OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
_PLAIN_ROWS, _QUANTIZED_ROWS = ("keys", "values", "places"), ("value_scales", "value_zeros")
_INDEX, _QUANTIZED_INDEX = ("counts", "hashes"), ("key_scales", "key_zeros")
_HASH = 16  # bytes
_LARGEST_EMPTY = 1 << 24  # product of the other axes of a tensor without elements: more is a lie, and would cost memory


@dataclass(frozen=True, slots=True, eq=False)
class StoredFile:
    """Hold the content of a file.

    kv:         all of the memory, or the part that was chosen.
    text_bytes: the source text in UTF-8 [bytes]; of a part, it is compared with its hash by `text` only.
    root:       the hash that stands for the whole file, and for those before it.
    lowest:     of each section the lowest level that was loaded, None if all was.
    behind:     the root of the file that this one continues; "" if it is no segment.
    """

    header: DocumentHeader
    kv: StoredKV
    text_bytes: Tensor
    root: str
    lowest: Sequence[int] | None = None
    behind: str = ""

    def memory(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> MemoryKV:
        """Return the K/V on a device, dequantized there; dtype: as stored, or float32 if they are quantized."""
        kv = self.kv.to(device)
        if isinstance(kv, QuantizedKV):
            return kv.dequantized(dtype or torch.float32)
        return kv if dtype is None else kv.to(dtype=dtype)

    @property
    def text(self) -> str:
        """Return the source text; raises CorruptFileError if the file has none that fits its header."""
        data = self.text_bytes.numpy().tobytes()
        if hashlib.sha256(data).hexdigest() != self.header.content_hash:
            raise CorruptFileError(f"the text in the file of {self.header.id!r} is not the one that its header names")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CorruptFileError(f"the text in the file of {self.header.id!r} is not UTF-8: {error}") from None


@dataclass(frozen=True, slots=True, eq=False)
class StoredIndex:
    """Tell what could be read of a file.

    counts: how many entries there are, [sections, levels, layers, kv_heads] uint8, levels from the top one down.
    root, behind: see `StoredFile`.
    """

    header: DocumentHeader
    counts: Tensor
    root: str
    behind: str = ""


# Of each section of a document the lowest level to load, `LEVELS` for none.
Choose = Callable[[StoredIndex], Sequence[int]]


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file that was written and synced under a temporary name.

    root:   see `StoredFile`.
    nbytes: what its K/V take, see `stored_bytes`.
    """

    path: Path
    root: str
    nbytes: int


def stage_kv_file(
    folder: Path, header: DocumentHeader, kv: StoredKV | WindowedKV, text: Text, behind: str = ""
) -> StagedFile:
    """Write a temporary file into `folder`, created if missing, and sync it to disk; behind: see `StoredFile`.

    Of K/V that come window by window, one is in RAM at a time, and is looked through for NaN and infinity; the file is
    the same.

    Raises InputError if `kv` is not a memory that the header describes, or is interpolated, or the text is another one;
    StoreError if the file cannot be written. Nothing is left behind then.
    """
    if text.sha256 != header.content_hash:
        raise InputError(f"the header of {header.id!r} was made for another text: its content_hash differs")
    data = text.value.encode()
    forms = {**_forms(header, kv), "text": (torch.uint8, (len(data),))}
    metadata = KVMetadata(header, {name: _described(*form) for name, form in forms.items()}, "0" * 2 * _HASH, behind)
    entry = metadata.entry()
    make_folder(folder)
    temp = new_temp(folder)
    try:
        with TensorFile(temp, forms, {ENTRY: entry}) as file:
            for tensors in _tensors(header, kv, depths=forms["counts"][1][1]):
                for name, tensor in tensors.items():
                    file.append(name, tensor)
            file.append("text", data)
            index = _index_hash({name: (metadata.tensors[name], file.read(name)) for name in forms})
            metadata = replace(metadata, index=index)
            file.describe({ENTRY: metadata.entry()})
        sync_file(temp)
    except BaseException as error:
        temp.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StoreError(f"the K/V of {header.id!r} could not be written into {folder}: {error}") from error
        raise
    rows = (forms[name] for name in forms if name not in (*_INDEX, "text"))
    return StagedFile(temp, metadata.root, sum(dtype.itemsize * math.prod(shape) for dtype, shape in rows))


def _forms(header: DocumentHeader, kv: StoredKV | WindowedKV) -> dict[str, Form]:
    """Return dtype and shape of all tensors of a file but the text; raises InputError for K/V that do not fit."""
    entries, groups, depths = 0, 0, 1
    precision = precision_of(kv)  # refuses what has none
    parts: Iterable[StoredKV] = kv.windows if isinstance(kv, WindowedKV) else [kv]
    whole = [(header.span, header.slots)]
    sizes = [(one.span, one.slots) for one in header.windows] if isinstance(kv, WindowedKV) else whole
    for part, (span, slots) in zip(parts, sizes, strict=True):
        if flaw := _misfit(part, span, slots):
            raise InputError(f"the K/V of {header.id!r} cannot be stored: {flaw}")
        entries += len(part.positions)
        groups += len(part.key_scales) if isinstance(part, QuantizedKV) else group_count(part.counts)
        if part.levels is not None and len(part.levels):
            depths = max(depths, LEVELS - int(part.levels.min()))
        shape = part.counts.shape
        head_dim = part.key_scales.shape[1] if isinstance(part, QuantizedKV) else part.keys.shape[1]
    sections = header.section_count
    forms: dict[str, Form] = {
        "places": (torch.uint8, (entries,)),
        "counts": (torch.uint8, (sections, depths, *shape)),
        "hashes": (torch.uint8, (sections, depths, _HASH)),
    }
    if precision.quantized:
        forms |= dict.fromkeys(("keys", "values"), (torch.uint8, (entries, head_dim * precision.bits // 8)))
        forms |= dict.fromkeys(_QUANTIZED_ROWS, (torch.float16, (entries,)))
        forms |= dict.fromkeys(_QUANTIZED_INDEX, (torch.float16, (groups, head_dim)))
    else:
        forms |= dict.fromkeys(("keys", "values"), (getattr(torch, precision), (entries, head_dim)))
    return forms


def _tensors(header: DocumentHeader, kv: StoredKV | WindowedKV, depths: int) -> Iterator[dict[str, Tensor]]:
    """Yield the rows of all tensors of a file but the text, in their order."""
    if not isinstance(kv, WindowedKV):
        yield _rows(header, kv.to("cpu"), header.sections, header.window_starts, depths)
        return
    of_windows = {number: list(own) for number, own in groupby(header.sections, key=lambda section: section.window)}
    for number, (part, start) in enumerate(zip(kv, header.window_starts, strict=True)):
        require_finite(header.id, part)
        placed = replace(part.to("cpu"), positions=part.positions + start)
        yield _rows(header, placed, of_windows.get(number, []), [start], depths)


def _rows(
    header: DocumentHeader, kv: StoredKV, sections: Sequence[SectionSpan], windows: Sequence[int], depths: int
) -> dict[str, Tensor]:
    """Return the rows of all tensors of a file that belong to some windows, which begin at these positions."""
    order, places, counts = file_order(kv, sections)
    counts = pad(counts, (0, 0, 0, 0, 0, depths - counts.shape[1]))
    keys, values = (part.index_select(0, order) for part in (kv.keys, kv.values))
    tensors = {"keys": keys, "values": values, "places": places, "counts": counts}
    if isinstance(kv, QuantizedKV):
        if not torch.equal(kv.groups, group_numbers(kv.positions, kv.counts, kv.levels, windows)):
            raise InputError(f"the K/V of {header.id!r} were not quantized window by window; see `quantized`")
        tensors |= {name: getattr(kv, name)[order] for name in _QUANTIZED_ROWS}
        tensors |= {name: getattr(kv, name) for name in _QUANTIZED_INDEX}
    hashes = b"".join(_rows_hashes(tensors, _runs(counts)))
    tensors["hashes"] = torch.tensor([*hashes], dtype=torch.uint8).view(*counts.shape[:2], _HASH)
    return tensors


def read_header(path: Path) -> DocumentHeader:
    """Read the header of a file, not its tensors.

    This, `read_index` and `read_kv_file` raise CorruptFileError, naming the file and what is wrong, for anything that
    `stage_kv_file` did not write, and let FileNotFoundError through.
    """
    _require_file(path)
    with _opened(path) as file:
        return read_metadata(path, file.metadata() or {})[0].header


def read_index(path: Path) -> StoredIndex:
    """Read header and index of a file, compared with their hashes."""
    index, _ = _mapped(path)
    return replace(index, counts=index.counts.clone())


def read_kv_file(path: Path, choose: Choose | None = None) -> StoredFile:
    """Read a file, or the part of its K/V that `choose` tells, and compare what is read with its hashes.

    Of a part, the text is not read: its hash is compared by `StoredFile.text`. Raises InputError if `choose`
    returns something else than one level for each section.
    """
    index, tensors = _mapped(path, whole=choose is None)
    header = index.header
    lowest = None if choose is None else _checked_choice(choose(index), header)
    _check_rows(path, tensors, lowest)
    try:
        kv = _kv(header, tensors, lowest)
        precision_of(kv)
    except InputError as error:
        raise corrupt(path, str(error)) from error
    if flaw := _misfit(kv, header.span, header.slots if lowest is None else None):
        raise corrupt(path, flaw)
    file = StoredFile(header, kv, tensors["text"], index.root, lowest, index.behind)
    if choose is None:
        try:
            _ = file.text  # so a damaged copy in a cache is known for one while it can be fetched anew
        except CorruptFileError as error:
            raise corrupt(path, str(error)) from error
    return file


def _mapped(path: Path, *, whole: bool = False) -> tuple[StoredIndex, dict[str, Tensor]]:
    """Return header and index of a file, read and compared, and all its tensors, mapped; whole: all are read next."""
    _require_file(path, whole=whole)
    with _opened(path) as file:
        metadata, root = read_metadata(path, file.metadata() or {})
        names = sorted(file.keys())
        quantized = "key_scales" in metadata.tensors
        wanted = {*_PLAIN_ROWS, *_INDEX, "text", *((_QUANTIZED_ROWS + _QUANTIZED_INDEX) if quantized else ())}
        if not set(names) == set(metadata.tensors) == wanted:
            raise corrupt(path, f"it holds {', '.join(names)}, but should hold {', '.join(sorted(wanted))}")
        tensors = {name: file.get_tensor(name) for name in names}  # mapped, so nothing is read yet
    for name, tensor in tensors.items():
        if _form(tensor) != metadata.tensors[name]:
            raise corrupt(path, f"its {name} are {_form(tensor)}, not {metadata.tensors[name]}")
        if not tensor.numel() and math.prod(filter(None, tensor.shape)) > _LARGEST_EMPTY:
            raise corrupt(path, f"its {name} have a shape that no model has: {list(tensor.shape)}")
    described = {name: (metadata.tensors[name], [tensor_bytes(one)]) for name, one in tensors.items()}
    if metadata.index != _index_hash(described):
        raise corrupt(path, "its index is not the one that was written: the hash differs")
    if tensors["text"].dtype != torch.uint8 or tensors["text"].ndim != 1:
        raise corrupt(path, f"its text is {_form(tensors['text'])}, and no bytes")
    try:
        _require_index(metadata.header, tensors)
    except InputError as error:
        raise corrupt(path, str(error)) from error
    return StoredIndex(metadata.header, tensors["counts"], root, metadata.behind), tensors


def _require_file(path: Path, *, whole: bool = False) -> None:
    """Refuse what is no plain file, or has a header longer than any of ours, before anything reads it as one.

    whole: whether the system may begin to read all of it, while its index is looked at.
    """
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
        if whole and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; see to the disk") from error
    finally:
        os.close(handle)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, MemoryError, RuntimeError, ValueError, TypeError) as error:
        if not identity(path):  # safe_open opens a file twice, the second time through torch: it vanished in between
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
        machines = isinstance(error, (OSError, MemoryError))
        if machines or any(os.strerror(one) in str(error) for one in _OF_THE_MACHINE):
            raise StoreError(f"{path} cannot be read: {error}; see to the disk and the machine's limits") from error
        if isinstance(error, SafetensorError):
            raise corrupt(path, f"it is not a whole safetensors file ({error})") from error
        raise corrupt(path, f"torch cannot read it ({error})") from error


def _require_index(header: DocumentHeader, tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError for an index that is none of this document, or promises other rows than there are."""
    counts, hashes = tensors["counts"], tensors["hashes"]
    of_bytes = counts.dtype == hashes.dtype == torch.uint8
    fitting = counts.ndim == 4 and 1 <= counts.shape[1] <= LEVELS and [*hashes.shape] == [*counts.shape[:2], _HASH]
    if not of_bytes or not fitting or len(counts) != header.section_count:
        flaw = f"its counts are {_form(counts)} and its hashes {_form(hashes)}"
        raise InputError(f"{flaw}, which cannot be those of {header.section_count} sections")
    entries = int(run_sizes(counts).sum())
    for name in (*_PLAIN_ROWS, *(name for name in _QUANTIZED_ROWS if name in tensors)):
        if not tensors[name].ndim or len(tensors[name]) != entries:
            raise InputError(f"its {name} are {_form(tensors[name])}, but its counts tell of {entries} entries")
    sizes = torch.tensor([section.size for section in header.sections], dtype=torch.int64)
    if len(sizes) and bool((head_sizes(counts) > sizes[:, None]).any()):
        raise InputError("a head has more entries in a section than that has positions")
    if tensors["places"].dtype != torch.uint8 or tensors["places"].ndim != 1:
        raise InputError(f"its places are {_form(tensors['places'])}")


def _checked_choice(lowest: Sequence[int], header: DocumentHeader) -> list[int]:
    """Return what `choose` has chosen; raises InputError for what says nothing of these sections."""
    if len(lowest) != header.section_count or not all(type(one) is int and 0 <= one <= LEVELS for one in lowest):
        raise InputError(
            f"choose must return a level from 0 to {LEVELS} for each of {header.section_count} sections of "
            f"{header.id!r}, got {list(lowest)[:20]}"
        )
    return list(lowest)


def _check_rows(path: Path, tensors: Mapping[str, Tensor], lowest: Sequence[int] | None) -> None:
    """Compare the rows that are loaded with their hashes; raises CorruptFileError."""
    written, runs = tensors["hashes"].flatten(0, 1), [*_runs(tensors["counts"])]
    if lowest is not None:
        loaded = [*_loaded_runs(lowest, tensors["counts"].shape[1])]
        written, runs = written[torch.tensor(loaded, dtype=torch.int64)], [runs[number] for number in loaded]
    if b"".join(_rows_hashes(tensors, runs)) != written.numpy().tobytes():
        raise corrupt(path, "its tensors are not those that were written: their hash differs")


def _loaded_runs(lowest: Sequence[int], depths: int) -> Iterator[int]:
    """Yield the numbers of the sections and levels that are loaded, among those of `_runs`."""
    for section, level in enumerate(lowest):
        yield from range(section * depths, section * depths + min(depths, LEVELS - level))


def _runs(counts: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the first row of each section and level, and the one behind its last."""
    stops = run_sizes(counts).flatten().cumsum(0).tolist()
    return zip([0, *stops], stops, strict=False)


def _kv(header: DocumentHeader, tensors: Mapping[str, Tensor], lowest: Sequence[int] | None) -> StoredKV:
    """Make K/V of the tensors of a file; raises InputError for tensors that cannot be any."""
    rows = rows_of(tensors["counts"], tensors["places"], header.sections, lowest)
    levels = rows.levels if tensors["counts"].shape[1] > 1 else None
    whole: dict[str, Any] = {
        "keys": _taken(tensors["keys"], rows.numbers),
        "values": _taken(tensors["values"], rows.numbers),
        "positions": rows.positions,
        "counts": rows.counts,
        "span": header.span,
        "levels": levels,
    }
    if "key_scales" not in tensors:
        return MemoryKV(**whole)
    width, head_dim = (tensors[name].shape[-1] if tensors[name].ndim else 0 for name in ("keys", "key_scales"))
    whole |= {name: tensors[name].index_select(0, rows.numbers) for name in _QUANTIZED_ROWS}
    whole |= {name: tensors[name] for name in _QUANTIZED_INDEX}
    groups = groups_of(tensors["counts"], header.sections, rows)
    kv = QuantizedKV(**whole, bits=8 * width // max(1, head_dim), groups=groups, dtype=torch.float32)
    return kv.with_own_groups()  # so that what is loaded holds neither the file nor more of it than it needs


def _taken(rows: Tensor, numbers: Tensor) -> Tensor:
    """Return some rows, in memory of numpy's if there are any: it has large pages, which the system gives sooner."""
    room = np.empty(len(numbers) * rows[:1].nbytes, np.uint8)
    if not room.size:
        return rows.index_select(0, numbers)
    taken = torch.from_numpy(room).view(rows.dtype).view(len(numbers), *rows.shape[1:])
    return torch.index_select(rows, 0, numbers, out=taken)


def _form(tensor: Tensor) -> dict[str, Any]:
    """Describe a tensor as the metadata does."""
    return _described(tensor.dtype, tensor.shape)


def _described(dtype: torch.dtype, shape: Sequence[int]) -> dict[str, Any]:
    return {"dtype": str(dtype), "shape": list(shape)}


def _index_hash(tensors: Mapping[str, tuple[Mapping[str, Any], Iterable[bytes | memoryview]]]) -> str:
    """Hash the index, each tensor behind its dtype and shape, with XXH3, which is fast and finds every accident.

    tensors: by their names, as the metadata describes them, and their bytes.
    """
    hasher = xxhash.xxh3_128()
    for name in (*_INDEX, *(name for name in _QUANTIZED_INDEX if name in tensors)):
        form, data = tensors[name]
        hasher.update(f"{name} {form['dtype']} {form['shape']}".encode())
        for chunk in data:
            hasher.update(chunk)
    return hasher.hexdigest()


def _rows_hashes(tensors: Mapping[str, Tensor], runs: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the hash of each run of rows, of all tensors that have one for each entry."""
    names = (*_PLAIN_ROWS, *(name for name in _QUANTIZED_ROWS if name in tensors))
    rows = [(tensor_bytes(tensors[name]), tensors[name][:1].nbytes) for name in names]
    for start, stop in runs:
        hasher = xxhash.xxh3_128()
        for data, width in rows:
            hasher.update(data[start * width : stop * width])
        yield hasher.digest()


def _misfit(kv: StoredKV, span: int, slots: int | None) -> str | None:
    """Say in what K/V differ from what they should be, None if in nothing; slots: of each head, if they are whole."""
    if kv.keys.dtype != kv.values.dtype:
        return f"its keys and values must have one dtype, got {kv.keys.dtype} and {kv.values.dtype}"
    if kv.positions.dtype != torch.int32:
        return f"its positions must be int32, got {kv.positions.dtype}; keep it before it is interpolated"
    if kv.span != span:
        return f"it spans {kv.span} positions, but its header says {span}"
    entries, heads = len(kv.positions), kv.counts.numel()
    if not heads or (kv.counts < 0).any():
        return f"one of its {heads} heads has {int(kv.counts.min()) if heads else 0} entries"
    if slots is not None and entries != slots * heads:
        return f"it holds {entries} entries, but its windows take {slots} slots of each of {heads} heads"
    low, high = (int(kv.positions.min()), int(kv.positions.max())) if entries else (0, 0)
    outside = entries and not 0 <= low <= high < kv.span
    return f"its positions go from {low} to {high}, but it spans {kv.span} positions" if outside else None
