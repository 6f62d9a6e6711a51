"""Keys and values without positions: the part of a text that is kept.

`BeaconKV` is a dense stack: every head has the same slots. A forward pass gives and takes K/V in this form.
`MemoryKV` is ragged: each head of each layer has as many entries as it needs. Documents are kept in this form, because
heads differ very much: some look up every word of a text, most attend to almost none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from beacon_memory.errors import InputError

from .levels import TOP_LEVEL

__all__ = ["BeaconKV", "MemoryKV", "counts_of", "fitting_spans", "joined_levels", "joining_order"]


@dataclass(frozen=True, slots=True, eq=False)
class BeaconKV:
    """Keys and values of memory slots, the same slots for every head of every layer.

    keys:   [layers, kv_heads, slots, head_dim], **before** RoPE, so a slot has no position until it is loaded.
    values: [layers, kv_heads, slots, head_dim]
    """

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.keys.ndim != 4 or self.keys.shape != self.values.shape:
            raise InputError(
                "keys and values must both be [layers, kv_heads, slots, head_dim], "
                f"got {tuple(self.keys.shape)} and {tuple(self.values.shape)}"
            )

    @classmethod
    def empty(
        cls,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> BeaconKV:
        """Return K/V with no slots."""
        shape = (layers, kv_heads, 0, head_dim)
        return cls(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))

    @property
    def slots(self) -> int:
        """Return the number of memory slots. Each takes one position of the model."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys and values together."""
        return self.keys.nbytes + self.values.nbytes

    def __getitem__(self, slots: slice | Tensor) -> BeaconKV:
        """Return the K/V of some slots, given as a slice or as a tensor of slot numbers."""
        return BeaconKV(self.keys[:, :, slots], self.values[:, :, slots])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BeaconKV:
        """Return the same K/V on another device or in another dtype."""
        return BeaconKV(self.keys.to(device=device, dtype=dtype), self.values.to(device=device, dtype=dtype))

    @staticmethod
    def concat(parts: Sequence[BeaconKV]) -> BeaconKV:
        """Join the slots of all parts, one after another; a single part is not copied. Raises InputError for none."""
        if not parts:
            raise InputError("BeaconKV.concat needs at least one part")
        parts = [part for part in parts if part.slots] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        return BeaconKV(
            torch.cat([part.keys for part in parts], dim=2), torch.cat([part.values for part in parts], dim=2)
        )


@dataclass(frozen=True, slots=True, eq=False)
class MemoryKV:
    """The memory of a text: keys and values, where each head has entries of its own.

    keys:   [entries, head_dim], **before** RoPE. An entry is one slot of one head; entries are in the order layer, kv
            head, position.
    values: [entries, head_dim]
    positions: [entries] position of each entry within the memory, 0 to span - 1; int32, or float32 once interpolated.
    counts: [layers, kv_heads] int64, on the CPU: how many entries each head has.
    span:   how many positions of the model the memory takes. An interpolated memory takes fewer than it has tokens.
    levels: [entries] uint8, see `kv.levels`; None if no entry is ever left out.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    counts: Tensor
    span: int
    levels: Tensor | None = None

    def __post_init__(self) -> None:
        entries = int(self.counts.sum())
        if self.keys.ndim != 2 or self.keys.shape != self.values.shape or len(self.keys) != entries:
            raise InputError(
                f"keys and values must both be [{entries} entries, head_dim], "
                f"got {tuple(self.keys.shape)} and {tuple(self.values.shape)}"
            )
        if self.positions.shape != (entries,) or self.counts.ndim != 2:
            raise InputError(
                f"positions must be [{entries} entries] and counts [layers, kv_heads], "
                f"got {tuple(self.positions.shape)} and {tuple(self.counts.shape)}"
            )
        if self.levels is not None and (self.levels.shape != (entries,) or self.levels.dtype != torch.uint8):
            raise InputError(
                f"levels must be [{entries} entries] uint8, got {tuple(self.levels.shape)} {self.levels.dtype}"
            )

    @classmethod
    def of(cls, stack: BeaconKV) -> MemoryKV:
        """Return a stack as a memory: slot j of every head becomes an entry at position j."""
        layers, heads, slots, _ = stack.keys.shape
        return cls(
            keys=stack.keys.flatten(0, 2),
            values=stack.values.flatten(0, 2),
            positions=torch.arange(slots, dtype=torch.int32, device=stack.keys.device).repeat(layers * heads),
            counts=torch.full((layers, heads), slots),
            span=slots,
        )

    @classmethod
    def chosen(cls, stack: BeaconKV, kept: Tensor, levels: Tensor | None = None) -> MemoryKV:
        """Return the slots that each head keeps as a memory with the span of the whole stack.

        kept, levels: [layers, kv_heads, slots], bool and uint8.
        """
        return cls(
            keys=stack.keys[kept],
            values=stack.values[kept],
            positions=kept.nonzero()[:, 2].to(torch.int32),
            counts=kept.sum(-1).cpu(),
            span=stack.slots,
            levels=None if levels is None else levels[kept],
        )

    @property
    def slots(self) -> int:
        """Return how many entries a head has: the mean over all heads, rounded up."""
        return -(-len(self.keys) // self.counts.numel())

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys, values and positions together."""
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes

    @property
    def least_span(self) -> int:
        """Return the smallest span that `concat` may interpolate this memory to."""
        return min(self.slots, self.span)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryKV:
        """Return the same memory on another device, with keys and values in another dtype."""
        keys, values = (part.to(device=device, dtype=dtype) for part in (self.keys, self.values))
        levels = None if self.levels is None else self.levels.to(device)
        return replace(self, keys=keys, values=values, positions=self.positions.to(device), levels=levels)

    def interpolated(self, span: int) -> MemoryKV:
        """Return the same entries with all positions scaled down to a smaller span; a larger one changes nothing.

        This is position interpolation (Chen et al., arXiv 2306.15595).
        """
        if span >= self.span:
            return self
        return replace(self, positions=self.positions.float() * (span / self.span), span=span)

    def between(self, start: int, stop: int) -> MemoryKV:
        """Return the entries at positions from `start` to below `stop` as a memory that begins at position 0.

        So it takes apart what `concat` has joined.
        """
        part = self.only((self.positions >= start) & (self.positions < stop))
        return replace(part, positions=part.positions - start, span=stop - start)

    def from_level(self, level: int) -> MemoryKV:
        """Return the entries of a level and above, at their positions; all, if they have no levels."""
        return self if self.levels is None or not level else self.only(self.levels >= level)

    def only(self, kept: Tensor) -> MemoryKV:
        """Return some entries, at their positions; kept: [entries] bool."""
        return replace(
            self,
            keys=self.keys[kept],
            values=self.values[kept],
            positions=self.positions[kept],
            counts=counts_of(self.counts, kept),
            levels=None if self.levels is None else self.levels[kept],
        )

    def taken(self, entries: Tensor, positions: Tensor, counts: Tensor, span: int) -> MemoryKV:
        """Return some entries elsewhere.

        entries: their numbers, in the order that a memory has. positions, counts, span: of what comes out.
        """
        levels = None if self.levels is None else self.levels[entries]
        return MemoryKV(self.keys[entries], self.values[entries], positions, counts, span, levels)

    def grown(self, start: int, new: MemoryKV) -> MemoryKV:
        """Return this memory with `new` in place of everything from position `start` on, in the dtype of this one."""
        return MemoryKV.concat([self.between(0, start), new.to(dtype=self.keys.dtype)])

    def stack(self) -> BeaconKV:
        """Return this memory as a stack. Raises InputError unless every head has an entry at every position."""
        shape = (*self.counts.shape, self.span)
        positions = torch.arange(self.span, device=self.positions.device)
        if (self.counts != self.span).any() or (self.positions.unflatten(0, shape) != positions).any():
            raise InputError(
                f"a memory of {self.span} positions with {int(self.counts.min())} to {int(self.counts.max())} entries "
                "in a head is no stack: not every head has one at every position"
            )
        return BeaconKV(self.keys.unflatten(0, shape), self.values.unflatten(0, shape))

    def layer(self, number: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return keys, values and positions of each head of a layer, as views [entries of the head, ...]."""
        start = int(self.counts[:number].sum())
        sizes = self.counts[number].tolist()
        stop = start + sum(sizes)
        parts = (part[start:stop].split(sizes) for part in (self.keys, self.values, self.positions))
        return list(zip(*parts, strict=True))

    @staticmethod
    def concat(parts: Sequence[MemoryKV], room: int | None = None) -> MemoryKV:
        """Join memories, each at the positions after the one before. A single part is not copied.

        room: how many positions there are. If the spans need more, every part is interpolated, see `fitting_spans`.
        Raises InputError for no parts.
        """
        if not parts:
            raise InputError("MemoryKV.concat needs at least one part")
        if room is not None:
            spans = fitting_spans([(part.span, part.least_span) for part in parts], room)
            parts = [part.interpolated(span) for part, span in zip(parts, spans, strict=True)]
        if len(parts) == 1:
            return parts[0]
        offsets = [0, *accumulate(part.span for part in parts)]
        order = joining_order([part.counts for part in parts]).to(parts[0].keys.device)
        positions = [part.positions + offset for part, offset in zip(parts, offsets, strict=False)]
        return MemoryKV(
            keys=torch.cat([part.keys for part in parts])[order],
            values=torch.cat([part.values for part in parts])[order],
            positions=torch.cat(positions)[order],
            counts=torch.stack([part.counts for part in parts]).sum(0),
            span=offsets[-1],
            levels=joined_levels([(part.levels, part.positions) for part in parts], order),
        )


def counts_of(counts: Tensor, kept: Tensor) -> Tensor:
    """Return how many entries each head has of those that are kept, [layers, kv_heads] int64; kept: [entries] bool."""
    heads = torch.arange(counts.numel()).repeat_interleave(counts.flatten())
    return heads[kept.cpu()].bincount(minlength=counts.numel()).view_as(counts)


def joining_order(counts: Sequence[Tensor]) -> Tensor:
    """Return which entry of several memories, one behind another, comes next where each head has those of all.

    counts: of each memory, [layers, kv_heads]; the result is [entries of all].
    """
    heads = torch.arange(counts[0].numel())
    return torch.cat([heads.repeat_interleave(one.flatten()) for one in counts]).argsort(stable=True)


def joined_levels(parts: Sequence[tuple[Tensor | None, Tensor]], order: Tensor) -> Tensor | None:
    """Return the levels of joined memories; entries of one that has none are never left out.

    parts: levels and positions of each memory. order: see `joining_order`.
    """
    if all(levels is None for levels, _ in parts):
        return None
    filled = [
        torch.full_like(positions, TOP_LEVEL, dtype=torch.uint8) if levels is None else levels
        for levels, positions in parts
    ]
    return torch.cat(filled)[order]


def fitting_spans(sizes: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Return how many positions each of several memories takes in a room for all.

    sizes: of each its span, and its `least_span`. If the spans need more than there is, each memory gives up the same
    share of what lies between the two.
    """
    span, least = (sum(size) for size in zip(*sizes, strict=True))
    if span <= room:
        return [size for size, _ in sizes]
    give = max(0.0, (room - least) / (span - least)) if span > least else 0.0
    return [its_least + int(give * (its_span - its_least)) for its_span, its_least in sizes]
