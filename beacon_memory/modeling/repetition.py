"""A pass in which windows are repeated behind themselves, to find out which of their tokens are looked up.

Only that counts, not what the pass computes: attention is worked out by matrix products, in the precision of the model
as stock `eager` attention is, because then its weights are at hand. It ends when those of the last layer are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from beacon_memory.kv.memory_kv import BeaconKV
from beacon_memory.kv.prefix import Block, Prefix
from beacon_memory.kv.rope import Rope, apply_rotation

from .attention import PassEndedError

__all__ = ["PIECE", "RepeatedWindow", "Repetition"]

PIECE = 256  # tokens that are repeated at a time; pieces do not see each other
_SCORES_ON_CPU = 1 << 20  # scores of attention that are held at a time: what a cache has room for
_SCORES = 1 << 26


class RepeatedWindow(Protocol):
    """A window that was read and is to be repeated."""

    @property
    def prefix(self) -> Prefix:
        """The memory in front of it."""

    @property
    def kv(self) -> BeaconKV:
        """K/V that stand for it, [layers, kv_heads, slots, head_dim], keys before RoPE."""

    @property
    def ids(self) -> Sequence[int]:
        """Its token ids."""


class Repetition:
    """Let pieces of windows attend to what stands in front, the window and themselves; an `AttentionPass`.

    raw_rows: how many rows there are: the tokens of all windows, one after another.
    """

    def __init__(self, windows: Sequence[RepeatedWindow], rope: Rope) -> None:
        self.windows = windows
        self.rope = rope
        self.raw_rows = sum(len(window.ids) for window in windows)
        device = windows[0].kv.keys.device
        pieces = [window.kv.slots + torch.arange(len(window.ids), device=device) % PIECE for window in windows]
        self.table = rope.table(torch.cat(pieces))
        self.window_table = rope.table(torch.arange(max(window.kv.slots for window in windows), device=device))
        dtype = windows[0].kv.keys.dtype
        self.mask = torch.full((PIECE, PIECE), float("-inf"), dtype=dtype, device=device).triu(1)
        self._received: list[list[Tensor]] = [[] for _ in windows]

    @property
    def received(self) -> list[Tensor]:
        """Return for each window the squares of the weights that its slots have received, added up.

        Each is [layers, kv_heads, slots] float32.
        """
        return [torch.stack(layers) for layers in self._received]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, _dropout: float
    ) -> Tensor:
        """Attend, and add up the weights, see `AttentionPass`."""
        cos, sin = self.table
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        queries = apply_rotation(self.rope.remove_scaling(query[0]), cos * scale, sin * scale)
        keys = apply_rotation(self.rope.remove_scaling(key[0]), cos, sin)
        output = torch.empty_like(queries)
        last, start = layer + 1 == len(self.windows[0].kv.keys), 0
        for window, received in zip(self.windows, self._received, strict=True):
            rows = slice(start, start + len(window.ids))
            start = rows.stop
            cos, sin = (part[: window.kv.slots] for part in self.window_table)
            own = (apply_rotation(window.kv.keys[layer], cos, sin), window.kv.values[layer])
            again = queries[:, rows].unflatten(0, (len(keys), -1)), keys[:, rows], value[0, :, rows]
            blocks = window.prefix.blocks(layer) or [(slice(0, len(keys)), keys[:, :0], keys[:, :0])]
            into = None if last else output[:, rows].unflatten(0, (len(keys), -1))
            received.append(torch.cat([self._attend_in_block(block, *own, *again, into) for block in blocks]))
        if last:
            raise PassEndedError
        return output.transpose(0, 1)[None]

    def _attend_in_block(
        self,
        block: Block,
        window_keys: Tensor,
        window_values: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor | None,
    ) -> Tensor:
        """Attend with heads that have equally many entries in front; returns what the window's slots have received.

        window_keys, window_values: [kv_heads, slots, head_dim]; queries, output: [kv_heads, groups, tokens, head_dim]
        of the tokens that repeat the window, keys and values alike; output is written, unless it is not wanted.
        """
        of_block, front_keys, front_values = block
        slots, tokens, groups = window_keys.shape[1], keys.shape[1], queries.shape[1]
        received = window_keys.new_zeros(of_block.stop - of_block.start, slots, dtype=torch.float32)
        most = _SCORES_ON_CPU if keys.device.type == "cpu" else _SCORES
        step = max(1, most // (groups * min(PIECE, tokens) * (slots + PIECE + front_keys.shape[1])))
        for first in range(of_block.start, of_block.stop, step):
            heads = slice(first, min(first + step, of_block.stop))
            here = slice(heads.start - of_block.start, heads.stop - of_block.start)
            for start in range(0, tokens, PIECE):
                piece = slice(start, min(start + PIECE, tokens))
                size = piece.stop - piece.start
                # joined the way round in which they are multiplied, which is faster
                turned = torch.cat((window_keys[heads].mT, keys[heads, piece].mT, front_keys[here].mT), dim=2)
                scores = queries[heads, :, piece].flatten(1, 2) @ turned
                scores[..., slots : slots + size].unflatten(1, (groups, size)).add_(self.mask[:size, :size])
                weights = scores.softmax(-1)
                received[here] += _squares(weights[..., :slots])
                if output is not None:
                    seen = torch.cat((window_values[heads], values[heads, piece], front_values[here]), dim=1)
                    output[heads, :, piece] = (weights @ seen).unflatten(1, (groups, size))
        return received


def _squares(weights: Tensor) -> Tensor:
    """Add up the squares of weights, [heads, rows, tokens], over rows."""
    if weights.dtype == torch.float16:  # which has no room for the squares of small weights
        weights = weights.float()
    return (weights.new_ones(1, 1, weights.shape[1]) @ weights.square())[:, 0].float()
