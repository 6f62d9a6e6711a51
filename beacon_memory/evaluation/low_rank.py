"""The baseline `cskv:R`: all tokens, with fewer numbers each, in place of fewer tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.layout import slots_of
from beacon_memory.modeling.model import BeaconModel

from .baselines import PrefixBaseline, PrefixMemory
from .pieces import Passages, cut_middle

__all__ = ["LowRank"]

_RECENT = 32  # tokens at the end that are kept whole, as CSKV does; but at most a quarter of the budget


class LowRank(PrefixBaseline):
    """K/V of low rank, as CSKV (arXiv 2409.10593) keeps them, at its best: 1/R of the numbers of a text's K/V.

    CSKV puts two thin matrices in the place of the projections of keys and of values, trained to give K/V back as they
    were. Of all matrices of a rank those on the leading eigenvectors of the K/V themselves do so best (Eckart and
    Young). Here they are of this very text, and not counted: no trained ones can lose less.
    """

    def __init__(self, name: str, model: BeaconModel, ratio: int) -> None:
        super().__init__(name, model)
        self.ratio = ratio

    def read(self, passages: Passages, question: str | None) -> PrefixMemory:  # noqa: ARG002  # it does not see it
        """Read the whole text, and keep its K/V in fewer numbers."""
        ids = [id for passage in passages for id in passage]
        kept = cut_middle(ids, self.room)
        (whole,) = self.memories([kept], 0)
        memory, numbers = low_rank(whole, slots_of(whole.span, self.ratio))
        kv_bytes = numbers * self.model.kv_dtype.itemsize
        return PrefixMemory(self.composed([memory]), kv_bytes, cut=len(kept) < len(ids))


def low_rank(memory: MemoryKV, slots: int) -> tuple[MemoryKV, int]:
    """Return a memory of all tokens as low rank gives it back, and how many numbers are kept of it: those of `slots`.

    Which ranks keys and values of a layer have is chosen so that they lose the least, each as a share of its own.
    """
    layers, heads = memory.counts.shape
    tokens, recent = memory.span, min(_RECENT, slots // 4)

    def of_layers(part: Tensor) -> Tensor:
        return part.float().view(layers, heads, tokens, -1).transpose(1, 2).flatten(2)

    whole = torch.stack((of_layers(memory.keys), of_layers(memory.values)), dim=1)
    width = whole.shape[-1]
    ranks = min(2 * width, (slots - recent) * 2 * width // max(1, tokens - recent))  # of keys and values together
    energies, vectors = torch.linalg.eigh(whole.mT @ whole)
    shares = (energies / energies.sum(-1, keepdim=True)).flatten(1)
    kept = torch.zeros_like(shares).scatter_(1, shares.topk(ranks).indices, 1).view_as(energies)
    given_back = (whole @ vectors * kept[..., None, :]) @ vectors.mT
    given_back[..., tokens - recent :, :] = whole[..., tokens - recent :, :]
    parts = given_back.view(layers, 2, tokens, heads, -1).transpose(2, 3).unbind(1)
    keys, values = (part.reshape(memory.keys.shape).to(memory.keys.dtype) for part in parts)
    numbers = layers * (recent * 2 * width + (tokens - recent) * ranks)
    return MemoryKV(keys, values, memory.positions, memory.counts, tokens), numbers
