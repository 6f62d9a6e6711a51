"""`beacon`: the K/V of trained beacons stand for a window (Activation Beacon, arXiv 2401.03462)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

import torch

from beacon_memory.compression.sequence import SequenceState, advance
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.modeling.layout import Window, slots_of

from .method import Plan, Reader

__all__ = ["Beacon"]

Key = TypeVar("Key")


class Beacon:
    """Read many windows, of one document or several, in one pass of at most `rows_per_pass` rows."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.model = reader.model

    @property
    def parameters(self) -> Mapping[str, str | int]:
        """None: the fingerprint of the model says it all."""
        return {}

    @property
    def any_length(self) -> bool:
        """No: a window sees the beacons of all windows before it."""
        return False

    def span(self, tokens: int, ratio: int) -> int:
        """Return the positions that a window takes: a beacon's slot is its position."""
        return slots_of(tokens, ratio)

    def compress(
        self, documents: Iterable[tuple[Key, Plan]], progress: Callable[[int], None]
    ) -> Iterator[tuple[Key, Sequence[MemoryKV]]]:
        """Yield the memories of windows, pass by pass; a document of which all was read before takes no pass."""
        current: list[_Reading[Key]] = []  # documents with windows in the next pass, or unfinished
        rows = 0
        for key, plan in documents:
            reading = _Reading(key, plan, self.reader)
            current.append(reading)
            for window in reading.to_read:
                size = len(window.new_ids) + len(window.anchors)
                if rows and rows + size > self.reader.rows_per_pass:
                    yield from self._run(current, progress)
                    rows = 0
                reading.next.append(window)
                rows += size
            if not rows:  # all of it was read before, and no other document waits
                yield current.pop().key, []
        if current:
            yield from self._run(current, progress)

    def _run(
        self, current: list[_Reading[Key]], progress: Callable[[int], None]
    ) -> Iterator[tuple[Key, Sequence[MemoryKV]]]:
        """Read the collected windows in one pass, and yield their memories; drops the documents that are finished."""
        reading = [one for one in current if one.next]
        with torch.inference_mode():
            states, _ = advance(self.model, [(one.state, one.next) for one in reading])
        tokens = 0
        memories = []
        for one, state in zip(reading, states, strict=True):
            tokens += sum(len(window.new_ids) for window in one.next)
            memories.append((one.key, one.take(state)))
        progress(tokens)
        memories += [(one.key, []) for one in current if one.finished and one not in reading]
        current[:] = [one for one in current if not one.finished]
        yield from memories


class _Reading(Generic[Key]):
    """One document on its way through the passes, behind a memory of its windows that were read before."""

    def __init__(self, key: Key, plan: Plan, reader: Reader) -> None:
        self.key = key
        model = reader.model
        before = [part.to(model.device, model.dtype).stack() for part in plan.parts]
        self.state = SequenceState.start(model, memory=BeaconKV.concat([reader.sink, *before]))
        ids = plan.ids[len(before) * model.config.beacon_window :]
        ratios = iter([window.ratio for window in plan.unread])
        self.to_read: list[Window] = model.cut(self.state.cursor, ids, ratios, tail="close")
        self.next: list[Window] = []
        self.read = 0

    @property
    def finished(self) -> bool:
        return self.read == len(self.to_read)

    def take(self, state: SequenceState) -> list[MemoryKV]:
        """Take the state after a pass; returns the memory of each window that it read."""
        ends = accumulate((len(window.kept) for window in self.next), initial=self.state.memory.slots)
        self.state = state
        self.read += len(self.next)
        self.next = []
        return [MemoryKV.of(state.memory[start:stop]) for start, stop in pairwise(ends)]
