"""placeholder until the allocation lands"""

from __future__ import annotations
from collections.abc import Sequence
from torch import Tensor
from beacon_memory.kv.memory_kv import MemoryKV


def allocate(sizes: Tensor, relevance: Tensor, budget: int) -> Tensor: ...
def loaded(memory: MemoryKV, bounds: Sequence[int], lowest: Sequence[int]) -> MemoryKV: ...
