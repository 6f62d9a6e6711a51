"""Memories as the prefix of what is read: their keys rotated once, ready for attention.

Rotary attention knows distances only. So a memory keeps the rotation that it would have right in front of position 0,
and stands further back where the queries are turned on by as many positions: joining memories copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Self

import torch
from torch import Tensor

from .memory_kv import MemoryKV
from .moving import on_device
from .quantize import QuantizedKV
from .rope import Rope, apply_rotation

__all__ = ["Block", "Prefix", "Section"]

# KV heads of a layer that have equally many entries: which ones; keys, rotated, and values [heads, entries, head_dim].
Block = tuple[slice, Tensor, Tensor]
_FEW = 8  # slots


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Section:
    """A memory whose keys are rotated to the positions -span to -1.

    keys:   [entries, head_dim], rotated, in the order layer, kv head, position.
    values: [entries, head_dim]
    counts: for each layer how many entries each kv head has.
    span:   how many positions it takes.
    blocks: for each layer its entries as views.
    """

    keys: Tensor
    values: Tensor
    counts: tuple[tuple[int, ...], ...]
    span: int
    blocks: tuple[tuple[Block, ...], ...]

    @classmethod
    def of(cls, memory: MemoryKV, rope: Rope) -> Self:
        """Rotate the keys of a memory; its values are not copied."""
        counts = tuple(tuple(layer) for layer in memory.counts.tolist())
        sizes = [sum(layer) for layer in counts]
        rotated = [  # layer by layer, for it takes several times their bytes meanwhile
            apply_rotation(keys, *table)
            for keys, table in zip(memory.keys.split(sizes), _tables(memory, rope), strict=True)
        ]
        return cls._laid_out(torch.cat(rotated), memory.values, counts, memory.span)

    @classmethod
    def dequantized(cls, memory: QuantizedKV, rope: Rope, dtype: torch.dtype) -> Self:
        """Do the same of a quantized memory, layer by layer; dtype: of what comes out."""
        counts = tuple(tuple(layer) for layer in memory.counts.tolist())
        ends = [0, *accumulate(sum(layer) for layer in counts)]
        shape = (len(memory.keys), memory.key_scales.shape[1])
        keys, values = (torch.empty(shape, dtype=dtype, device=memory.keys.device) for _ in range(2))
        for rows, table in zip(map(slice, ends, ends[1:]), _tables(memory, rope), strict=True):
            numbers, values[rows] = memory.numbers(rows)
            keys[rows] = apply_rotation(numbers.to(dtype), *table)
        return cls._laid_out(keys, values, counts, memory.span)

    @classmethod
    def _laid_out(cls, keys: Tensor, values: Tensor, counts: tuple[tuple[int, ...], ...], span: int) -> Self:
        sizes = [sum(layer) for layer in counts]
        of_layers = zip(counts, keys.split(sizes), values.split(sizes), strict=True)
        return cls(keys, values, counts, span, tuple(_blocks(*layer) for layer in of_layers))

    def to(self, device: torch.device) -> Self:
        """Return the same section on another device, see `on_device`."""
        if device == self.keys.device:
            return self
        return self._laid_out(on_device(self.keys, device), on_device(self.values, device), self.counts, self.span)

    def moved(self, behind: int, rope: Rope) -> Self:
        """Return the section with its keys rotated to where it stands with so many positions behind it."""
        turn = rope.turn(torch.tensor([-behind], device=self.keys.device))
        return self._laid_out(apply_rotation(self.keys, *turn), self.values, self.counts, self.span)

    @property
    def heads(self) -> int:
        """Return how many kv heads a layer has."""
        return len(self.counts[0])

    @property
    def slots(self) -> int:
        """Return how many entries a head has: the mean over all heads, rounded up."""
        return -(-len(self.keys) // sum(map(len, self.counts)))

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys and values together."""
        return self.keys.nbytes + self.values.nbytes

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer, [entries of the layer, head_dim]."""
        start = sum(map(sum, self.counts[:number]))
        entries = slice(start, start + sum(self.counts[number]))
        return self.keys[entries], self.values[entries]


def _tables(memory: MemoryKV | QuantizedKV, rope: Rope) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rotation of the entries of each layer; of a position that entries share, it is computed once."""
    positions = memory.positions.split(memory.counts.sum(1).tolist())
    if memory.positions.is_floating_point() or memory.span > len(memory.positions):
        yield from (rope.table(places.float() - memory.span) for places in positions)
        return
    cos, sin = rope.table(torch.arange(-memory.span, 0, device=memory.positions.device))
    yield from ((cos.index_select(0, places), sin.index_select(0, places)) for places in positions)


def _blocks(counts: Sequence[int], keys: Tensor, values: Tensor) -> tuple[Block, ...]:
    """Return the entries of a layer, [entries, head_dim], as one block for each run of heads that have equally many."""
    blocks, start, head = [], 0, 0
    for count, run in groupby(counts):
        heads = len(list(run))
        entries, shape = slice(start, start + heads * count), (heads, count, keys.shape[-1])
        blocks.append((slice(head, head + heads), keys[entries].view(shape), values[entries].view(shape)))
        start, head = entries.stop, head + heads
    return tuple(blocks)


class Prefix:
    """Memories one behind another in front of what is read, the last one at positions up to -1.

    sections: the memories, in their order; those without entries are left out. Of a few slots, such as the sink, the
              keys are moved to their place, which costs less than turning queries in every step.
    behind:   for each section by how many positions queries must be turned to stand at its distance.
    span:     how many positions all of them take.
    """

    def __init__(self, sections: Sequence[Section], rope: Rope) -> None:
        ends = [*accumulate(section.span for section in sections)]
        self.span = ends[-1] if ends else 0
        held = [
            (section.moved(behind, rope), 0) if behind and section.slots <= _FEW else (section, behind)
            for section, behind in zip(sections, (self.span - end for end in ends), strict=True)
            if len(section.keys)
        ]
        self.sections = tuple(section for section, _ in held)
        self.behind = tuple(behind for _, behind in held)
        self.rope = rope

    @property
    def slots(self) -> int:
        """Return how many entries a head has: the mean over all heads, rounded up."""
        entries = sum(len(section.keys) for section in self.sections)
        return -(-entries // sum(map(len, self.sections[0].counts))) if entries else 0

    @property
    def longest(self) -> int:
        """Return the most entries that a head may have."""
        return sum(max(map(max, section.counts)) for section in self.sections)

    def __bool__(self) -> bool:
        """Tell whether there is anything to attend to."""
        return bool(self.sections)

    def blocks(self, layer: int) -> Sequence[Block]:
        """Return the entries of a layer at their places; those of several sections are joined, head by head."""
        if len(self.sections) == 1 and not self.behind[0]:
            return self.sections[0].blocks[layer]
        heads: list[list[tuple[Tensor, Tensor]]] = []
        for section, behind in zip(self.sections, self.behind, strict=True):
            turn = self.rope.turn(torch.tensor([-behind], device=section.keys.device))
            counts = section.counts[layer]
            keys, values = section.layer(layer)
            keys = apply_rotation(keys, *turn) if behind else keys
            heads = heads or [[] for _ in counts]
            for head, *part in zip(heads, keys.split(counts), values.split(counts), strict=True):
                head.append((part[0], part[1]))
        joined = [tuple(torch.cat(parts) for parts in zip(*head, strict=True)) for head in heads]
        return (
            _blocks([len(keys) for keys, _ in joined], *(torch.cat(parts) for parts in zip(*joined, strict=True)))
            if joined
            else ()
        )
