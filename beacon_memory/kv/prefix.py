"""A memory as the prefix of what is read: its keys rotated to their positions, ready for attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory_kv import MemoryKV
from .rope import Rope, apply_rotation

__all__ = ["Prefix"]

Block = tuple[slice, Tensor, Tensor]


class Prefix:
    """A memory in front of what is read, at positions -span to -1, for all layers of a model.

    blocks: for each layer a list of (kv heads, keys, values), keys rotated, both [heads, entries, head_dim]. If all
            heads have the same number of entries they are one block, else each head is a block of its own.
    """

    def __init__(self, memory: MemoryKV, rope: Rope) -> None:
        self.blocks: list[list[Block]] = []
        for layer, counts in enumerate(memory.counts.tolist()):
            heads = [
                (apply_rotation(keys, *rope.table(positions.float() - memory.span)), values)
                for keys, values, positions in memory.layer(layer)
            ]
            width = len(heads) if len(set(counts)) == 1 else 1
            blocks = []
            for at in range(0, len(heads), width):
                keys, values = zip(*heads[at : at + width], strict=True)
                blocks.append((slice(at, at + width), torch.stack(keys), torch.stack(values)))
            self.blocks.append(blocks)
