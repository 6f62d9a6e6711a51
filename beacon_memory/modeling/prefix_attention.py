"""Attention to memories in front of the tokens that are read: both apart, merged by their log-sum-exp.

    softmax over [memory | own] = (w_m attend(memory) + w_o attend(own)) / (w_m + w_o),   w = exp(log-sum-exp of scores)

A memory is never copied: not to stand before the tokens, nor for each query head, nor from step to step. Rows of a
batch that share a memory ask it together. On CPU each call takes the heads of a memory that have equally many entries.
Elsewhere the heads of all memories go together, which copies them once where several are asked: on CUDA as sequences of
one call, and where that kernel is missing in a few groups, filled up to the same length.

Where many rows are read, or a gradient is needed, keys and values are joined as in stock attention: then a copy costs
little beside the attention, and kernels give no gradient for the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby, zip_longest
from operator import is_

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

from beacon_memory.kv.prefix import Block, Prefix, Section
from beacon_memory.kv.rope import apply_rotation

__all__ = ["Part", "PrefixBatch", "attend_apart", "attend_behind", "attend_joined", "for_queries", "mask_before"]

_NOTHING = -1e30  # log-sum-exp of no scores: finite, so that rows which see nothing at all merge to 0
_MOST_SCORES = 1 << 26  # scores that are held at a time where no kernel computes attention
_FEW = 8  # entries: so few are copied for less than a call of its own costs
_GROUPS = 4  # of heads of about the same length: more waste less memory and take more calls
# Output of attention [units, queries, head_dim] and log-sum-exp of its scores [units, queries].
_Piece = tuple[Tensor, Tensor]
# How many rows, or units, ask heads that have equally many entries; their keys and values [heads, entries, head_dim].
_Asked = tuple[int, Tensor, Tensor]
# Rows that are attended for at a time: which ones; how many entries, the first ones, any of them sees; and the mask,
# [rows, those entries, then entries of a prefix that all rows see], added to the scores.
Part = tuple[slice, int, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A section, which one it is in its prefix, counted from the front, and the rows of the batch that have it."""

    section: Section
    number: int
    rows: Sequence[int]


class PrefixBatch:
    """The prefixes of the rows of a batch, laid out for all steps.

    Its units are kv heads of sections of rows, counted through [sections, batch, kv_heads]. They are attended to in the
    order section, kv head, row, so that rows which share a section ask it together.

    prefixes: one for each row, which may be the same; None for a row that has none.
    most:     sections of the longest of them.
    trained:  whether any of them has a gradient.
    units:    [units] in the order in which they are attended to; None if these are all there can be, one after another.
    """

    def __init__(self, prefixes: Sequence[Prefix | None]) -> None:
        self.prefixes = prefixes
        rows: dict[Prefix, list[int]] = {}
        for row, prefix in enumerate(prefixes):
            if prefix:
                rows.setdefault(prefix, []).append(row)
        self.most = max((len(prefix.sections) for prefix in rows), default=0)
        self._parts = [
            _Part(prefix.sections[number], number, having)
            for number in range(self.most)
            for prefix, having in rows.items()
            if number < len(prefix.sections)
        ]
        self.trained = any(part.section.keys.requires_grad or part.section.values.requires_grad for part in self._parts)
        self.units = self._units()
        self._turn = self._turns()
        self._asked: dict[int, Sequence[_Asked]] = {}
        self._laid_out: dict[int, _Packed | _Padded] = {}

    def __bool__(self) -> bool:
        """Tell whether any row has something to attend to."""
        return self.most > 0

    def of_rows(self, rows: Sequence[int]) -> PrefixBatch:
        """Return the prefixes of some rows of this batch, in this order."""
        prefixes = [self.prefixes[row] for row in rows]
        same = len(prefixes) == len(self.prefixes) and all(map(is_, prefixes, self.prefixes))
        return self if same else PrefixBatch(prefixes)

    def _units(self) -> Tensor | None:
        batch = len(self.prefixes)
        units = [
            (part.number * batch + row) * part.section.heads + head
            for part in self._parts
            for head in range(part.section.heads)
            for row in part.rows
        ]
        if not units or units == [*range(self.most * batch * self._parts[0].section.heads)]:
            return None
        return torch.tensor(units, device=self._parts[0].section.keys.device)

    def _turns(self) -> tuple[Tensor, Tensor] | None:
        """Return the table [sections, batch, 1, 1, head_dim / 2] that moves queries away from sections further back."""
        behind = [prefix.behind if prefix else () for prefix in self.prefixes]
        if not any(map(any, behind)):
            return None
        rope = next(prefix.rope for prefix in self.prefixes if prefix)
        distances = torch.tensor([*zip_longest(*behind, fillvalue=0)], device=self._parts[0].section.keys.device)
        cos, sin = rope.turn(distances)
        return cos[:, :, None, None], sin[:, :, None, None]

    def attend(self, layer: int, query: Tensor, scale: float) -> list[_Piece]:
        """Attend to each section of each row's prefix; returns pieces that together have all units.

        query: [batch, kv_heads, queries, head_dim], those of all query heads of a kv head.
        """
        if not self:
            return []
        turned = query.expand(self.most, *query.shape) if self._turn is None else apply_rotation(query, *self._turn)
        queries = turned.flatten(0, 2)
        if self.units is not None:
            queries = queries[self.units]
        if layout := _layout(query.device, query.dtype, query.shape[-1]):
            if layer not in self._laid_out:
                self._laid_out[layer] = layout.of(self._parts, layer)
            return [self._laid_out[layer].attend(queries, scale)]
        blocks = self._blocks(layer)
        asked = queries.split([units for units, _, _ in blocks])
        return [_ask(one, keys, values, scale) for one, (_, keys, values) in zip(asked, blocks, strict=True)]

    def _blocks(self, layer: int) -> Sequence[_Asked]:
        """Return what is asked at a time on CPU; neighbours of a few entries, as the sinks of all rows, are joined."""
        if layer not in self._asked:
            blocks = [(len(part.rows), *block[1:]) for part in self._parts for block in part.section.blocks[layer]]
            joined: list[_Asked] = []
            for (rows, _, _), run in groupby(blocks, key=_joined_by):
                keys, values = ([*one] for one in [*zip(*run, strict=True)][1:])
                whole = [part[0] if len(part) == 1 else torch.cat(part) for part in (keys, values)]
                joined.append((rows * len(whole[0]), whole[0], whole[1]))
            self._asked[layer] = joined
        return self._asked[layer]


def _joined_by(block: _Asked) -> tuple[int, int, int]:
    """Return a key that blocks have in common which may be asked together: of few entries, and by as many rows."""
    rows, keys, _ = block
    return rows, keys.shape[1], 0 if keys.shape[1] <= _FEW else id(keys)


def _ask(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> _Piece:
    """Attend to heads that have equally many entries, [heads, entries, head_dim], each for several units."""
    units, count, dim = queries.shape
    heads, entries, _ = keys.shape
    if not entries:
        return torch.zeros_like(queries), queries.new_full((units, count), _NOTHING, dtype=torch.float32)
    output, total = _attend(queries.view(1, heads, -1, dim), keys[None], values[None], None, scale)
    return output.reshape(units, count, dim), total.reshape(units, count)


@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    """A layer of all sections of a batch, where each kv head is a sequence.

    keys, values: [entries, 1, head_dim]
    ends:   [1 + heads] int32, where the entries of each begin and end; longest: the most that one has.
    asking: [1 + heads] int32, where the units of each begin and end; most: the most that one has.
    """

    keys: Tensor
    values: Tensor
    ends: Tensor
    longest: int
    asking: Tensor
    most: int

    @classmethod
    def of(cls, parts: Sequence[_Part], layer: int) -> _Packed:
        """Pack a layer. A single section is not copied."""
        keys, values = _of_all(parts, layer)
        counts, rows = _sizes(parts, layer)
        ends, asking = (
            torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=keys.device) for sizes in (counts, rows)
        )
        return cls(keys[:, None], values[:, None], ends, max(counts), asking, max(rows))

    def attend(self, queries: Tensor, scale: float) -> _Piece:
        """Attend with the queries of all units in one call."""
        units, count, _ = queries.shape
        output, total = varlen_attn(
            queries.flatten(0, 1)[:, None],
            self.keys,
            self.values,
            self.asking * count,
            self.ends,
            self.most * count,
            self.longest,
            return_aux=AuxRequest(lse=True),
            scale=scale,
        )
        sums = total.reshape(units, count)
        return output.view(queries.shape), sums.masked_fill(sums == torch.inf, _NOTHING)  # inf: of no entries


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """KV heads of a layer that are filled up to the same number of entries, and of units that ask them.

    units: [heads, rows] which ones; what is filled up repeats one.
    keys, values: [1, heads, entries, head_dim]
    mask: [1, heads, 1, entries], added to the scores.
    """

    units: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Padded:
    """A layer of all sections of a batch, its kv heads sorted by length and put into a few groups.

    places: [units] where each is among those of all groups.
    """

    groups: Sequence[_Group]
    places: Tensor

    @classmethod
    def of(cls, parts: Sequence[_Part], layer: int) -> _Padded:
        """Copy a layer into groups."""
        keys, values = (pad(part, (0, 0, 0, 1)) for part in _of_all(parts, layer))  # a row to fill up with
        counts, rows = map(np.array, _sizes(parts, layer))
        first_entries, first_units = counts.cumsum() - counts, rows.cumsum() - rows
        groups, asked = [], []
        for heads in np.array_split(counts.argsort(), min(_GROUPS, len(counts))):
            entries = np.arange(max(1, counts[heads].max()))
            filled = entries >= counts[heads, None]
            picked = np.where(filled, len(keys) - 1, first_entries[heads, None] + entries)
            asked.append(first_units[heads, None] + np.minimum(np.arange(rows[heads].max()), rows[heads, None] - 1))
            units, chosen, mask = (
                torch.tensor(part, device=keys.device)
                for part in (asked[-1], picked, np.where(filled, -np.inf, 0).astype(np.float32))
            )
            groups.append(_Group(units, keys[chosen][None], values[chosen][None], mask[None, :, None]))
        places = np.empty(rows.sum(), dtype=np.int64)
        places[np.concatenate([units.ravel() for units in asked])] = np.arange(sum(units.size for units in asked))
        return cls(groups, torch.tensor(places, device=keys.device))

    def attend(self, queries: Tensor, scale: float) -> _Piece:
        """Attend with the queries of all units, a group at a time."""
        pieces = []
        for group in self.groups:
            asked = queries[group.units].flatten(1, 2)[None]
            output, total = _by_products(asked, group.keys, group.values, group.mask, scale)
            pieces.append((output.view(-1, *queries.shape[1:]), total.view(-1, queries.shape[1])))
        outputs, sums = (torch.cat(parts)[self.places] for parts in zip(*pieces, strict=True))
        return outputs, sums


def _of_all(parts: Sequence[_Part], layer: int) -> tuple[Tensor, Tensor]:
    """Return keys and values of a layer of all parts, one behind another, [entries, head_dim]."""
    sections = [part.section.layer(layer) for part in parts]
    keys, values = sections[0] if len(sections) == 1 else map(torch.cat, zip(*sections, strict=True))
    return keys, values


def _sizes(parts: Sequence[_Part], layer: int) -> tuple[list[int], list[int]]:
    """Return how many entries each kv head of all parts has in a layer, and how many units ask it."""
    counts = [count for part in parts for count in part.section.counts[layer]]
    return counts, [len(part.rows) for part in parts for _ in range(part.section.heads)]


def attend_behind(
    batch: PrefixBatch,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Let each row of a batch attend to the whole of its prefix, and to itself as in stock attention.

    query: [batch, heads, rows, head_dim]; key, value: [batch, kv_heads, own, head_dim], all rotated; mask: [batch or 1,
    1, rows, own], bool or added to the scores; None is causal. Returns [batch, heads, rows, head_dim].
    """
    rows, own = query.shape[2], key.shape[2]
    trained = torch.is_grad_enabled() and (batch.trained or any(part.requires_grad for part in (query, key, value)))
    joined = bool(dropout) or trained
    if mask is None and (rows > 1 or joined):
        mask = torch.ones(rows, own, dtype=torch.bool, device=query.device).tril(own - rows)[None, None]
    if joined and mask is not None:
        attended = []
        for number, prefix in enumerate(batch.prefixes):
            parts = [(slice(0, rows), own, mask_before(mask[number % len(mask), 0], prefix))]
            blocks = prefix.blocks(layer) if prefix else ()
            attended.append(attend_joined(query[number], key[number], value[number], blocks, parts, scaling, dropout))
        return torch.stack(attended)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _merged(batch, layer, query, key.shape[1], _attend_own(query, key, value, mask, scale), scale)


def attend_apart(
    batch: PrefixBatch,
    layer: int,
    query: Tensor,
    own: Sequence[tuple[Tensor, Tensor]],
    scaling: float | None,
) -> Tensor:
    """Do the same as `attend_behind`, causally, where the rows of the batch have own tokens of different number.

    own: for each row its keys and values [kv_heads, own, head_dim], of which the last are those of its queries.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    count = query.shape[2]
    pieces = [
        _attend_own(row, key[None], value[None], _causal(count, key.shape[1], query.device), scale)
        for row, (key, value) in zip(query.split(1), own, strict=True)
    ]
    outputs, sums = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return _merged(batch, layer, query, own[0][0].shape[0], (outputs, sums), scale)


def _causal(rows: int, own: int, device: torch.device) -> Tensor | None:
    """Return the mask [1, 1, rows, own] of rows that are the last ones of all own tokens; None if they see all."""
    if rows == 1:
        return None
    return torch.ones(rows, own, dtype=torch.bool, device=device).tril(own - rows)[None, None]


def _attend_own(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> _Piece:
    """Attend to own tokens; returns [batch, heads, rows, head_dim], or the same by kv head if there is only one row."""
    if query.shape[2] == 1:  # then all query heads of a kv head see the same
        return _attend(_grouped(query, key.shape[1]), key, value, mask, scale)
    groups = query.shape[1] // key.shape[1]
    return _attend(query, for_queries(key, groups), for_queries(value, groups), mask, scale)


def _grouped(query: Tensor, kv_heads: int) -> Tensor:
    """Return queries [batch, kv_heads, groups * rows, head_dim]: those of all query heads of a kv head together."""
    return query.reshape(len(query), kv_heads, -1, query.shape[3])


def _merged(batch: PrefixBatch, layer: int, query: Tensor, kv_heads: int, own: _Piece, scale: float) -> Tensor:
    """Return attention to the whole of prefixes and own tokens, [batch, heads, rows, head_dim], given that to these."""
    grouped = _grouped(query, kv_heads)
    units, count, dim = len(grouped) * kv_heads, *grouped.shape[2:]
    pieces = [(own[0].reshape(units, count, dim), own[1].reshape(units, count)), *batch.attend(layer, grouped, scale)]
    outputs, sums = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    if batch.units is not None:
        places = torch.cat((torch.arange(units, device=query.device), units + batch.units))
        width = (1 + batch.most) * units
        outputs = outputs.new_zeros(width, count, dim).index_copy_(0, places, outputs)
        sums = sums.new_full((width, count), _NOTHING).index_copy_(0, places, sums)
    weights = sums.view(-1, units, count, 1).softmax(0)
    merged: Tensor = (outputs.view(-1, units, count, dim) * weights).sum(0)
    return merged.to(query.dtype).view(query.shape)


@cache
def _layout(device: torch.device, dtype: torch.dtype, head_dim: int) -> type[_Packed | _Padded] | None:
    """Return how memories are laid out for attention on a device, None for as they are."""
    if device.type == "cpu":
        return None
    has_varlen = (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    return _Packed if has_varlen else _Padded


def for_queries(part: Tensor, groups: int) -> Tensor:
    """Repeat keys or values [batch, kv_heads, entries, head_dim] for each query head, as stock attention does."""
    return part if groups == 1 else part[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output of attention and the log-sum-exp of its scores, [batch, heads, rows(, head_dim)].

    query: [batch, heads, rows, head_dim]; key, value: [batch, heads, entries, head_dim], at least one entry.
    """
    kernel = _by_flash_on_cpu if query.device.type == "cpu" else _by_products
    if mask is None:
        return kernel(query, key, value, None, scale)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    output, total = kernel(query, key, value, mask, scale)
    return output, total.masked_fill(mask.amax(-1) == float("-inf"), _NOTHING)


def _by_flash_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend by the kernel that stock SDPA uses on CPU, which does not hand out its log-sum-exp."""
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=scale
    )
    return found


def _by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attend by matrix products, in float32 between them; runs on any device."""
    at_once = max(1, _MOST_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    outputs, totals = [], []
    for start in range(0, query.shape[2], at_once):
        scores = (query[:, :, start : start + at_once] @ key.mT).float() * scale
        if mask is not None:
            scores += mask.expand(-1, -1, query.shape[2], -1)[:, :, start : start + at_once]
        totals.append(scores.logsumexp(-1).clamp(min=_NOTHING))
        outputs.append((scores - totals[-1][..., None]).exp().to(value.dtype) @ value)
    return torch.cat(outputs, dim=2), torch.cat(totals, dim=2)


def mask_before(mask: Tensor, prefix: Prefix | None) -> Tensor:
    """Widen a mask [rows, entries], bool or added to the scores, by the entries of a prefix, which all rows see."""
    return pad(mask, (0, prefix.longest if prefix else 0), value=mask.dtype == torch.bool)


def attend_joined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    parts: Sequence[Part],
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Attend to keys and values that are joined with those of a layer of a prefix, without copies for query heads.

    query: [heads, rows, head_dim]; key, value: [kv_heads, entries, head_dim]; blocks: those of the layer, if there is a
    prefix; parts: all rows, in their order. Returns [heads, rows, head_dim].
    """
    grouped = query.unflatten(0, (len(key), -1))
    output = []
    for heads, front_keys, front_values in blocks or [(slice(0, len(key)), key[:, :0], value[:, :0])]:
        of_rows = []
        for rows, seen, mask in parts:
            # the prefix comes last, so that the mask of every head begins where its tensor does, as CUDA's kernels need
            keys, values = (
                torch.cat((own[heads, :seen], front), dim=1)[:, None].expand(-1, grouped.shape[1], -1, -1)
                for own, front in ((key, front_keys), (value, front_values))
            )
            asked = grouped[heads, :, rows]
            of_rows.append(
                scaled_dot_product_attention(asked, keys, values, mask[:, : keys.shape[2]], dropout, scale=scaling)
            )
        output.append(torch.cat(of_rows, dim=2))
    return torch.cat(output).flatten(0, 1)
