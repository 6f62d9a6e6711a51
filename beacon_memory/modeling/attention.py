"""The attention function that can read with beacons, registered with transformers under the name `beacon_memory`.

A model that uses it behaves as with `sdpa`, unless a call brings an `AttentionPass`, a `MemoryCache` or a
`PackedCache`. All are handed on as keyword arguments of the model call, never through a global variable, so that
threads and gradient checkpointing cannot mix up two passes.

The tokens after a memory (`Prefix`) begin at position 0, and the memory has the positions before it. That is possible
because rotary attention depends only on the distance between two positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from beacon_memory.kv.memory_kv import BeaconKV
from beacon_memory.kv.prefix import Block, Prefix
from beacon_memory.kv.rope import Rope, apply_rotation

from .layout import BeaconLayout, WindowRows
from .packed_cache import PackedCache
from .prefix_attention import Part, PrefixBatch, attend_behind, attend_joined, mask_before

__all__ = ["IMPLEMENTATION", "AttentionPass", "BeaconPass", "PassEndedError", "Watch"]

IMPLEMENTATION = "beacon_memory"
# A function that is called for each window in each layer, to observe its attention. Its arguments: number of the layer;
# number of the sequence; queries [heads, rows, head_dim], scaled and rotated; keys [kv_heads, memory + own, head_dim],
# rotated; how many of the keys are memory slots; the blocks of the prefix.
Watch = Callable[[int, int, Tensor, Tensor, int, Sequence[Block]], None]
_ROWS_ON_CPU = 256  # rows that are attended for at a time: what none of them sees takes no time


class AttentionPass(Protocol):
    """Attend in a forward pass instead of stock attention; handed on as `beacon_pass`."""

    @property
    def raw_rows(self) -> int:
        """How many rows, the first ones, are raw tokens; the others are beacons."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """Return the output of attention in a layer, [1, rows, heads, head_dim].

        query: [1, heads, rows, head_dim]; key, value: [1, kv_heads, rows, head_dim]; query and key at RoPE position 0.
        """


class PassEndedError(Exception):
    """All that a pass was to find out is known before its end: not an error, and caught where the pass was begun."""


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    """One window, or several parallel branches on one memory, on the device.

    memory: how many memory slots it sees.
    rows:   its rows among those of the pass, sorted by window.
    cached: [cached] past entries of this window, which an earlier pass has read.
    parts:  its rows, some at a time, with masks on the entries in the order memory, cached, rows.
    """

    sequence: int
    memory: int
    rows: slice
    cached: Tensor
    parts: Sequence[Part]


class BeaconPass:
    """A `BeaconLayout` on a device, shared by all layers of one forward pass.

    raw_rows: how many rows, the first ones, are raw tokens.
    past:   K/V of the pool entries that earlier passes have read, before RoPE.
    keep:   pool entries whose K/V the pass gives back, see `collected`.
    prefixes: for each sequence the memory that all its windows follow, if any.
    watch:  a function that observes the attention, see Watch.
    ends:   whether the pass ends, with PassEndedError, as soon as K/V of all layers are known.
    answers: whether its rows are what follows a memory, for which the LoRA of answers is used.
    """

    def __init__(
        self,
        layout: BeaconLayout,
        rope: Rope,
        past: BeaconKV,
        keep: list[int],
        *,
        hidden: bool,
        prefixes: Sequence[Prefix | None] = (),
        watch: Watch | None = None,
        ends: bool = False,
        answers: bool = False,
    ) -> None:
        device, dtype = past.keys.device, past.keys.dtype

        def indices(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.long, device=device)

        def places(numbers: list[int]) -> slice | Tensor:
            """Return what picks these entries; if they stand one after another, without a copy."""
            run = range(numbers[0], numbers[0] + len(numbers)) if numbers else range(0)
            return slice(run.start, run.stop) if numbers == [*run] else indices(numbers)

        self.raw_rows = len(layout.raw_ids)
        self.rope = rope
        self.past = past
        self.prefixes = prefixes or [None] * len(layout.memories)
        self.watch = watch
        self.ends = ends
        self.answers = answers
        # Attention takes the rows window by window, but the linear layers need all raw rows first.
        by_window = [row for window in layout.windows for row in window.queries]
        self.by_window = places(by_window)
        self.by_kind = self.by_window if isinstance(self.by_window, slice) else self.by_window.argsort()
        self.table = rope.table(indices(layout.positions))
        self.rows_table = tuple(part[past.slots + indices(by_window)] for part in self.table)
        self.memories = [places(memory) for memory in layout.memories]
        self.memory_table = rope.table(torch.arange(max(map(len, layout.memories), default=0), device=device))
        orders = indices(layout.orders)
        self.windows = []
        start = 0
        for (sequence, memory, cached), group in groupby(layout.windows, _attended_together):
            parts = [indices(window.own) for window in group]
            seen = torch.block_diag(*(_visible(orders[own[cached:]], orders[own], hidden=hidden) for own in parts))
            rows = slice(start, start + len(seen))
            at_a_time = _parts(pad(seen, (memory, 0), value=True), self.prefixes[sequence], dtype)
            self.windows.append(_Window(sequence, memory, rows, parts[0][:cached], at_a_time))
            start = rows.stop
        self._keep = places(keep)
        self._keeps = bool(keep)
        self._collected: dict[int, tuple[Tensor, Tensor]] = {}

    def _collect(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Collect the K/V to keep from the pool of a layer, [1, kv_heads, pool, head_dim], keys before RoPE."""
        if self._keeps:
            self._collected[layer] = (keys[0, :, self._keep], values[0, :, self._keep])

    @property
    def collected(self) -> BeaconKV:
        """Return the K/V of the entries to keep, [layers, kv_heads, kept, head_dim]."""
        if not self._collected:
            return self.past[:0]
        keys, values = zip(*(self._collected[layer] for layer in sorted(self._collected)), strict=True)
        return BeaconKV(torch.stack(keys), torch.stack(values))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float
    ) -> Tensor:
        """Let each window attend to its memory slots and to itself, see AttentionPass."""
        query, key = self.rope.remove_scaling(query), self.rope.remove_scaling(key)
        pool_keys, pool_values = key, value
        if self.past.slots:
            pool_keys = torch.cat((self.past.keys[layer][None], key), dim=2)
            pool_values = torch.cat((self.past.values[layer][None], value), dim=2)
        self._collect(layer, pool_keys, pool_values)
        ends = self.ends and layer + 1 == len(self.past.keys)
        if ends and self.watch is None:
            raise PassEndedError

        query = apply_rotation(query[0, :, self.by_window], *self.rows_table)
        own_keys = apply_rotation(key[0, :, self.by_window], *self.rows_table)
        own_values = value[0, :, self.by_window]
        memories = []
        for memory in self.memories:
            slots = pool_keys[0, :, memory]
            cos, sin = (part[: slots.shape[1]] for part in self.memory_table)
            memories.append((apply_rotation(slots, cos, sin) if len(cos) else slots, pool_values[0, :, memory]))

        output = []
        for window in self.windows:
            keys, values = ([part[:, : window.memory]] for part in memories[window.sequence])
            if len(window.cached):
                cos, sin = (part[window.cached] for part in self.table)
                keys.append(apply_rotation(pool_keys[0, :, window.cached], cos, sin))
                values.append(pool_values[0, :, window.cached])
            queries = query[:, window.rows]
            keys_seen = torch.cat((*keys, own_keys[:, window.rows]), dim=1)
            values_seen = torch.cat((*values, own_values[:, window.rows]), dim=1)
            prefix = self.prefixes[window.sequence]
            blocks = prefix.blocks(layer) if prefix else ()
            if self.watch is not None:
                scaled = queries * (queries.shape[-1] ** -0.5 if scaling is None else scaling)
                self.watch(layer, window.sequence, scaled, keys_seen, window.memory, blocks)
            if not ends:
                # under autocast the queries have another dtype than the K/V
                parts = [(rows, seen, mask.to(query.dtype)) for rows, seen, mask in window.parts]
                output.append(attend_joined(queries, keys_seen, values_seen, blocks, parts, scaling, dropout))
        if ends:
            raise PassEndedError
        return torch.cat(output, dim=1).transpose(0, 1)[None, self.by_kind]


def _parts(seen: Tensor, prefix: Prefix | None, dtype: torch.dtype) -> list[Part]:
    """Return the rows of a window some at a time, with their masks.

    seen: [rows, entries] bool, which entries rows see.
    """
    parts: list[Part] = []
    step = _ROWS_ON_CPU if seen.device.type == "cpu" else len(seen)
    for start in range(0, len(seen), step):
        rows = seen[start : start + step]
        entries = 1 + int(rows.any(0).nonzero().max()) if step < len(seen) else rows.shape[1]
        mask = torch.zeros(len(rows), entries, dtype=dtype, device=seen.device)
        mask.masked_fill_(~rows[:, :entries], float("-inf"))
        parts.append((slice(start, start + len(rows)), entries, mask_before(mask, prefix)))
    return parts


def _attended_together(window: WindowRows) -> tuple[int, int, int]:
    """Return a key that is the same for neighbouring windows that are parallel branches of one sequence and memory."""
    return window.sequence, window.memory, window.cached


def _visible(query_orders: Tensor, key_orders: Tensor, *, hidden: bool) -> Tensor:
    """Return which entries of a window each of its rows sees, [queries, keys] bool.

    A row sees itself and the entries before it; with `hidden`, raw rows see no beacons.
    """
    seen = key_orders[None, :] <= query_orders[:, None]
    if hidden:
        seen &= (query_orders[:, None] % 2 == 1) | (key_orders[None, :] % 2 == 0)
    return seen


def beacon_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # sixth, as in stock functions: packages that wrap them, such as kvpress, rely on it
    scaling: float | None = None,
    beacon_pass: AttentionPass | None = None,
    prefixes: PrefixBatch | None = None,
    packed: PackedCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as the call's `AttentionPass` does, with memories if it brings prefixes, else by stock SDPA."""
    layer: int = module.layer_idx  # type: ignore[assignment]  # every stock attention module has it
    if packed is not None:
        return packed.attend(layer, query, key, value, scaling), None
    if prefixes:
        mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
        return attend_behind(prefixes, layer, query, key, value, mask, scaling, dropout).transpose(1, 2), None
    if beacon_pass is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    return beacon_pass.attend(layer, query, key, value, scaling, dropout), None


AttentionInterface.register(IMPLEMENTATION, beacon_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
