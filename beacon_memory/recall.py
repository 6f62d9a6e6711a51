"""Recalling: what is loaded of stored documents for one question.

Documents are stored rich. When the question is known, a budget of memory slots is spent where the passages are that the
question is about; of the rest as much is loaded as is left (`zoom`). Without a budget, all is loaded that fits.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from beacon_memory.kv.levels import LEVELS
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.storage.files.kv_file import StoredIndex
from beacon_memory.storage.files.nesting import run_sizes
from beacon_memory.storage.reading import read_document_index, read_document_part, require_same

from .errors import InputError
from .picking import Passage
from .results import SourcePassage
from .zoom import allocate, zoomed

if TYPE_CHECKING:
    from beacon_memory.storage.catalog.rows import DocumentRow
    from beacon_memory.storage.store import MemoryStore

__all__ = ["DEFAULT_SLOTS", "Budget", "Indexes", "Portion", "level_counts", "portions", "slots_of_passages"]

DEFAULT_SLOTS = 256  # that are loaded where passages are found: more of them lead a small reader astray

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_BUDGET = re.compile(r"(?i)\s*(?:x\s*(?P<ratio>\d+(?:\.\d+)?)|(?P<size>\d+(?:\.\d+)?)\s*(?P<unit>[kmg]i?b))\s*")
_MOST_INDEXES = 256


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may be loaded of the documents of a question: slots, bytes of the loaded K/V, or a ratio of tokens.

        Budget.of(500)     500 memory slots, the mean over heads
        Budget.of("64MB")  what 64 MB of K/V hold in the model's dtype
        Budget.of("x16")   a slot for every 16 tokens of the documents

    One of the three is not None.
    """

    slots: int | None = None
    nbytes: int | None = None
    ratio: float | None = None

    @classmethod
    def of(cls, budget: int | str) -> Budget:
        """Read a budget; raises InputError for what is none."""
        if isinstance(budget, str) and budget.strip().isdecimal():
            budget = int(budget)
        if isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1:
            return cls(slots=budget)
        found = _BUDGET.fullmatch(budget) if isinstance(budget, str) else None
        if found and found["ratio"] and float(found["ratio"]) >= 1:
            return cls(ratio=float(found["ratio"]))
        if found and found["unit"] and float(found["size"]) > 0:
            return cls(nbytes=math.floor(float(found["size"]) * _UNITS[found["unit"].lower()]))
        raise InputError(f"budget={budget!r} must be a number of memory slots, bytes as '64MB', or a ratio as 'x16'")

    def slots_for(self, tokens: int, slot_bytes: int) -> int:
        """Return the memory slots that it allows; tokens: of the documents; slot_bytes: of a slot of all heads."""
        if self.ratio is not None:
            return math.ceil(tokens / self.ratio)
        return self.slots if self.slots is not None else (self.nbytes or 0) // slot_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Portion:
    """Tell what is loaded of one document.

    row:    of the document, as its file is.
    lowest: of each section the lowest level that is loaded, None for all of everything.
    relevance: of each section.
    entries: that are loaded, those of all heads of all layers together.
    slots:  that they take, the mean over heads, rounded up.
    sources: the passages of which something is loaded.
    """

    row: DocumentRow
    index: StoredIndex
    lowest: tuple[int, ...] | None
    relevance: tuple[float, ...]
    entries: int
    slots: int
    sources: tuple[SourcePassage, ...]

    @property
    def best(self) -> float:
        """Return how relevant its most relevant section is."""
        return max(self.relevance, default=0.0)

    @property
    def key(self) -> tuple[tuple[int, int], ...] | None:
        """Return what tells it from every other portion of the document: sections in their order, with their levels."""
        if self.lowest is None:
            return None
        chosen = [section for section, level in enumerate(self.lowest) if level < LEVELS]
        return tuple((one, self.lowest[one]) for one in sorted(chosen, key=self.relevance.__getitem__))

    def load(self, store: MemoryStore, device: torch.device, dtype: torch.dtype) -> MemoryKV | QuantizedKV:
        """Read it onto a device, quantized if the file is; raises ConflictError if the document was replaced since.

        Else it raises as `MemoryStore.get`. dtype: of what is not quantized.
        """
        if self.lowest is None:
            row, whole = store.read(self.row, self.row.fingerprint)
            require_same(self.row, row)
            return _on(whole.kv, device, dtype)
        part = _on(read_document_part(store.parts, self.row, self.lowest).kv, device, dtype)
        bounds = [section.first for section in self.index.header.sections] + [self.index.header.span]
        return zoomed(part, bounds, self.lowest, self.relevance)


def _on(kv: MemoryKV | QuantizedKV, device: torch.device, dtype: torch.dtype) -> MemoryKV | QuantizedKV:
    return kv.to(device) if isinstance(kv, QuantizedKV) else kv.to(device, dtype)


class Indexes:
    """The indexes of files that were read lately, by the roots of these."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, StoredIndex] = OrderedDict()

    def __reduce__(self) -> tuple[type[Indexes], tuple[()]]:
        """Pickle none of them."""
        return Indexes, ()

    def get(self, store: MemoryStore, row: DocumentRow) -> tuple[DocumentRow, StoredIndex]:
        """Return the index of a document's file, and its row, which is read anew if the document was replaced."""
        index = self._kept.get(row.root)
        if index is None:
            row, index = read_document_index(store.parts, row)
            self._kept[row.root] = index
            while len(self._kept) > _MOST_INDEXES:
                self._kept.popitem(last=False)
        return row, index


def portions(
    found: Sequence[tuple[DocumentRow, StoredIndex]], passages: Mapping[str, Sequence[Passage]], slots: int | None
) -> list[Portion]:
    """Return what is loaded of documents within a budget of memory slots, or all if that is None.

    passages: of documents, by their ids, those that the question is about, with their scores.
    """
    relevance = [_relevance(index, passages.get(row.id, ())) for row, index in found]
    if slots is None:
        return [_portion(*one, None, of_document) for one, of_document in zip(found, relevance, strict=True)]
    sizes = torch.cat([_sizes(index.counts) for _, index in found])
    heads = math.prod(found[0][1].counts.shape[2:])
    lowest = allocate(sizes, list(chain.from_iterable(relevance)), slots * heads)
    ends = accumulate((len(index.counts) for _, index in found), initial=0)
    return [
        _portion(row, index, tuple(lowest[start:stop]), of_document)
        for (row, index), (start, stop), of_document in zip(found, pairwise(ends), relevance, strict=True)
    ]


def slots_of_passages(
    found: Sequence[tuple[DocumentRow, StoredIndex]], passages: Mapping[str, Sequence[Passage]]
) -> int:
    """Return the memory slots that the sections of documents take which passages are in, rounded up; see `portions`."""
    entries = 0
    for row, index in found:
        sizes = index.counts.sum((1, 2, 3), dtype=torch.int64).tolist()
        entries += sum(
            size for size, one in zip(sizes, _relevance(index, passages.get(row.id, ())), strict=True) if one
        )
    return -(-entries // math.prod(found[0][1].counts.shape[2:]))


def _portion(
    row: DocumentRow, index: StoredIndex, lowest: tuple[int, ...] | None, relevance: Sequence[float]
) -> Portion:
    heads, sections = math.prod(index.counts.shape[2:]), index.header.sections
    levels = torch.tensor(lowest or (0,) * len(sections), dtype=torch.int64)
    loaded = torch.arange(LEVELS) >= levels[:, None]
    entries = (_sizes(index.counts) * loaded).sum(1).tolist()
    sources = tuple(
        SourcePassage(row.id, section.start, section.stop, relevant, count / (heads * section.size))
        for section, relevant, count in zip(sections, relevance, entries, strict=True)
        if count
    )
    return Portion(row, index, lowest, tuple(relevance), sum(entries), -(-sum(entries) // heads), sources)


def level_counts(index: StoredIndex) -> Tensor:
    """Return how many entries of each level each section has, [sections, LEVELS, layers, kv_heads] int64."""
    sections, levels, *heads = index.counts.shape
    counts = torch.zeros(sections, LEVELS, *heads, dtype=torch.int64)
    counts[:, LEVELS - levels :] = index.counts.flip(1)
    return counts


def _sizes(counts: Tensor) -> Tensor:
    """Return how many entries of each level each section has, [sections, LEVELS] int64, from the lowest level up."""
    sizes = torch.zeros(len(counts), LEVELS, dtype=torch.int64)
    falling = run_sizes(counts)
    sizes[:, LEVELS - falling.shape[1] :] = falling.flip(1)
    return sizes


def _relevance(index: StoredIndex, passages: Sequence[Passage]) -> list[float]:
    """Return how relevant each section is: the best score of a passage, by the share of the smaller one they share."""
    sections = index.header.sections
    if not passages or not sections:
        return [0.0] * len(sections)
    bounds = torch.tensor([(one.start, one.stop) for one in sections], dtype=torch.float64)
    starts, stops, scores = torch.tensor([(one.start, one.stop, one.score) for one in passages], dtype=torch.float64).T
    shared = bounds[:, 1:].minimum(stops) - bounds[:, :1].maximum(starts)
    smaller = (bounds[:, 1:] - bounds[:, :1]).minimum(stops - starts).clamp(min=1)
    return [float(one) for one in (shared / smaller * scores).amax(1).clamp(min=0).tolist()]
