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

__all__ = ["Rows", "file_order", "groups_of", "head_sizes", "rows_of", "run_sizes"]


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
    count, depths, layers, kv_heads = counts.shape
    heads = layers * kv_heads
    span, most = sections[-1].first + sections[-1].size if count else 0, torch.iinfo(torch.int32).max
    if span > most:
        raise InputError(f"it spans {span} positions, but a position is at most {most}")
    least = torch.zeros(count, dtype=torch.int64) if lowest is None else torch.tensor(list(lowest), dtype=torch.int64)
    chosen = (least < LEVELS).nonzero()[:, 0]  # of a long document few, so only what they have is looked at
    runs = run_sizes(counts)
    first_rows = (runs.flatten().cumsum(0) - runs.flatten()).view_as(runs)[chosen]
    sizes = counts[chosen].flatten(2).long()
    starts = (first_rows[..., None] + sizes.cumsum(2) - sizes).flatten()
    loaded = torch.arange(depths) < LEVELS - least[chosen][:, None]
    sizes = sizes * loaded[..., None]
    each = sizes.flatten()
    cells = torch.arange(len(each), dtype=torch.int32).repeat_interleave(each)
    firsts = torch.tensor([section.first for section in sections], dtype=torch.int32)[chosen]
    # what all rows of a cell share is computed once for it, and tensors are small: room from the system takes time
    narrow = torch.int64 if int(runs.sum()) > most else torch.int32
    ordinals = torch.arange(len(cells), dtype=narrow)
    ordinals -= (each.cumsum(0) - each).to(narrow).index_select(0, cells)
    numbers = starts.to(narrow).index_select(0, cells) + ordinals
    positions = _of_cells(firsts[:, None, None], sizes).index_select(0, cells) + places.index_select(0, numbers)
    wide = torch.int64 if heads * span > most else torch.int32
    before = _of_cells(torch.arange(heads, dtype=wide) * span, sizes).index_select(0, cells)
    order = (before + positions).argsort(stable=True)
    cells = cells.index_select(0, order)
    levels = _of_cells(TOP_LEVEL - torch.arange(depths)[:, None], sizes).to(torch.uint8).index_select(0, cells)
    if len(chosen) < count:
        within = heads * depths
        cells = chosen[cells // within] * within + cells % within
    return Rows(
        numbers.index_select(0, order),
        positions.index_select(0, order),
        levels,
        sizes.sum((0, 1)).view(layers, kv_heads),
        cells,
        ordinals.index_select(0, order),
    )


def run_sizes(counts: Tensor) -> Tensor:
    """Return how many entries of each section and level a file has, [sections, levels] int64; counts: see `rows_of`."""
    return torch.from_numpy(counts.flatten(2).numpy().sum(2, dtype="int64"))  # some times as fast as torch's sum


def head_sizes(counts: Tensor) -> Tensor:
    """Return how many entries each head has of each section, [sections, heads] int64; counts: see `rows_of`."""
    return torch.from_numpy(counts.flatten(2).numpy().sum(1, dtype="int64"))


def _of_cells(values: Tensor, sizes: Tensor) -> Tensor:
    """Return the value of each cell, [cells], where one axis of `sizes` [sections, levels, heads] tells it."""
    return values.expand_as(sizes).flatten()


def groups_of(counts: Tensor, sections: Sequence[SectionSpan], rows: Rows) -> Tensor:
    """Return the group of each row, [entries] int32, as `group_numbers` has it; it follows from the counts alone."""
    sizes = counts.flatten(2)
    windows = torch.tensor([section.window for section in sections], dtype=torch.int64)
    totals = torch.zeros(int(windows[-1]) + 1 if len(windows) else 0, sizes.shape[2], dtype=torch.int64)
    totals.index_add_(0, windows, head_sizes(counts))
    groups = -(-totals // GROUP)
    firsts = (groups.flatten().cumsum(0) - groups.flatten()).view_as(groups)
    section, depth, head = torch.unravel_index(rows.cells, sizes.shape)
    of_rows = windows[section]
    looked = torch.isin(windows, of_rows).nonzero()[:, 0]  # the sections of the windows that there are rows of
    ranks = torch.empty(len(looked), *sizes.shape[1:], dtype=torch.int64)
    for window in windows[looked].unique():
        own = (windows[looked] == window).nonzero()[:, 0]
        in_turn = sizes[looked[own]].permute(2, 1, 0).long()  # heads, levels, sections
        flat = in_turn.flatten(1)
        ranks[own] = (flat.cumsum(1) - flat).view_as(in_turn).permute(2, 1, 0)
    ranked = ranks[torch.bucketize(section.contiguous(), looked), depth, head] + rows.ordinals
    return (firsts[of_rows, head] + ranked // GROUP).to(torch.int32)
