"""Keys and values of a memory in 8 or 4 bits.

Some channels of keys are large in every token; values have no such channels (KIVI, arXiv 2402.02750). So keys are
quantized per channel, over groups of up to `GROUP` entries of one head, and values per token. The codes divide the
range from the smallest number of a group or token to its largest evenly; `zero`, the smallest number, and `scale`, the
step, are kept in float16. The entries of a group have like levels, so a part of a memory needs few groups.

Before keys are quantized to 4 bits, their channels are rotated by a Hadamard matrix as in QuaRot (arXiv 2404.00456).
Errors then spread evenly over all channels instead of being largest in the large ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from beacon_memory.documents import Precision
from beacon_memory.errors import InputError

from .levels import LEVELS, TOP_LEVEL
from .memory_kv import MemoryKV, counts_of, joined_levels, joining_order
from .moving import on_device
from .sizes import GROUP

__all__ = ["BITS", "GROUP", "QuantizedKV", "group_count", "group_numbers", "quantized"]

BITS = tuple(one.bits for one in Precision if one.quantized)
_LARGEST_ROTATION = 256  # part of the stored form, as GROUP: with others, stored files could not be read
_AT_ONCE = 1 << 13  # entries that are dequantized at a time
# The tensors that move to a device, those with one row for each entry first; counts stay on the CPU.
_OF_ENTRIES = ("keys", "values", "value_scales", "value_zeros", "positions", "groups")
_TENSORS = (*_OF_ENTRIES, "key_scales", "key_zeros")


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedKV:
    """A memory with quantized keys and values: each number is zero + code * scale.

    bits:         bits of a code, 8 or 4. In 4 bits keys were rotated before, see `_rotated`.
    keys, values: [entries, head_dim * bits / 8] uint8, the codes. With 4 bits, byte i holds the code of channel i in
                  its low half and that of channel head_dim / 2 + i in its high half.
    groups:       [entries] int32, the group that an entry's key was quantized in.
    key_scales, key_zeros:     [groups, head_dim] float16
    value_scales, value_zeros: [entries] float16
    positions, counts, span, levels: as in a MemoryKV.
    dtype:        dtype of the keys and values before they were quantized.

    Raises InputError for tensors that do not fit each other.
    """

    bits: int
    keys: Tensor
    values: Tensor
    groups: Tensor
    key_scales: Tensor
    key_zeros: Tensor
    value_scales: Tensor
    value_zeros: Tensor
    positions: Tensor
    counts: Tensor
    span: int
    dtype: torch.dtype
    levels: Tensor | None = None

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        if self.counts.ndim != 2 or self.counts.dtype != torch.int64 or bool((self.counts < 0).any()):
            raise InputError(
                "counts must be [layers, kv_heads] int64 of at least 0, "
                f"got {list(self.counts.shape)} {self.counts.dtype} {self.counts.flatten()[:4].tolist()}..."
            )
        if not self.dtype.is_floating_point:
            raise InputError(f"dtype must be one of floating point, got {self.dtype}")
        entries, groups = int(self.counts.sum()), len(self.key_scales)
        width = self.keys.shape[-1] if self.keys.ndim else 0
        head_dim = width * 8 // self.bits
        for names, shape, dtypes in (
            (("keys", "values"), (entries, width), (torch.uint8,)),
            (("key_scales", "key_zeros"), (groups, head_dim), (torch.float16,)),
            (("value_scales", "value_zeros"), (entries,), (torch.float16,)),
            (("positions",), (entries,), (torch.int32, torch.float32)),
            (("groups",), (entries,), (torch.int32,)),
            (("levels",) if self.levels is not None else (), (entries,), (torch.uint8,)),
        ):
            for name in names:
                tensor: Tensor = getattr(self, name)
                if tensor.shape != shape or tensor.dtype not in dtypes:
                    raise InputError(
                        f"{name} must be {list(shape)} {' or '.join(map(str, dtypes))}, "
                        f"got {list(tensor.shape)} {tensor.dtype}"
                    )
        if entries and self.groups.device.type == "cpu":  # they came from a file; elsewhere, this would wait for it
            low, high = (int(one) for one in self.groups.aminmax())
            if not 0 <= low <= high < groups:
                raise InputError(f"groups must be numbers from 0 to {groups - 1}, got {low} to {high}")

    @property
    def slots(self) -> int:
        """Return how many entries a head has: the mean over all heads, rounded up."""
        return -(-len(self.keys) // self.counts.numel())

    @property
    def least_span(self) -> int:
        """Return the smallest span that the memory may be interpolated to, see `MemoryKV.concat`."""
        return min(self.slots, self.span)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors except counts, levels and groups, which follow from these."""
        return sum(int(getattr(self, name).nbytes) for name in _TENSORS if name != "groups")

    def to(self, device: torch.device | str | None) -> QuantizedKV:
        """Return the same memory on another device, see `on_device`."""
        tensors: dict[str, Any] = {name: on_device(getattr(self, name), device) for name in _TENSORS}
        levels = None if self.levels is None else self.levels.to(device)
        return replace(self, **tensors, levels=levels)

    def dequantized(self, dtype: torch.dtype | None = None) -> MemoryKV:
        """Return the memory with numbers instead of codes, by default in the dtype that it had before."""
        dtype = dtype or self.dtype
        shape = (len(self.keys), self.key_scales.shape[1])
        keys, values = (torch.empty(shape, dtype=dtype, device=self.keys.device) for _ in range(2))
        for start in range(0, len(keys), _AT_ONCE):  # for it takes several times their bytes meanwhile
            rows = slice(start, start + _AT_ONCE)
            keys[rows], values[rows] = self.numbers(rows)
        return MemoryKV(keys, values, self.positions, self.counts, self.span, self.levels)

    def numbers(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the keys and values of some entries, [entries, head_dim] float32."""
        groups = self.groups[rows]
        keys = _decoded(_unpacked(self.keys[rows], self.bits), self.key_scales[groups], self.key_zeros[groups])
        scales, zeros = self.value_scales[rows, None], self.value_zeros[rows, None]
        values = _decoded(_unpacked(self.values[rows], self.bits), scales, zeros)
        return _rotated(keys) if _is_rotated(self.bits) else keys, values

    def interpolated(self, span: int) -> QuantizedKV:
        """Return the same entries on a smaller span, see `MemoryKV.interpolated`."""
        if span >= self.span:
            return self
        return replace(self, positions=self.positions.float() * (span / self.span), span=span)

    def taken(self, entries: Tensor, positions: Tensor, counts: Tensor, span: int) -> QuantizedKV:
        """Return some entries elsewhere; takes what `MemoryKV.taken` takes. All groups stay."""
        of_entries: dict[str, Any] = {name: getattr(self, name)[entries] for name in _OF_ENTRIES}
        levels = None if self.levels is None else self.levels[entries]
        return replace(self, **of_entries | {"positions": positions}, counts=counts, span=span, levels=levels)

    def grown(self, start: int, new: MemoryKV, windows: Sequence[int] = ()) -> QuantizedKV:
        """Return this memory with `new` in place of everything from position `start` on, quantized like this one.

        A window begins at `start`, so groups lie on one side of it, and codes that stay are copied: they do not drift
        when a memory grows many times.

        windows: the positions at which the windows of what comes out begin, if there are several in `new`.
        """
        return QuantizedKV.concat([self._until(start), quantized(new, self.bits, [one - start for one in windows])])

    @staticmethod
    def concat(parts: Sequence[QuantizedKV]) -> QuantizedKV:
        """Join memories of the same bits, each at the positions after the one before; codes are copied.

        Each must begin where a window does. Raises InputError for no parts, or for different bits.
        """
        if not parts or len({part.bits for part in parts}) > 1:
            raise InputError(f"QuantizedKV.concat needs memories of the same bits, got {[part.bits for part in parts]}")
        order = joining_order([part.counts for part in parts]).to(parts[0].keys.device)
        spans = accumulate((part.span for part in parts), initial=0)
        groups = accumulate((len(part.key_scales) for part in parts), initial=0)
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
        joined["positions"] = torch.cat([part.positions + span for part, span in zip(parts, spans, strict=False)])
        joined["groups"] = torch.cat([part.groups + before for part, before in zip(parts, groups, strict=False)])
        joined |= {name: joined[name][order] for name in _OF_ENTRIES}
        return replace(
            parts[0],
            **joined,
            counts=torch.stack([part.counts for part in parts]).sum(0),
            span=sum(part.span for part in parts),
            levels=joined_levels([(part.levels, part.positions) for part in parts], order),
        )

    def _until(self, stop: int) -> QuantizedKV:
        """Return the entries at positions below `stop`, and their groups."""
        kept = self.positions < stop
        of_entries: dict[str, Any] = {name: getattr(self, name)[kept] for name in _OF_ENTRIES}
        levels = None if self.levels is None else self.levels[kept]
        part = replace(self, **of_entries, counts=counts_of(self.counts, kept), span=stop, levels=levels)
        return part.with_own_groups()

    def with_own_groups(self) -> QuantizedKV:
        """Return the same memory with the scales and zeros of its own groups alone, in tensors of their own."""
        numbers, groups = self.groups.unique(return_inverse=True)
        own = {name: getattr(self, name)[numbers] for name in ("key_scales", "key_zeros")}
        return replace(self, groups=groups.to(torch.int32), **own)


def quantized(kv: MemoryKV, bits: int, windows: Sequence[int] = ()) -> QuantizedKV:
    """Quantize a memory to 8 or 4 bits. Each number is off by half a scale at most; in 4 bits, keys are rotated before.

    windows: the positions at which windows begin, if there are several: no group spans two of them.

    Raises InputError for other bits, for an odd head_dim in 4 bits, and for numbers that are not finite or too large
    for float16.
    """
    _check_bits(bits)
    head_dim = kv.keys.shape[1]
    if head_dim * bits % 8:
        raise InputError(f"head_dim is {head_dim}, but must be even for {bits} bits: two numbers share a byte")
    keys, values = kv.keys.float(), kv.values.float()
    if _is_rotated(bits):
        keys = _rotated(keys)
    groups = group_numbers(kv.positions, kv.counts, kv.levels, windows)
    key_scales, key_zeros = _fitted("keys", *_ranges(keys, groups), bits)
    value_scales, value_zeros = _fitted("values", *values.aminmax(dim=1), bits)
    return QuantizedKV(
        bits=bits,
        keys=_packed(_encoded(keys, key_scales[groups], key_zeros[groups], bits), bits),
        values=_packed(_encoded(values, value_scales[:, None], value_zeros[:, None], bits), bits),
        groups=groups,
        key_scales=key_scales,
        key_zeros=key_zeros,
        value_scales=value_scales,
        value_zeros=value_zeros,
        positions=kv.positions,
        counts=kv.counts,
        span=kv.span,
        dtype=kv.keys.dtype,
        levels=kv.levels,
    )


def group_count(counts: Tensor) -> int:
    """Return how many groups the entries of one window make; counts: of each head, [layers, kv_heads]."""
    return int((-(-counts // GROUP)).sum())


def group_numbers(positions: Tensor, counts: Tensor, levels: Tensor | None, windows: Sequence[int] = ()) -> Tensor:
    """Return the group of each entry: [entries] int32.

    The entries of one head in one window, those of the highest levels first and then by position, make groups of
    `GROUP`; the last has those that are left over. Groups are numbered by window, head and then in this order. For the
    arguments see `MemoryKV` and `quantized`.
    """
    each = counts.flatten().to(positions.device)
    heads = torch.arange(len(each), device=positions.device).repeat_interleave(each)
    starts = torch.tensor([start for start in windows if start > 0], dtype=positions.dtype, device=positions.device)
    cells = torch.bucketize(positions, starts, right=True) * len(each) + heads
    depths = 0 if levels is None else TOP_LEVEL - levels.long()
    order = (cells * LEVELS + depths).argsort(stable=True)
    sizes = cells.bincount(minlength=(len(starts) + 1) * len(each))
    groups_of = -(-sizes // GROUP)
    ordered = cells[order]
    rank = torch.arange(len(ordered), device=positions.device) - (sizes.cumsum(0) - sizes)[ordered]
    groups = torch.empty_like(ordered)
    groups[order] = (groups_of.cumsum(0) - groups_of)[ordered] + rank // GROUP
    return groups.to(torch.int32)


def _check_bits(bits: object) -> None:
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"bits is {bits!r}, but must be one of {', '.join(map(str, BITS))}")


def _is_rotated(bits: int) -> bool:
    return bits == 4


def _rotated(keys: Tensor) -> Tensor:
    """Multiply keys [n, head_dim] float32 by Sylvester's Hadamard matrix over sqrt(size), which is its own inverse.

    The size of the matrix is the largest power of two that divides head_dim, up to `_LARGEST_ROTATION`. If head_dim is
    larger, each block of that many channels is rotated by itself.
    """
    size = min(max(1, keys.shape[1] & -keys.shape[1]), _LARGEST_ROTATION)
    matrix = keys.new_ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix.new_tensor([[1, 1], [1, -1]]), matrix)
    blocks = keys.reshape(len(keys), keys.shape[1] // size, size)
    return (blocks @ (matrix / math.sqrt(size))).flatten(1)


def _ranges(keys: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest number of each channel in each group: [groups, head_dim] each."""
    count = int(groups.max()) + 1 if len(groups) else 0
    index = groups.long()[:, None].expand_as(keys)
    low, high = keys.new_zeros(count, keys.shape[1]), keys.new_zeros(count, keys.shape[1])
    low.scatter_reduce_(0, index, keys, "amin", include_self=False)
    high.scatter_reduce_(0, index, keys, "amax", include_self=False)
    return low, high


def _fitted(name: str, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scales and zeros, float16, for numbers from `low` to `high`, float32, all of one shape.

    The smallest number must get code 0 and the largest the last code, although scale and zero are rounded to float16.
    Rounding changes a zero by at most 2^-11 of itself. That is less than half a scale, because the scale is made at
    least a thousandth of the zero, still four times as fine as bfloat16. Rounding changes a scale that is not
    subnormal by at most 2^-11 of itself, which at code 255 amounts to an eighth of a scale.
    """
    zeros = low.half()
    span = (high - zeros) / (2**bits - 1)
    scales = span.maximum(zeros.abs().float() / 1000).clamp(min=torch.finfo(torch.float16).tiny).half()
    if not (zeros.isfinite().all() and scales.isfinite().all()):
        raise InputError(f"{name} from {low.min()} to {high.max()} cannot be quantized: not all are within float16")
    return scales, zeros


def _encoded(numbers: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Return the codes of numbers: the same shape, uint8."""
    return ((numbers - zeros) / scales.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)


def _decoded(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return the numbers that codes stand for: the same shape, float32."""
    return codes * scales.float() + zeros


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [entries, head_dim] into bytes [entries, head_dim * bits / 8]."""
    if bits == 8:
        return codes
    low, high = codes.chunk(2, dim=1)
    return low | high << 4


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    """Undo `_packed`."""
    return codes if bits == 8 else torch.cat([codes & 15, codes >> 4], dim=1)
