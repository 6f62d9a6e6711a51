"""The cache that holds the tokens behind a memory, and hands the memory to attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from beacon_memory.kv.prefix import Prefix

__all__ = ["MemoryCache", "bring_prefixes"]


class MemoryCache(DynamicCache):
    """A cache that holds the tokens behind a memory, and brings the memory along.

    prefixes: one for each row of the batch. Rows of one request share theirs, whatever beams do.
    """

    def __init__(self, prefixes: Sequence[Prefix], **options: Any) -> None:
        super().__init__(**options)
        self.prefixes = list(prefixes)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See DynamicCache."""
        super().batch_repeat_interleave(repeats)
        self.prefixes = [prefix for prefix in self.prefixes for _ in range(repeats)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See DynamicCache."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # it takes any tensor of indices
        self.prefixes = [self.prefixes[row] for row in beam_idx.tolist()]


def bring_prefixes(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A pre-hook of attention modules: hands the memories of a `MemoryCache` to the attention function."""
    cache = kwargs.get("past_key_values")
    return args, {**kwargs, "prefixes": cache.prefixes} if isinstance(cache, MemoryCache) else kwargs
