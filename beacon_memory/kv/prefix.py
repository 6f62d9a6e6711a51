"""A memory in front of what is read: its keys rotated, head by head, ready to be attended to."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory_kv import MemoryKV
from .rope import Rope, apply_rotation

__all__ = ["Prefix"]

Block = tuple[slice, Tensor, Tensor]


class Prefix:
    """A memory in front of what is read, at the positions -span to -1, for all layers of a model.

    blocks: for each layer (kv heads, keys [heads, entries, head_dim], values), keys rotated: all heads in one block if
            they have equally many entries, else a block for each.
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
