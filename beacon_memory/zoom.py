"""Zoom: what is loaded of stored memories for one question.

The text of a memory is cut into *sections*, and every entry has a level (`kv.levels`). The entries of a section from
some level on are what blind compression would have kept of it at the ratio of that level. So what is loaded of a
section is told by one number, the lowest level that is loaded, and less of it is always a part of more.

The budget goes to few sections as a whole, not to more of them in part: a reader takes what stands out, so that names
from passages which do not matter lead it astray. For the same reason nothing is loaded of the rest, and what matters
most stands nearest to the question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor

from beacon_memory.errors import InputError
from beacon_memory.kv.levels import LEVELS, TOP_LEVEL
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import QuantizedKV

__all__ = ["allocate", "chunks", "section_counts", "zoomed"]

_CHUNK = 64  # tokens, about, of a section of a text that has no stored passages


def chunks(text: Sequence[int]) -> list[list[int]]:
    """Cut token ids into pieces of equal length, about 64 tokens each."""
    count = max(1, round(len(text) / _CHUNK))
    return [list(text[len(text) * i // count : len(text) * (i + 1) // count]) for i in range(count)]


def allocate(sizes: Tensor, relevance: Sequence[float], budget: int) -> list[int]:
    """Return for each section the lowest level that is loaded of it, LEVELS for nothing of it.

    The most relevant sections are loaded whole; of the last one that is begun, the levels that still fit. Sections that
    are equally relevant share what is left for them by level: relevance that is the same for all, such as 0, gives
    blind selection.

    sizes:     [sections, LEVELS] entries of each level; of one memory or of several.
    relevance: how well each section matches the question, 0 for not at all.
    budget:    how many entries may be loaded, those of all heads of all layers together.
    """
    of_cells = torch.tensor(relevance, dtype=torch.float64).repeat(LEVELS)  # level by level, from the top one down
    order = of_cells.argsort(descending=True, stable=True)
    entries = sizes.flip(1).T.flatten()[order]
    taken = order[(entries.cumsum(0) <= budget) & (entries > 0)]
    lowest = torch.full((len(sizes),), LEVELS)
    lowest.scatter_reduce_(0, taken % len(sizes), TOP_LEVEL - taken // len(sizes), "amin")
    return [int(level) for level in lowest.tolist()]


def section_counts(memory: MemoryKV, bounds: Sequence[int]) -> Tensor:
    """Return how many entries of each level each section of a memory has, [sections, LEVELS, layers, kv_heads] int64.

    bounds: the positions at which sections begin, and behind them the memory's span.
    """
    shape = (len(bounds) - 1, LEVELS, *memory.counts.shape)
    heads = torch.arange(memory.counts.numel()).repeat_interleave(memory.counts.flatten())
    cells = (_sections_of(memory, bounds) * LEVELS + _levels_of(memory)).cpu() * memory.counts.numel() + heads
    return cells.bincount(minlength=math.prod(shape)).view(shape)


@overload
def zoomed(memory: MemoryKV, bounds: Sequence[int], lowest: Sequence[int], relevance: Sequence[float]) -> MemoryKV: ...


@overload
def zoomed(
    memory: QuantizedKV, bounds: Sequence[int], lowest: Sequence[int], relevance: Sequence[float]
) -> QuantizedKV: ...


def zoomed(
    memory: MemoryKV | QuantizedKV, bounds: Sequence[int], lowest: Sequence[int], relevance: Sequence[float]
) -> MemoryKV | QuantizedKV:
    """Return what is loaded of a memory: its sections one behind another, the most relevant one last.

    Sections of which nothing is loaded take no positions; equally relevant ones keep the order of the text.

    memory: one or several, joined by `MemoryKV.concat`, at their own positions: what is interpolated has no sections.
    bounds: see `section_counts`. lowest, relevance: see `allocate`.
    """
    starts, span = [0] * len(lowest), 0
    for section in sorted(range(len(lowest)), key=relevance.__getitem__):
        starts[section] = span
        span += (bounds[section + 1] - bounds[section]) * (lowest[section] < LEVELS)
    sections = _sections_of(memory, bounds)
    device = sections.device
    kept = _levels_of(memory) >= torch.tensor(list(lowest), device=device)[sections]
    moved = torch.tensor([new - old for new, old in zip(starts, bounds, strict=False)], device=device)
    positions = (memory.positions + moved[sections])[kept]
    heads = torch.arange(memory.counts.numel()).repeat_interleave(memory.counts.flatten()).to(device)[kept]
    places = (heads * span + positions).argsort()
    entries = kept.nonzero()[:, 0][places]
    counts = heads.bincount(minlength=memory.counts.numel()).view_as(memory.counts).cpu()
    return memory.taken(entries, positions[places].to(torch.int32), counts, span)


def _sections_of(memory: MemoryKV | QuantizedKV, bounds: Sequence[int]) -> Tensor:
    """Return the section of each entry, [entries] int64; raises InputError for bounds that are not of this memory."""
    if memory.positions.is_floating_point():
        raise InputError("an interpolated memory has no sections: take what is loaded out of it before")
    if bounds[0] != 0 or bounds[-1] != memory.span or any(start >= stop for start, stop in pairwise(bounds)):
        raise InputError(f"bounds={list(bounds)} must rise from 0 to the memory's span of {memory.span} positions")
    inner = torch.tensor(bounds[1:-1], device=memory.positions.device)
    return torch.bucketize(memory.positions, inner, right=True)


def _levels_of(memory: MemoryKV | QuantizedKV) -> Tensor:
    """Return the level of each entry, [entries] int64."""
    if memory.levels is None:
        return torch.full_like(memory.positions, TOP_LEVEL, dtype=torch.long)
    return memory.levels.long()
