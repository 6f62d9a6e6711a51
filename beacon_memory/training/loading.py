"""Parts of selected memories, loaded for the branches of a sample as they would be of stored ones."""

from __future__ import annotations

from itertools import accumulate
from typing import cast

import torch

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.kv.levels import level_of
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.prefix import Prefix
from beacon_memory.modeling.layout import slots_of
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.ranking import matches
from beacon_memory.zoom import allocate, chunks, section_counts, zoomed

from .samples import Loaded, Sample

__all__ = ["SelectedMemory"]

_RICH = 2  # the ratio of the memory that passages are taken from, as a store keeps it


class SelectedMemory:
    """The parts of a sample, read once with all their K/V and scored; any less of them is a part of that.

    So it is the memory that a store has of them, but for parts of several windows: there the later ones would be read
    behind the compressed ones before them. Nothing has a gradient: the weights that read documents are not trained.
    """

    def __init__(self, model: BeaconModel, sample: Sample) -> None:
        self.model = model
        compressor = BeaconCompressor(model)
        works = [(None, Work(ids, compressor.ratios(len(ids), 1, "select"))) for ids in sample.parts]
        self.parts = [document.kv for _, document in compressor.compress(works, compression="select")]
        self.sink = MemoryKV.of(compressor.sink)
        self.pieces = [piece for part in sample.parts for piece in chunks(part)]

    @torch.no_grad()
    def prefix(self, loaded: Loaded) -> Prefix:
        """Return what is loaded, behind the sink, as a prefix of branches."""
        memory = self._zoomed(loaded) if loaded.question else self._blind(loaded.ratio)
        room = self.model.max_positions - self.model.config.beacon_window
        return self.model.prefix(MemoryKV.concat([self.sink, memory], room))

    def _blind(self, ratio: int) -> MemoryKV:
        return MemoryKV.concat([part.from_level(level_of(ratio)) for part in self.parts])

    def _zoomed(self, loaded: Loaded) -> MemoryKV:
        memory = self._blind(_RICH)
        bounds = [0, *accumulate(map(len, self.pieces))]
        counts = section_counts(memory, bounds)
        texts = [cast(str, self.model.tokenizer.decode(piece)) for piece in self.pieces]
        relevance = matches(texts, loaded.question)
        budget = slots_of(memory.span, loaded.ratio) * memory.counts.numel()
        return zoomed(memory, bounds, allocate(counts.sum((2, 3)), relevance, budget), relevance)
