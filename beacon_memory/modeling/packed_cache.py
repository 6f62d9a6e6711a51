"""The K/V of many requests, each behind a memory of its own, that are read in one pass without padding.

The new tokens of all requests stand in one row of a batch, so that linear layers take them together; attention takes
each request by itself. What a pass writes counts only when it is taken, so a pass that failed can be tried again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from beacon_memory.kv.prefix import Prefix

from .prefix_attention import PrefixBatch, attend_apart

__all__ = ["OwnKV", "PackedCache"]


class OwnKV:
    """Keys, rotated, and values of the tokens of one request, in room that is made for all of them at the first.

    shape: layers, kv heads, tokens that there is room for, and numbers of a head.
    read:  how many tokens are in it.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._make = partial(torch.empty, shape, dtype=dtype, device=device)
        self._layers: list[tuple[Tensor, Tensor]] = []
        self.read = 0

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write what follows the tokens that were read, [kv_heads, new, head_dim]; returns that of all of them."""
        if not self._layers:
            self._layers = [*zip(*(self._make().unbind() for _ in "kv"), strict=True)]
        new = keys.shape[1]
        all_keys, all_values = (part.narrow(1, 0, self.read + new) for part in self._layers[layer])
        all_keys.narrow(1, self.read, new).copy_(keys)
        all_values.narrow(1, self.read, new).copy_(values)
        return all_keys, all_values


class PackedCache(Cache):
    """The K/V of the requests of one pass. It brings them to the attention function.

    own:    of each request what it has read.
    counts: how many new tokens of each stand in the pass, those with one first.
    batch:  the prefixes of those with one; prefixes: of the others.
    """

    def __init__(
        self, own: Sequence[OwnKV], counts: Sequence[int], batch: PrefixBatch, prefixes: Sequence[Prefix]
    ) -> None:
        super().__init__(layers=[])
        single = len(batch.prefixes)
        self._groups = [(batch, own[:single], 1)] if single else []
        self._groups += [
            (PrefixBatch([prefix]), [one], count)
            for prefix, one, count in zip(prefixes, own[single:], counts[single:], strict=True)
        ]

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,  # noqa: ARG002  # as the base class has it
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return new keys and values as they are: `attend` puts them away, for it knows whose they are."""
        return key_states, value_states

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Let the new tokens of each request attend to its memory and to its tokens so far.

        query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim], all rotated. Returns
        [1, tokens, heads, head_dim].
        """
        outputs, at = [], 0
        for batch, owners, count in self._groups:
            columns = slice(at, at := at + len(owners) * count)
            rows = query[0, :, columns].unflatten(1, (len(owners), count)).transpose(0, 1)
            new = zip(owners, key[0, :, columns].split(count, 1), value[0, :, columns].split(count, 1), strict=True)
            own = [owner.write(layer, keys, values) for owner, keys, values in new]
            outputs.append(attend_apart(batch, layer, rows, own, scaling).transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[None]
