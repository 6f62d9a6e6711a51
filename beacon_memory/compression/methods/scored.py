"""Methods that keep the K/V of chosen tokens: a score for each entry decides, and the rest is done here.

Each window is read behind the memory of those before it. All heads of all layers compete for one budget of slots: some
heads look every word up, most need next to nothing of a text, and a budget of the same size for each would starve the
former. A method that wants each head to keep equally many gives ranks within the head as scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from beacon_memory.compression.selection import best, prefix_of
from beacon_memory.errors import ConfigError
from beacon_memory.kv.levels import levels_of
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.kv.prefix import Prefix
from beacon_memory.modeling.attention import Watch
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, slots_of
from beacon_memory.modeling.model import BeaconModel

from .method import Plan, Reader

__all__ = ["ReadWindow", "ScoredMethod"]

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, eq=False)
class ReadWindow:
    """A window that the model has read.

    model:  the model.
    prefix: the memory in front of the window, the sink first.
    ids:    token ids of the window.
    kv:     K/V that are chosen among, [layers, kv_heads, slots, head_dim], keys before RoPE: those of all its tokens,
            unless the method says otherwise (`candidates`).
    watch:  what the method's `watch` gave for this window, after it has heard the attention of the pass.
    """

    model: BeaconModel
    prefix: Prefix
    ids: Sequence[int]
    kv: BeaconKV
    watch: Watch | None


class ScoredMethod(ABC):
    """A method that gives each entry of a window a score; those with the highest scores are kept."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.model = reader.model

    @abstractmethod
    def scores(self, windows: Sequence[ReadWindow]) -> Sequence[Tensor]:
        """Return for each of some windows a number for each entry of its K/V, [layers, kv_heads, slots].

        The higher, the sooner it is kept. The windows are of different documents, and were read in one pass.
        """

    @property
    def parameters(self) -> Mapping[str, str | int]:
        """Settings that change the scores, by name."""
        return {}

    @property
    def any_length(self) -> bool:
        """Yes: a window sees a bounded part of the memory before it."""
        return True

    def watch(self, tokens: int) -> Watch | None:  # noqa: ARG002  # for those that watch
        """Return what shall hear the attention of the pass over a window of so many tokens, or None."""
        return None

    def require_hidden(self, what: str) -> None:
        """Raise ConfigError for a model whose raw tokens see the beacons of their window; what: that cannot be then."""
        if self.model.config.beacon_attn != "hidden":
            raise ConfigError(f"{what} needs beacon_attn='hidden': with 'full-coverage' raw tokens see the beacons")

    def beacon_ratio(self, ratio: int) -> int:  # noqa: ARG002  # for those that have beacons
        """Return the ratio of the beacons that stand behind the chosen tokens; 0 for none."""
        return 0

    def candidates(self, raw: BeaconKV, beacons: BeaconKV) -> tuple[BeaconKV, BeaconKV]:
        """Return the K/V of a window that are chosen among, and those that stand behind them in any case.

        raw, beacons: those of its tokens and of its beacons.
        """
        return raw, beacons

    def span(self, tokens: int, ratio: int) -> int:
        """Return the positions that a window takes: those of its tokens, and of the beacons behind them."""
        beacon_ratio = self.beacon_ratio(ratio)
        return tokens + (slots_of(tokens, beacon_ratio) if beacon_ratio else 0)

    def compress(
        self, documents: Iterable[tuple[Key, Plan]], progress: Callable[[int], None]
    ) -> Iterator[tuple[Key, Sequence[MemoryKV]]]:
        """Yield the memories of windows, pass by pass; the next windows of several documents are read in one.

        A document keeps its place in the passes until those before it are finished, so that what waits is bounded too.
        """
        current: list[_Reading[Key]] = []
        for key, plan in documents:
            reading = _Reading(key, plan, self)
            while current and sum(one.rows for one in current) + reading.rows > self.reader.rows_per_pass:
                yield from self._read_next(current, progress)
            current.append(reading)
            if reading.finished:  # all of it was read before
                yield key, []
            _drop_finished(current)
            while current and sum(one.rows for one in current) >= self.reader.rows_per_pass:  # the pass is full
                yield from self._read_next(current, progress)
        while current:
            yield from self._read_next(current, progress)

    def _read_next(
        self, current: list[_Reading[Key]], progress: Callable[[int], None]
    ) -> Iterator[tuple[Key, Sequence[MemoryKV]]]:
        """Read the next window of each document, and yield its memory."""
        reading = [one for one in current if not one.finished]
        with torch.inference_mode():
            windows = [one.next for one in reading]
            memories = self.read_windows(windows)
        for one, memory in zip(reading, memories, strict=True):
            one.take(memory)
        _drop_finished(current)
        progress(sum(len(ids) for _, ids, _ in windows))
        yield from ((one.key, [memory]) for one, memory in zip(reading, memories, strict=True))

    def read_windows(self, windows: Sequence[tuple[Prefix, Sequence[int], int]]) -> list[MemoryKV]:
        """Read windows in one pass, each behind a memory; returns their own.

        windows: for each the prefix, its token ids, and the ratio: it leaves tokens / ratio slots, the mean over heads.
                 Ratio 0 keeps every token, and nothing is scored.
        """
        pieces = [
            Piece(Cursor(), self.model.cut(Cursor(), ids, iter([self.beacon_ratio(ratio)]), tail="close"))
            for _, ids, ratio in windows
        ]
        watches = [self.watch(len(ids)) for _, ids, _ in windows]
        layout = BeaconLayout.build(pieces, self.model.config)
        own = [entry for window in layout.windows for entry in window.own]
        prefixes = [prefix for prefix, _, _ in windows]
        kept = self.model.read(layout, self.model.empty_kv(), own, prefixes=prefixes, watch=_each(watches))
        read, behind, at = [], [], 0
        for (prefix, ids, ratio), window, watch in zip(windows, layout.windows, watches, strict=True):
            raw, beacons = kept[at : at + len(ids)], kept[at + len(ids) : at + len(window.own)]
            among, fixed = self.candidates(raw, beacons) if ratio else (raw, beacons)
            read.append(ReadWindow(self.model, prefix, ids, among, watch))
            behind.append(fixed)
            at += len(window.own)
        ratios = [ratio for _, _, ratio in windows]
        scores = iter(self._scores([one for one, ratio in zip(read, ratios, strict=True) if ratio]))
        return [
            _chosen(one, next(scores), fixed, ratio) if ratio else MemoryKV.of(one.kv)
            for one, fixed, ratio in zip(read, behind, ratios, strict=True)
        ]

    def _scores(self, windows: Sequence[ReadWindow]) -> Sequence[Tensor]:
        """Return the scores of windows, if any; raises ConfigError unless they are of the shape that they must have."""
        scores = self.scores(windows) if windows else []
        for window, its_scores in zip(windows, scores, strict=True):
            if its_scores.shape != window.kv.keys.shape[:-1]:
                raise ConfigError(
                    f"{type(self).__name__}.scores gave scores of shape {list(its_scores.shape)}; a window of "
                    f"{len(window.ids)} tokens needs one for each entry, {list(window.kv.keys.shape[:-1])}: layers, "
                    "kv_heads, slots"
                )
        return scores


class _Reading(Generic[Key]):
    """One document on its way through the passes.

    read: how many of its windows were read, `before` of them earlier.
    seen: the memory that its next window may see: the sink, then of the last windows, as many as the model has
          positions for.
    """

    def __init__(self, key: Key, plan: Plan, method: ScoredMethod) -> None:
        self.key = key
        self.plan = plan
        self.method = method
        self.read = self.before = len(plan.parts)
        self.seen = [MemoryKV.of(method.reader.sink)]
        model, spans = method.model, accumulate(window.span for window in reversed(plan.windows[: self.read]))
        last = 1 + sum(span <= model.max_positions for span in spans)
        for number in range(max(0, self.read - last), self.read if plan.unread else 0):
            self.seen.append(plan.parts[number].to(model.device, model.dtype))

    @property
    def finished(self) -> bool:
        return self.read == len(self.plan.windows)

    def take(self, memory: MemoryKV) -> None:
        """Take the memory of the window that was read, and leave those that no other will see."""
        self.read += 1
        self.seen.append(memory)
        while sum(one.span for one in self.seen[2:]) > self.method.model.max_positions:
            del self.seen[1]

    @property
    def rows(self) -> int:
        """How many rows its next window takes in a pass; once all are read, as many as its last one, until dropped."""
        if self.before == len(self.plan.windows):
            return 0
        window = self.plan.windows[min(self.read, len(self.plan.windows) - 1)]
        return self.method.span(window.tokens, window.ratio)

    @property
    def next(self) -> tuple[Prefix, Sequence[int], int]:
        """The prefix, the token ids and the ratio of its next window."""
        model, window = self.method.model, self.plan.windows[self.read]
        prefix = prefix_of(model, self.seen, window.tokens)
        return prefix, self.plan.ids[window.first : window.first + window.tokens], window.ratio


def _drop_finished(current: list[_Reading[Key]]) -> None:
    """Drop the first documents that are finished."""
    while current and current[0].finished:
        del current[0]


def _chosen(window: ReadWindow, scores: Tensor, behind: BeaconKV, ratio: int) -> MemoryKV:
    """Return the entries of a window with the highest scores, and what stands behind them."""
    kept = best(scores, slots_of(len(window.ids), ratio) - behind.slots)
    return MemoryKV.concat([MemoryKV.chosen(window.kv, kept, levels_of(scores, len(window.ids))), MemoryKV.of(behind)])


def _each(watches: Sequence[Watch | None]) -> Watch | None:
    """Return what lets the watch of each sequence hear the attention of that sequence."""

    def watch(layer: int, sequence: int, *heard: Any) -> None:
        its_watch = watches[sequence]
        if its_watch is not None:
            its_watch(layer, sequence, *heard)

    return None if all(one is None for one in watches) else watch
