"""Compressing documents: to beacons, many to a pass, or to K/V of chosen tokens, window by window.

Both go on where an earlier compression stopped, see `Work`: a window's memory depends on nothing behind the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from beacon_memory.config import COMPRESSIONS
from beacon_memory.errors import CapacityError, ConfigError, InputError
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.modeling.layout import Window, slots_of
from beacon_memory.modeling.model import BeaconModel

from .ratio import auto_ratio, positions_needed, too_long, window_ratios
from .scoring import PIECE, repeated
from .selection import read_raw, read_sink, read_window, span_of
from .sequence import SequenceState, advance
from .work import CompressedDocument, CompressedWindow, Ratio, TokenizedText, Work

__all__ = ["BeaconCompressor", "check_score"]

SCORES = ("repeat", "expected")


def check_score(score: str) -> str:
    """`score` if it is one; raises ConfigError otherwise."""
    if score not in SCORES:
        raise ConfigError(f"score={score!r} must be one of {', '.join(map(repr, SCORES))}")
    return score


class BeaconCompressor:
    """Documents to memories, window after window in passes of bounded size.

    rows_per_pass: rows (raw tokens and beacons) that one forward pass of a `beacon` compression may have, at least one
                   window. It bounds the memory that it takes, whatever the length of the documents, and changes no
                   number. The other compressions read one window of one document at a time.
    reserve:       positions of the model to leave free for question and answer behind a document.
    score:         how tokens are chosen for `select` and `hybrid`, see `scoring`: `repeat`, or `expected`, which is
                   worse and saves a pass.

    Raises ConfigError for another score.
    """

    def __init__(
        self, model: BeaconModel, *, rows_per_pass: int = 4096, reserve: int = 1024, score: str = "repeat"
    ) -> None:
        self.model = model
        self.score = check_score(score)
        self.rows_per_pass = rows_per_pass
        self.reserve = reserve
        self._sink: BeaconKV | None = None
        self._measured: Tensor | None = None

    @property
    def sink(self) -> BeaconKV:
        """See `read_sink`; read once."""
        if self._sink is None:
            with torch.inference_mode():
                self._sink = read_sink(self.model)
        return self._sink

    def _scores(self) -> Tensor | None:
        """For the score `expected`, what heads need of the text that is kept for this; measured once."""
        if self.score == "expected" and self._measured is None:
            text = files("beacon_memory.compression").joinpath("calibration.txt").read_text(encoding="utf-8")
            ids = self.tokenize(text).ids[: self.model.config.beacon_window]
            prefix = self.model.prefix(MemoryKV.of(self.sink))
            self._measured = repeated(self.model, prefix, read_raw(self.model, prefix, ids), ids)
        return self._measured

    def tokenize(self, text: str) -> TokenizedText:
        """Token ids of a document. Where the model has no sink, a bos token leads, if its tokenizer sets one."""
        encoded = self.model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
        if not self.model.sink_ids and ids:
            bos = self.model.leading_bos
            return TokenizedText([*bos, *ids], [(0, 0)] * len(bos) + offsets)
        return TokenizedText(ids, offsets)

    def ratios(self, tokens: int, ratio: Ratio) -> list[int]:
        """The ratio of each window of a document of so many tokens.

        ratio: raw tokens per slot; `auto` for the smallest of 2 to 32 that leaves `reserve` positions; or a list
        with one ratio for each window. Raises ConfigError for another value, InputError for no tokens and
        CapacityError, with the numbers, for a document that would not fit.
        """
        config, positions = self.model.config, self.model.max_positions
        if isinstance(ratio, str):
            if ratio != "auto":
                raise ConfigError(f"ratio={ratio!r} must be 'auto', a whole number, or a list of them")
            ratio = auto_ratio(tokens, config, positions, self.reserve)
        ratios = window_ratios(tokens, ratio, config)
        if positions_needed(tokens, ratios, config, self.reserve) > positions:
            raise CapacityError(too_long(tokens, ratio, config, positions, self.reserve))
        return ratios

    def compression(self, name: str) -> str:
        """What `name` stands for: itself, or for `auto` the model's own. Raises ConfigError for one it cannot have."""
        if name not in ("auto", *COMPRESSIONS):
            raise ConfigError(f"compression={name!r} must be one of 'auto', {', '.join(map(repr, COMPRESSIONS))}")
        chosen = self.model.compression if name == "auto" else name
        if chosen == "hybrid" and self.model.config.beacon_attn != "hidden":
            raise ConfigError(
                "compression='hybrid' needs beacon_attn='hidden': with 'full-coverage' raw tokens see the beacons"
            )
        return chosen

    def method(self, compression: str) -> dict[str, str | int]:
        """What else decides how a text becomes slots, by name: to be recorded with it.

        compression: not `auto`, see `compression`. Raises ConfigError for that, and for one that there is not.
        """
        if compression not in COMPRESSIONS:
            raise ConfigError(f"compression={compression!r} must be one of {', '.join(map(repr, COMPRESSIONS))}")
        if compression == "beacon":
            return {}
        of_beacons = {"hybrid_factor": self.model.config.beacon_hybrid_factor} if compression == "hybrid" else {}
        return {"score": self.score, **of_beacons}

    def compress(
        self,
        documents: Iterable[Work],
        progress: Callable[[int], None] = lambda _: None,
        *,
        compression: str = "auto",
    ) -> Iterator[CompressedDocument]:
        """Compress documents, in their order.

        A document is yielded, whole, as soon as its last window was read; one of which all was read before takes no
        pass. `documents` is only read as far as one pass needs. `progress` is called after each pass with the raw
        tokens it read. compression: `beacon`, `select` (K/V of chosen tokens), `hybrid` (both) or `auto`, the model's
        own. Raises InputError for a document whose `read` cannot be the memory of its first `windows` windows.
        """
        compression = self.compression(compression)
        if compression == "beacon":
            return self._to_beacons(documents, progress)
        return (self._choose(work, compression, progress) for work in documents)

    def _windows(self, work: Work, compression: str) -> tuple[CompressedWindow, ...]:
        """The windows of a document as they will be, or were, compressed."""
        config, windows = self.model.config, []
        factor = config.beacon_hybrid_factor if compression == "hybrid" else 0
        for number, ratio in enumerate(window_ratios(len(work.ids), work.ratios, config)):
            first = number * config.beacon_window
            tokens = min(config.beacon_window, len(work.ids) - first)
            span = slots_of(tokens, ratio) if compression == "beacon" else span_of(tokens, ratio, factor)
            windows.append(CompressedWindow(first, tokens, ratio, span))
        return tuple(windows)

    def _read_before(self, work: Work, windows: Sequence[CompressedWindow]) -> list[MemoryKV]:
        """The memory of each window that was read before. Raises InputError where it cannot be that of these windows.

        They go on as parts of their own, because a memory that is interpolated is interpolated part by part.
        """
        full = len(work.ids) // self.model.config.beacon_window
        if not 0 <= work.windows <= full:
            raise InputError(f"windows={work.windows} cannot have been read before: the document has {full} full ones")
        read = MemoryKV.of(self.model.empty_kv()) if work.read is None else work.read
        read = read.to(self.model.device, self.model.dtype)
        ends = list(accumulate((window.span for window in windows[: work.windows]), initial=0))
        if read.span != ends[-1]:
            raise InputError(f"read spans {read.span} positions, but the first {work.windows} windows take {ends[-1]}")
        parts = [read.between(start, stop) for start, stop in pairwise(ends)]
        heads = math.prod(self.model.kv_shape[:2])
        for number, (part, window) in enumerate(zip(parts, windows, strict=False)):
            entries = heads * slots_of(window.tokens, window.ratio)
            if len(part.keys) != entries:
                raise InputError(
                    f"read has {len(part.keys)} entries of window {number}, which at ratio {window.ratio} leaves "
                    f"{entries} in {heads} heads"
                )
        return parts

    @torch.inference_mode()
    def _choose(self, work: Work, compression: str, progress: Callable[[int], None]) -> CompressedDocument:
        """Read a document window by window, each behind the memory of those before it."""
        windows = self._windows(work, compression)
        parts = [MemoryKV.of(self.sink), *self._read_before(work, windows)]
        for window in windows[work.windows :]:
            ids = work.ids[window.first : window.first + window.tokens]
            room = max(1, self.model.max_positions - len(ids) - min(PIECE, len(ids)))
            prefix = self.model.prefix(MemoryKV.concat(parts, room).interpolated(room))
            hybrid, measured = compression == "hybrid", self._scores()
            parts.append(read_window(self.model, prefix, ids, window.ratio, hybrid=hybrid, measured=measured))
            progress(len(ids))
        return CompressedDocument(MemoryKV.concat(parts[1:]), len(work.ids), windows)

    def _to_beacons(self, documents: Iterable[Work], progress: Callable[[int], None]) -> Iterator[CompressedDocument]:
        current: list[_Reading] = []  # documents with windows in the next pass, or unfinished
        rows = 0
        for work in documents:
            windows = self._windows(work, "beacon")
            before = [part.stack() for part in self._read_before(work, windows)]
            reading = _Reading(self.model, work, windows, BeaconKV.concat([self.sink, *before]))
            current.append(reading)
            for window in reading.to_read:
                size = len(window.new_ids) + len(window.anchors)
                if rows and rows + size > self.rows_per_pass:
                    yield from self._run(current, progress)
                    rows = 0
                reading.next.append(window)
                rows += size
            if not rows:  # all of it was read before, and no other document waits
                yield current.pop().result(self.sink.slots)
        if current:
            yield from self._run(current, progress)

    def _run(self, current: list[_Reading], progress: Callable[[int], None]) -> Iterator[CompressedDocument]:
        """Read the collected windows in one pass; yields the documents that are finished and drops them."""
        reading = [one for one in current if one.next]
        with torch.inference_mode():
            states, _ = advance(self.model, [(one.state, one.next) for one in reading])
        tokens = 0
        for one, state in zip(reading, states, strict=True):
            tokens += sum(len(window.new_ids) for window in one.next)
            one.take(state)
        progress(tokens)
        while current and current[0].finished:
            yield current.pop(0).result(self.sink.slots)


class _Reading:
    """One document on its way through the passes, behind a memory of its windows that were read before."""

    def __init__(self, model: BeaconModel, work: Work, windows: tuple[CompressedWindow, ...], memory: BeaconKV) -> None:
        self.tokens = len(work.ids)
        self.windows = windows
        self.state = SequenceState.start(model, memory=memory)
        ids = work.ids[work.windows * model.config.beacon_window :]
        ratios = iter([window.ratio for window in windows[work.windows :]])
        self.to_read: list[Window] = model.cut(self.state.cursor, ids, ratios, tail="close")
        self.next: list[Window] = []
        self.read = 0

    @property
    def finished(self) -> bool:
        return self.read == len(self.to_read)

    def take(self, state: SequenceState) -> None:
        self.state = state
        self.read += len(self.next)
        self.next = []

    def result(self, sink_slots: int) -> CompressedDocument:
        return CompressedDocument(MemoryKV.of(self.state.memory[sink_slots:]), self.tokens, self.windows)
