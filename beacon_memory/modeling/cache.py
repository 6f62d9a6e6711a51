"""The K/V cache of a conversation that has a memory as its prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from beacon_memory.kv.prefix import Prefix

from .packed_cache import PackedCache
from .prefix_attention import PrefixBatch

__all__ = ["MemoryCache", "bring_prefixes"]


class MemoryCache(DynamicCache):
    """A cache of the tokens that follow a memory. It carries the memory to the attention function.

    prefixes: one for each row of the batch. Rows that come from the same request share theirs.
    batch:    the prefixes as attention takes them.
    """

    def __init__(self, prefixes: Sequence[Prefix], **options: Any) -> None:
        super().__init__(**options)
        self.batch = PrefixBatch(prefixes)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch, together with its prefix."""
        super().batch_repeat_interleave(repeats)
        self.batch = self.batch.of_rows([row for row in range(len(self.batch.prefixes)) for _ in range(repeats)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of the batch, and their prefixes, in the order of the chosen beams."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # it takes any tensor of indices
        self.batch = self.batch.of_rows(beam_idx.tolist())


def bring_prefixes(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hand what a `MemoryCache` or a `PackedCache` carries to the attention function; a hook of attention modules."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, MemoryCache):
        kwargs = {**kwargs, "prefixes": cache.batch}
    elif isinstance(cache, PackedCache):
        kwargs = {**kwargs, "packed": cache}
    return args, kwargs
