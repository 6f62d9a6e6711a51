"""`beacon`: the K/V of trained beacons stand for a window (Activation Beacon, arXiv 2401.03462)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
    ) -> Iterator[tuple[Key, MemoryKV]]:
        """Yield the memory of each document; one of which all was read before takes no pass."""
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
                yield current.pop().result
        if current:
            yield from self._run(current, progress)

    def _run(self, current: list[_Reading[Key]], progress: Callable[[int], None]) -> Iterator[tuple[Key, MemoryKV]]:
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
            yield current.pop(0).result


class _Reading(Generic[Key]):
    """One document on its way through the passes, behind a memory of its windows that were read before."""

    def __init__(self, key: Key, plan: Plan, reader: Reader) -> None:
        self.key = key
        self.sink_slots = reader.sink.slots
        memory = BeaconKV.concat([reader.sink, *(part.stack() for part in plan.before)])
        self.state = SequenceState.start(reader.model, memory=memory)
        ids = plan.ids[len(plan.before) * reader.model.config.beacon_window :]
        ratios = iter([window.ratio for window in plan.unread])
        self.to_read: list[Window] = reader.model.cut(self.state.cursor, ids, ratios, tail="close")
        self.next: list[Window] = []
        self.read = 0

    @property
    def finished(self) -> bool:
        return self.read == len(self.to_read)

    def take(self, state: SequenceState) -> None:
        self.state = state
        self.read += len(self.next)
        self.next = []

    @property
    def result(self) -> tuple[Key, MemoryKV]:
        return self.key, MemoryKV.of(self.state.memory[self.sink_slots :])
