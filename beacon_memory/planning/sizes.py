"""How many bytes a document will take: in its file, and ready for attention.

The form of files is that of docs/file-format.md, so these are no estimates. Only how many groups of keys share scales
in `int8` and `int4` depends on how many entries each head gets, which the text decides; then both bounds are told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from beacon_memory.compression.ratio import window_ratios
from beacon_memory.config import BeaconConfig
from beacon_memory.documents import Precision
from beacon_memory.kv.fingerprint import Fingerprint
from beacon_memory.kv.levels import LEVELS, kept_from
from beacon_memory.kv.sizes import GROUP, group_bytes, ready_entry_bytes, stored_entry_bytes
from beacon_memory.modeling.layout import slots_of
from beacon_memory.storage.files.header import DocumentHeader, WindowSpan
from beacon_memory.storage.files.kv_metadata import ENTRY, KVMetadata
from beacon_memory.storage.files.tensor_header import NamedForm, header_of, spans_of

from .estimates import Bounds
from .lengths import PlannedText
from .models import ModelShape

__all__ = ["MemorySize", "Way", "WindowSize", "window_sizes"]

_HASH = 16  # bytes of the hash of a section and level
_TIME = "2000-01-01T00:00:00.000+00:00"  # of the length that all have
_FINGERPRINT = Fingerprint(*["0" * 16] * 5)


@dataclass(frozen=True, slots=True)
class Way:
    """How documents are compressed: method, score, ratio, the settings of the model, and whether it has a probe."""

    compression: str
    score: str
    ratio: int
    config: BeaconConfig
    probed: bool = False

    @property
    def chooses(self) -> bool:
        """Whether each head keeps entries of its own: all ways, but for the beacons of the paper."""
        return self.compression != "beacon" or self.config.beacon_dense_ratio > 0

    @property
    def scored(self) -> str:
        """The score that entries are chosen by."""
        return "repeat" if self.compression == "beacon" else self.score

    @property
    def parameters(self) -> dict[str, str | int]:
        """The parameters that a file names, as `CompressionMethod.parameters`."""
        if self.compression == "beacon":
            return {"dense_ratio": self.config.beacon_dense_ratio} if self.chooses else {}
        hybrid = {"hybrid_factor": self.config.beacon_hybrid_factor} if self.compression == "hybrid" else {}
        probe = {"probe": "0" * 16} if self.probed and self.score == "expected" else {}
        return {"score": self.score, **probe, **hybrid}


@dataclass(frozen=True, slots=True)
class WindowSize:
    """Count the entries that a window leaves of its tokens, in the mean over heads.

    among:   entries of a head that are chosen among: of tokens, or of beacons.
    chosen:  those that are kept. Each head has its own number of them, unless it keeps all.
    beacons: entries of beacons that all heads keep.
    span:    positions.
    depths:  levels that a file tells of.
    """

    tokens: int
    ratio: int
    among: int
    chosen: int
    beacons: int
    span: int
    depths: int

    @property
    def slots(self) -> int:
        """All entries of a head."""
        return self.chosen + self.beacons

    def seen_from(self, level: int) -> int:
        """Return the entries of a head that are left from a level on, see `kv.levels`."""
        return self.beacons + (min(self.chosen, kept_from(level, self.tokens)) if self.ratio else self.chosen)

    def groups(self, heads: int) -> Bounds:
        """Return how many groups the entries make: of one head up to GROUP each."""
        if self.chosen in (0, self.among):
            return Bounds.of(heads * math.ceil(self.slots / GROUP))
        entries = heads * self.slots
        low = max(math.ceil(entries / GROUP), heads * math.ceil(self.beacons / GROUP))
        # a head with entries has (entries + GROUP - 1) / GROUP groups at most
        high = min((entries + (GROUP - 1) * heads) // GROUP, heads * math.ceil((self.beacons + self.among) / GROUP))
        return Bounds(low, high if self.beacons else min(high, entries))


def window_sizes(tokens: int, way: Way) -> list[WindowSize]:
    """Return what each window of a document of so many tokens leaves."""
    window = way.config.beacon_window
    ratios = window_ratios(tokens, way.ratio, way.config)
    return [_window(min(window, tokens - number * window), ratio, way) for number, ratio in enumerate(ratios)]


def _window(tokens: int, ratio: int, way: Way) -> WindowSize:
    slots = slots_of(tokens, ratio)
    if not way.chooses:
        return WindowSize(tokens, ratio, 0, 0, slots, slots, 1)
    among = slots_of(tokens, min(ratio, way.config.beacon_dense_ratio)) if way.compression == "beacon" else tokens
    beacons = slots_of(tokens, ratio * way.config.beacon_hybrid_factor) if way.compression == "hybrid" and ratio else 0
    chosen = slots - beacons
    return WindowSize(tokens, ratio, among, chosen, beacons, among + beacons, _depths(tokens, chosen) if ratio else 1)


def _depths(tokens: int, chosen: int) -> int:
    """Return how many levels, from the top one down, the best entries of a window have."""
    lowest = max((level for level in range(LEVELS) if kept_from(level, tokens) >= chosen), default=0)
    return LEVELS - lowest if chosen else 1


@dataclass(frozen=True)  # without slots, so that what is worked out is kept
class MemorySize:
    """The bytes of the memory of one document."""

    text: PlannedText
    shape: ModelShape
    way: Way

    @cached_property
    def windows(self) -> list[WindowSize]:
        """Its windows."""
        return window_sizes(self.text.tokens, self.way)

    @property
    def slots(self) -> int:
        """Its entries of each head, in the mean."""
        return sum(window.slots for window in self.windows)

    @property
    def entries(self) -> int:
        """Its entries of all heads."""
        return self.slots * self.shape.kv_width

    @cached_property
    def groups(self) -> Bounds:
        """The groups that quantized keys are in."""
        return sum((window.groups(self.shape.kv_width) for window in self.windows), Bounds.of(0))

    def stored(self, precision: Precision) -> Bounds:
        """Return the bytes of its K/V in a file: what `list` shows, and quotas count."""
        return self._bytes(stored_entry_bytes(self.shape.head_dim, precision), precision)

    def ready(self, precision: Precision) -> Bounds:
        """Return the bytes that it takes while it is ready, in RAM or on a device.

        precision: that of its file; what is not quantized there is ready in the dtype of the model, so say that.
        """
        return self._bytes(ready_entry_bytes(self.shape.head_dim, precision), precision)

    def _bytes(self, entry: int, precision: Precision) -> Bounds:
        each = group_bytes(self.shape.head_dim, precision)
        groups = self.groups if each else Bounds.of(0)
        return Bounds.of(self.entries * entry) + groups * each

    def file(self, precision: Precision) -> Bounds:
        """Return the bytes of its file: K/V, index, header and text. Exact if the text was measured."""
        if not precision.quantized:
            return Bounds.of(self._file(precision, 0))
        return Bounds(*(self._file(precision, groups) for groups in (self.groups.low, self.groups.high)))

    def _file(self, precision: Precision, groups: int) -> int:
        forms = self._forms(precision, groups)
        described = {name: {"dtype": f"torch.{dtype}", "shape": [*shape]} for name, (dtype, shape) in forms.items()}
        entry = KVMetadata(self.header, described, "0" * 2 * _HASH).entry()
        return len(header_of(forms, {ENTRY: entry})) + max(stop for _, stop in spans_of(forms).values())

    def _forms(self, precision: Precision, groups: int) -> dict[str, NamedForm]:
        entries, shape = self.entries, self.shape
        sections = self.header.section_count
        depths = max(window.depths for window in self.windows)
        forms: dict[str, NamedForm] = {
            "text": ("uint8", (self.text.text_bytes,)),
            "places": ("uint8", (entries,)),
            "counts": ("uint8", (sections, depths, shape.layers, shape.kv_heads)),
            "hashes": ("uint8", (sections, depths, _HASH)),
        }
        if not precision.quantized:
            return forms | dict.fromkeys(("keys", "values"), (precision.value, (entries, shape.head_dim)))
        codes: Sequence[int] = (entries, shape.head_dim * precision.bits // 8)
        forms |= dict.fromkeys(("keys", "values"), ("uint8", codes))
        forms |= dict.fromkeys(("value_scales", "value_zeros"), ("float16", (entries,)))
        return forms | dict.fromkeys(("key_scales", "key_zeros"), ("float16", (groups, shape.head_dim)))

    @cached_property
    def header(self) -> DocumentHeader:
        """Its header, with what has the same length in all files made up."""
        spans, first = [], 0
        for window in self.windows:
            offsets = self.text.offsets[first : first + window.tokens]
            spans.append(WindowSpan.of(window.tokens, window.ratio, window.span, offsets, self.text.breaks))
            first += window.tokens
        full = self.windows[-1].tokens == self.way.config.beacon_window
        return DocumentHeader(
            id=self.text.id,
            content_hash="0" * 64,
            tokens=self.text.tokens,
            windows=tuple(spans),
            tail_ids=() if full else tuple(self.text.ids[first - self.windows[-1].tokens :]),
            compression=self.way.compression,
            span=sum(window.span for window in self.windows),
            fingerprint=_FINGERPRINT,
            method=self.way.parameters,
            created_at=_TIME,
        )
