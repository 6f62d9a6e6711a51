"""The entries of a memory in the order of a file, in which any stronger compressed memory can be read apart.

A file has the entries section by section, those of a section by falling level, and those of a level by layer, head and
position. So what is to be loaded is said by one number for each section: the lowest level that is loaded of it. That is
one run of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from beacon_memory.errors import InputError
from beacon_memory.kv.levels import LEVELS, TOP_LEVEL
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import GROUP, QuantizedKV

from .header import SectionSpan

__all__ = ["Rows", "file_order", "groups_of", "rows_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Which rows of a file make up a memory.

    numbers:   [entries] int32, of the file, for entries in the order of a memory: layer, head, position.
    positions: [entries] int32
    levels:    [entries] uint8
    counts:    [layers, kv_heads] int64
    cells, ordinals: [entries] int32, the cell of the counts that a row is in, and its number there.
    """

    numbers: Tensor
    positions: Tensor
    levels: Tensor
    counts: Tensor
    cells: Tensor
    ordinals: Tensor


def file_order(kv: MemoryKV | QuantizedKV, sections: Sequence[SectionSpan]) -> tuple[Tensor, Tensor, Tensor]:
    """Return in which order a file has the entries of a memory.

    Three tensors: for each row of the file the number of its entry, and its place in its section, uint8; and how many
    entries each cell has, [sections, levels, layers, kv_heads] uint8, from the top level down to the lowest one of the
    memory.
    """
    heads = torch.arange(kv.counts.numel()).repeat_interleave(kv.counts.flatten())
    firsts = torch.tensor([section.first for section in sections], dtype=torch.int32)
    section = torch.bucketize(kv.positions.contiguous(), firsts, right=True) - 1
    depth = torch.zeros_like(heads) if kv.levels is None else TOP_LEVEL - kv.levels.long()
    depths = int(depth.max()) + 1 if len(depth) else 1
    cell = (section * depths + depth) * kv.counts.numel() + heads
    counts = cell.bincount(minlength=len(firsts) * depths * kv.counts.numel())
    order = cell.argsort(stable=True)  # entries of a head come by position
    places = (kv.positions - firsts[section] if len(firsts) else kv.positions).to(torch.uint8)
    return order, places[order], counts.view(len(firsts), depths, *kv.counts.shape).to(torch.uint8)


def rows_of(
    counts: Tensor, places: Tensor, sections: Sequence[SectionSpan], lowest: Sequence[int] | None = None
) -> Rows:
    """Return the rows of a file that make up its memory, or a part of it.

    counts, places: as `file_order` gave them.
    lowest: of each section the lowest level that is loaded; `LEVELS` for nothing of it.

    Raises InputError for sections that span more positions than int32 holds.
    """
    sections_, depths, layers, kv_heads = counts.shape
    heads = layers * kv_heads
    sizes = counts.flatten(2).long()
    starts = sizes.flatten().cumsum(0) - sizes.flatten()
    if lowest is not None:
        loaded = torch.arange(depths) < LEVELS - torch.tensor(list(lowest), dtype=torch.int64)[:, None]
        sizes = sizes * loaded[..., None]
    span, most = sections[-1].first + sections[-1].size if sections_ else 0, torch.iinfo(torch.int32).max
    if span > most:
        raise InputError(f"it spans {span} positions, but a position is at most {most}")
    each = sizes.flatten()
    cells = torch.arange(len(each), dtype=torch.int32).repeat_interleave(each)
    firsts = torch.tensor([section.first for section in sections], dtype=torch.int32)
    # what all rows of a cell share is computed once for it, and tensors are small: room from the system takes time
    ordinals = torch.arange(len(cells), dtype=torch.int32)
    ordinals -= (each.cumsum(0) - each).to(torch.int32).index_select(0, cells)
    numbers = starts.to(torch.int32).index_select(0, cells) + ordinals
    positions = _of_cells(firsts[:, None, None], sizes).index_select(0, cells) + places.index_select(0, numbers)
    wide = torch.int64 if heads * span > most else torch.int32
    before = _of_cells(torch.arange(heads, dtype=wide) * span, sizes).index_select(0, cells)
    order = (before + positions).argsort(stable=True)
    cells = cells.index_select(0, order)
    levels = _of_cells(TOP_LEVEL - torch.arange(depths)[:, None], sizes).to(torch.uint8)
    return Rows(
        numbers.index_select(0, order),
        positions.index_select(0, order),
        levels.index_select(0, cells),
        sizes.sum((0, 1)).view(layers, kv_heads),
        cells,
        ordinals.index_select(0, order),
    )


def _of_cells(values: Tensor, sizes: Tensor) -> Tensor:
    """Return the value of each cell, [cells], where one axis of `sizes` [sections, levels, heads] tells it."""
    return values.expand_as(sizes).flatten()


def groups_of(counts: Tensor, sections: Sequence[SectionSpan], rows: Rows) -> Tensor:
    """Return the group of each row, [entries] int32, as `group_numbers` has it; it follows from the counts alone."""
    sizes = counts.flatten(2).long()
    ranks, totals = torch.empty_like(sizes), []
    windows = torch.tensor([section.window for section in sections], dtype=torch.int64)
    for window in range(int(windows[-1]) + 1 if len(windows) else 0):
        own = (windows == window).nonzero().flatten()
        in_turn = sizes[own].permute(2, 1, 0)  # heads, levels, sections
        flat = in_turn.flatten(1)
        ranks[own] = (flat.cumsum(1) - flat).view_as(in_turn).permute(2, 1, 0)
        totals.append(flat.sum(1))
    groups = -(-torch.stack(totals) // GROUP) if totals else sizes.new_empty(0, sizes.shape[2])
    firsts = (groups.flatten().cumsum(0) - groups.flatten()).view_as(groups)
    before = firsts[windows][:, None].expand_as(ranks).flatten()
    return (before[rows.cells] + (ranks.flatten()[rows.cells] + rows.ordinals) // GROUP).to(torch.int32)
