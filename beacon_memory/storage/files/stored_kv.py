"""K/V as a file keeps them: plain or quantized, in which precision, and how large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from beacon_memory.documents import Precision
from beacon_memory.errors import InputError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import QuantizedKV, quantized

__all__ = ["StoredKV", "WindowedKV", "not_finite", "precision_of", "require_finite", "stored_bytes", "with_precision"]

StoredKV = MemoryKV | QuantizedKV


@dataclass(frozen=True, slots=True, eq=False)
class WindowedKV:
    """K/V of a document window by window, so that one that is kept elsewhere need not be in RAM as a whole.

    windows:   the memory of each, one or more, at positions of its own; iterated over several times.
    precision: what each is converted to when its turn comes.
    """

    windows: Iterable[MemoryKV]
    precision: Precision

    def __iter__(self) -> Iterator[StoredKV]:
        return (with_precision(window, self.precision) for window in self.windows)


def precision_of(kv: StoredKV | WindowedKV) -> Precision:
    """Return the precision of K/V; raises InputError for a dtype that is none."""
    if isinstance(kv, WindowedKV):
        return kv.precision
    if isinstance(kv, QuantizedKV):
        return Precision(f"int{kv.bits}")
    if not kv.keys.dtype.is_floating_point:
        raise InputError(f"keys and values must be of floating point, or quantized, got {kv.keys.dtype}")
    return Precision(str(kv.keys.dtype).removeprefix("torch."))


@overload
def with_precision(kv: StoredKV, precision: Precision | str, windows: Sequence[int] = ()) -> StoredKV: ...


@overload
def with_precision(kv: WindowedKV, precision: Precision | str, windows: Sequence[int] = ()) -> WindowedKV: ...


def with_precision(
    kv: StoredKV | WindowedKV, precision: Precision | str, windows: Sequence[int] = ()
) -> StoredKV | WindowedKV:
    """Convert K/V to another precision; raises InputError if they hold less than that, as int4 K/V for int8.

    windows: the positions at which windows begin, if there are several.
    """
    if isinstance(kv, WindowedKV):
        return replace(kv, precision=Precision(precision))
    now, wanted = precision_of(kv), Precision(precision)
    if now is wanted:
        return kv
    if now.quantized and wanted.bits > now.bits:
        raise InputError(f"{now} K/V hold no more than that: to keep them as {wanted}, compress the document anew")
    memory = kv.dequantized(torch.float32) if isinstance(kv, QuantizedKV) else kv
    return quantized(memory, wanted.bits, windows) if wanted.quantized else memory.to(dtype=getattr(torch, wanted))


def stored_bytes(kv: StoredKV) -> int:
    """Count the bytes that keys, values and positions take in a file, where a position takes one."""
    return kv.nbytes - kv.positions.nbytes + len(kv.positions)


def require_finite(id: str, kv: StoredKV) -> None:
    """Raise InputError for K/V of a document that hold NaN or infinity."""
    if flaw := not_finite(kv):
        raise InputError(f"{id!r} cannot be stored: {flaw}; compress it anew, or keep it in bfloat16")


def not_finite(kv: StoredKV) -> str | None:
    """Say which numbers of K/V are NaN or infinite, None if none: with them any answer would be noise."""
    names = (
        ("key_scales", "key_zeros", "value_scales", "value_zeros")
        if isinstance(kv, QuantizedKV)
        else ("keys", "values")
    )
    for name in names:
        tensor: Tensor = getattr(kv, name)
        if tensor.numel() and not all(one.isfinite() for one in tensor.aminmax()):  # of NaN both are NaN
            return f"its {name.replace('_', ' ')}, kept in {precision_of(kv)}, hold NaN or infinity"
    return None
