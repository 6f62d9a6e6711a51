"""Keys and values of a memory in 8 or 4 bits.

Some channels of keys are large in every token; values have no such channels (KIVI, arXiv 2402.02750). So keys are
quantized per channel, over groups of `GROUP` successive entries of one head, and values per token. The codes divide the
range from the smallest number of a group or token to its largest evenly; `zero`, the smallest number, and `scale`, the
step, are kept in float16.

Before keys are quantized to 4 bits, their channels are rotated by a Hadamard matrix as in QuaRot (arXiv 2404.00456).
Errors then spread evenly over all channels instead of being largest in the large ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from beacon_memory.documents import Precision
from beacon_memory.errors import InputError

from .memory_kv import MemoryKV

__all__ = ["BITS", "GROUP", "QuantizedKV", "quantized"]

BITS = tuple(one.bits for one in Precision if one.quantized)
# Both numbers are part of the stored form: with others, stored files could not be read.
GROUP = 64
_LARGEST_ROTATION = 256
# The tensors that move to a device; counts stay on the CPU.
_TENSORS = ("keys", "values", "key_scales", "key_zeros", "value_scales", "value_zeros", "positions")


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedKV:
    """A memory with quantized keys and values: each number is zero + code * scale.

    bits:         bits of a code, 8 or 4.
    keys, values: [entries, head_dim * bits / 8] uint8, the codes. With 4 bits, byte i holds the code of channel i in
                  its low half and that of channel head_dim / 2 + i in its high half.
    key_scales, key_zeros:     [groups, head_dim] float16. A group has `GROUP` entries; the last group of each head has
                  those that are left over.
    value_scales, value_zeros: [entries] float16
    positions, counts, span:   as in a MemoryKV.
    dtype:        dtype of the keys and values before they were quantized.
    rotated:      whether keys were rotated before they were quantized, see `_rotated`.

    Raises InputError for tensors that do not fit each other.
    """

    bits: int
    keys: Tensor
    values: Tensor
    key_scales: Tensor
    key_zeros: Tensor
    value_scales: Tensor
    value_zeros: Tensor
    positions: Tensor
    counts: Tensor
    span: int
    dtype: torch.dtype
    rotated: bool

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        if self.counts.ndim != 2 or self.counts.dtype != torch.int64 or bool((self.counts < 0).any()):
            raise InputError(
                "counts must be [layers, kv_heads] int64 of at least 0, "
                f"got {list(self.counts.shape)} {self.counts.dtype} {self.counts.flatten()[:4].tolist()}..."
            )
        if not self.dtype.is_floating_point:
            raise InputError(f"dtype must be one of floating point, got {self.dtype}")
        if type(self.rotated) is not bool:
            raise InputError(f"rotated must be true or false, got {self.rotated!r}")
        entries, groups = int(self.counts.sum()), int(_groups(self.counts).sum())
        width = self.keys.shape[-1] if self.keys.ndim else 0
        head_dim = width * 8 // self.bits
        for names, shape, dtypes in (
            (("keys", "values"), (entries, width), (torch.uint8,)),
            (("key_scales", "key_zeros"), (groups, head_dim), (torch.float16,)),
            (("value_scales", "value_zeros"), (entries,), (torch.float16,)),
            (("positions",), (entries,), (torch.int32, torch.float32)),
        ):
            for name in names:
                tensor: Tensor = getattr(self, name)
                if tensor.shape != shape or tensor.dtype not in dtypes:
                    raise InputError(
                        f"{name} must be {list(shape)} {' or '.join(map(str, dtypes))}, "
                        f"got {list(tensor.shape)} {tensor.dtype}"
                    )

    @property
    def slots(self) -> int:
        """Return how many entries a head has: the mean over all heads, rounded up."""
        return -(-len(self.keys) // self.counts.numel())

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors except the counts."""
        return sum(int(getattr(self, name).nbytes) for name in _TENSORS)

    def to(self, device: torch.device | str | None) -> QuantizedKV:
        """Return the same memory on another device."""
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, **moved)

    def dequantized(self, dtype: torch.dtype | None = None) -> MemoryKV:
        """Return the memory with numbers instead of codes, by default in the dtype that it had before."""
        dtype = dtype or self.dtype
        group = _numbered(_group_sizes(self.counts).to(self.keys.device), len(self.keys))
        keys = _decoded(_unpacked(self.keys, self.bits), self.key_scales[group], self.key_zeros[group])
        if self.rotated:
            keys = _rotated(keys)
        values = _decoded(_unpacked(self.values, self.bits), self.value_scales[:, None], self.value_zeros[:, None])
        return MemoryKV(keys.to(dtype), values.to(dtype), self.positions, self.counts, self.span)

    def grown(self, start: int, new: MemoryKV) -> QuantizedKV:
        """Return this memory with `new` in place of everything from position `start` on, quantized like this one.

        Codes that stay are copied and not computed again, so that they do not drift when a memory grows many times.
        Only keys in a group that is not full are quantized again, together with those that fill it.
        """
        grown = _quantized(self.dequantized(torch.float32).grown(start, new), self.bits, rotated=self.rotated)
        old, now = self.counts.flatten(), grown.counts.flatten()
        # how many entries before each entry are replaced
        gone = torch.nn.functional.pad((self.positions >= start).cpu().long().cumsum(0), (1, 0))
        head = _numbered(old, len(self.positions))
        # how many first entries each head keeps
        same = head[gone[1:] == gone[old.cumsum(0) - old][head]].bincount(minlength=len(old))
        full = same // GROUP
        for names, sizes, new_sizes, taken in (
            (("values", "value_scales", "value_zeros"), old, now, same),
            (("keys",), old, now, full * GROUP),
            (("key_scales", "key_zeros"), _groups(self.counts), _groups(grown.counts), full),
        ):
            source, target = _first(sizes, taken), _first(new_sizes, taken)
            for name in names:
                getattr(grown, name)[target] = getattr(self, name)[source]
        return grown


def quantized(kv: MemoryKV, bits: int) -> QuantizedKV:
    """Quantize a memory to 8 or 4 bits. Each number is off by half a scale at most; in 4 bits, keys are rotated before.

    Raises InputError for other bits, for an odd head_dim in 4 bits, and for numbers that are not finite or too large
    for float16.
    """
    return _quantized(kv, bits, rotated=bits == 4)


def _quantized(kv: MemoryKV, bits: int, *, rotated: bool) -> QuantizedKV:
    _check_bits(bits)
    head_dim = kv.keys.shape[1]
    if head_dim * bits % 8:
        raise InputError(f"head_dim is {head_dim}, but must be even for {bits} bits: two numbers share a byte")
    keys, values = kv.keys.float(), kv.values.float()
    if rotated:
        keys = _rotated(keys)
    sizes = _group_sizes(kv.counts).to(keys.device)
    starts = sizes.cumsum(0) - sizes
    # a group that is not full is filled up with copies of its last entry, which leave its range as it is
    members = starts[:, None] + torch.arange(GROUP, device=keys.device).minimum(sizes[:, None] - 1)
    key_scales, key_zeros = _fitted("keys", keys[members], bits)
    value_scales, value_zeros = _fitted("values", values, bits)
    group = _numbered(sizes, len(keys))
    return QuantizedKV(
        bits=bits,
        keys=_packed(_encoded(keys, key_scales[group], key_zeros[group], bits), bits),
        values=_packed(_encoded(values, value_scales[:, None], value_zeros[:, None], bits), bits),
        key_scales=key_scales,
        key_zeros=key_zeros,
        value_scales=value_scales,
        value_zeros=value_zeros,
        positions=kv.positions,
        counts=kv.counts,
        span=kv.span,
        dtype=kv.keys.dtype,
        rotated=rotated,
    )


def _check_bits(bits: object) -> None:
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"bits is {bits!r}, but must be one of {', '.join(map(str, BITS))}")


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


def _groups(counts: Tensor) -> Tensor:
    """Return how many groups each head has: [heads], from counts [layers, kv_heads]."""
    return -(-counts.flatten() // GROUP)


def _group_sizes(counts: Tensor) -> Tensor:
    """Return how many entries each group has: [groups], from counts [layers, kv_heads]."""
    counts = counts[counts > 0]  # so that every head that is left has a last group
    groups = _groups(counts)
    sizes = torch.full((int(groups.sum()),), GROUP)
    sizes[groups.cumsum(0) - 1] -= -counts % GROUP
    return sizes


def _numbered(sizes: Tensor, entries: int) -> Tensor:
    """Return the number of the group that each entry is in: [entries], from sizes [groups]."""
    return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=entries)


def _first(sizes: Tensor, taken: Tensor) -> Tensor:
    """Return the indices of the first `taken` elements of each run, where runs of these sizes follow each other.

    For sizes 3, 2 and taken 2, 1: the indices 0, 1 and 3.
    """
    shifts = (sizes.cumsum(0) - sizes) - (taken.cumsum(0) - taken)
    return torch.arange(int(taken.sum())) + shifts.repeat_interleave(taken)


def _fitted(name: str, numbers: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scales and zeros [n, ...] float16 for numbers [n, members that share them, ...] float32.

    The smallest number must get code 0 and the largest the last code, although scale and zero are rounded to float16.
    Rounding changes a zero by at most 2^-11 of itself. That is less than half a scale, because the scale is made at
    least a thousandth of the zero, still four times as fine as bfloat16. Rounding changes a scale that is not
    subnormal by at most 2^-11 of itself, which at code 255 amounts to an eighth of a scale.
    """
    low, high = numbers.aminmax(dim=1)
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
