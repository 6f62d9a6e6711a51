"""The attention function that can read with beacons, registered with transformers under the name `beacon_memory`.

A model that uses it behaves as with `sdpa`, unless a call brings a `BeaconPass`, a `MemoryCache` or a `PackedCache`.
All are handed on as keyword arguments of the model call, never through a global variable, so that threads and gradient
checkpointing cannot mix up two passes.

The tokens after a memory (`Prefix`) begin at position 0, and the memory has the positions before it. That is possible
because rotary attention depends only on the distance between two positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from beacon_memory.kv.memory_kv import BeaconKV
from beacon_memory.kv.prefix import Block, Prefix
from beacon_memory.kv.rope import Rope, apply_rotation

from .layout import BeaconLayout, WindowRows
from .packed_cache import PackedCache
from .prefix_attention import PrefixBatch, attend_behind, for_queries

__all__ = ["IMPLEMENTATION", "BeaconPass", "Watch"]

IMPLEMENTATION = "beacon_memory"
# A function that is called for each window in each layer, to observe its attention. Its arguments: number of the layer;
# number of the sequence; queries [heads, rows, head_dim], scaled and rotated; keys [kv_heads, memory + own, head_dim],
# rotated; how many of the keys are memory slots; the blocks of the prefix.
Watch = Callable[[int, int, Tensor, Tensor, int, Sequence[Block]], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    """One window, or several parallel branches on one memory, on the device.

    memory: how many memory slots it sees.
    rows:   its rows among those of the pass, sorted by window.
    cached: [cached] past entries of this window, which an earlier pass has read.
    mask:   [1, 1, rows, memory + cached + rows], added to the scores.
    """

    sequence: int
    memory: int
    rows: slice
    cached: Tensor
    mask: Tensor


class BeaconPass:
    """A `BeaconLayout` on a device, shared by all layers of one forward pass.

    past:   K/V of the pool entries that earlier passes have read, before RoPE.
    keep:   pool entries whose K/V the pass gives back, see `collected`.
    prefixes: for each sequence the memory that all its windows follow, if any.
    watch:  a function that observes the attention, see Watch.
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
    ) -> None:
        device, dtype = past.keys.device, past.keys.dtype

        def indices(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.long, device=device)

        self.raw_rows = len(layout.raw_ids)
        self.rope = rope
        self.past = past
        self.prefixes = [PrefixBatch([prefix]) for prefix in prefixes]
        self.watch = watch
        # Attention takes the rows window by window, but the linear layers need all raw rows first.
        self.by_window = indices([row for window in layout.windows for row in window.queries])
        self.by_kind = self.by_window.argsort()
        self.table = rope.table(indices(layout.positions))
        self.rows_table = tuple(part[past.slots + self.by_window] for part in self.table)
        self.memories = [indices(memory) for memory in layout.memories]
        self.memory_table = rope.table(torch.arange(max(map(len, layout.memories), default=0), device=device))
        orders = indices(layout.orders)
        self.windows = []
        start = 0
        for (sequence, memory, cached), group in groupby(layout.windows, _attended_together):
            parts = [indices(window.own) for window in group]
            seen = torch.block_diag(*(_visible(orders[own[cached:]], orders[own], hidden=hidden) for own in parts))
            mask = torch.zeros(1, 1, len(seen), memory + seen.shape[1], dtype=dtype, device=device)
            mask[..., memory:].masked_fill_(~seen, float("-inf"))
            rows = slice(start, start + len(seen))
            self.windows.append(_Window(sequence, memory, rows, parts[0][:cached], mask))
            start = rows.stop
        self._keep = indices(keep)
        self._collected: dict[int, tuple[Tensor, Tensor]] = {}

    def collect(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Collect the K/V to keep from the pool of a layer, [1, kv_heads, pool, head_dim], keys before RoPE."""
        if len(self._keep):
            self._collected[layer] = (keys[0, :, self._keep], values[0, :, self._keep])

    @property
    def collected(self) -> BeaconKV:
        """Return the K/V of the entries to keep, [layers, kv_heads, kept, head_dim]."""
        if not self._collected:
            return self.past[:0]
        keys, values = zip(*(self._collected[layer] for layer in sorted(self._collected)), strict=True)
        return BeaconKV(torch.stack(keys), torch.stack(values))


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


def _attend_by_window(
    beacon_pass: BeaconPass,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Let each window attend to its memory slots and to itself.

    query: [1, heads, rows, head_dim]; key, value: [1, kv_heads, rows, head_dim]; query and key at RoPE position 0.
    Returns [1, rows, heads, head_dim].
    """
    rope, past, by_window = beacon_pass.rope, beacon_pass.past, beacon_pass.by_window
    query, key = rope.remove_scaling(query), rope.remove_scaling(key)
    pool_keys = torch.cat((past.keys[layer][None], key), dim=2)
    pool_values = torch.cat((past.values[layer][None], value), dim=2)
    beacon_pass.collect(layer, pool_keys, pool_values)

    query = apply_rotation(query[:, :, by_window], *beacon_pass.rows_table)
    own_keys = apply_rotation(key[:, :, by_window], *beacon_pass.rows_table)
    own_values = value[:, :, by_window]
    memories = []
    for memory in beacon_pass.memories:
        cos, sin = (part[: len(memory)] for part in beacon_pass.memory_table)
        memories.append((apply_rotation(pool_keys[:, :, memory], cos, sin), pool_values[:, :, memory]))

    output = []
    for window in beacon_pass.windows:
        memory_keys, memory_values = (part[:, :, : window.memory] for part in memories[window.sequence])
        keys, values = [memory_keys], [memory_values]
        if len(window.cached):
            cos, sin = (part[window.cached] for part in beacon_pass.table)
            keys.append(apply_rotation(pool_keys[:, :, window.cached], cos, sin))
            values.append(pool_values[:, :, window.cached])
        queries = query[:, :, window.rows]
        keys_seen = torch.cat((*keys, own_keys[:, :, window.rows]), dim=2)
        values_seen = torch.cat((*values, own_values[:, :, window.rows]), dim=2)
        before = beacon_pass.prefixes[window.sequence] if beacon_pass.prefixes else None
        if beacon_pass.watch is not None:
            scaled = queries[0] * (queries.shape[-1] ** -0.5 if scaling is None else scaling)
            prefix = before.prefixes[0] if before else None
            blocks = prefix.blocks(layer) if prefix else ()
            beacon_pass.watch(layer, window.sequence, scaled, keys_seen[0], window.memory, blocks)
        mask = window.mask.to(query.dtype)
        if before:
            output.append(attend_behind(before, layer, queries, keys_seen, values_seen, mask, scaling, dropout))
            continue
        keys_seen, values_seen = (
            for_queries(part, queries.shape[1] // part.shape[1]) for part in (keys_seen, values_seen)
        )
        output.append(scaled_dot_product_attention(queries, keys_seen, values_seen, mask, dropout, scale=scaling))
    return torch.cat(output, dim=2).transpose(1, 2)[:, beacon_pass.by_kind]


def beacon_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # sixth, as in stock functions: packages that wrap them, such as kvpress, rely on it
    scaling: float | None = None,
    beacon_pass: BeaconPass | None = None,
    prefixes: PrefixBatch | None = None,
    packed: PackedCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by windows if the call brings a `BeaconPass`, with memories if it brings any, else by stock SDPA."""
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
    return _attend_by_window(beacon_pass, layer, query, key, value, scaling, dropout), None


AttentionInterface.register(IMPLEMENTATION, beacon_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
