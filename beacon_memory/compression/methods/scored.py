"""Methods that keep the K/V of chosen tokens: a score for each entry decides, and the rest is done here.

Each window is read behind the memory of those before it. All heads of all layers compete for one budget of slots: some
heads look every word up, most need next to nothing of a text, and a budget of the same size for each would starve the
former. A method that wants each head to keep equally many gives ranks within the head as scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

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
    kv:     K/V of all its tokens, [layers, kv_heads, tokens, head_dim], keys before RoPE.
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
    def score(self, window: ReadWindow) -> Tensor:
        """Return a number for each entry, [layers, kv_heads, tokens]: the higher, the sooner it is kept."""

    @property
    def parameters(self) -> Mapping[str, str | int]:
        """Settings that change the scores, by name."""
        return {}

    def watch(self, tokens: int) -> Watch | None:  # noqa: ARG002  # for those that watch
        """Return what shall hear the attention of the pass over a window of so many tokens, or None."""
        return None

    def beacon_ratio(self, ratio: int) -> int:  # noqa: ARG002  # for those that have beacons
        """Return the ratio of the beacons that stand behind the chosen tokens; 0 for none."""
        return 0

    def span(self, tokens: int, ratio: int) -> int:
        """Return the positions that a window takes: those of its tokens, and of the beacons behind them."""
        beacon_ratio = self.beacon_ratio(ratio)
        return tokens + (slots_of(tokens, beacon_ratio) if beacon_ratio else 0)

    def compress(
        self, documents: Iterable[tuple[Key, Plan]], progress: Callable[[int], None]
    ) -> Iterator[tuple[Key, MemoryKV]]:
        """Yield the memory of each document; one window of one document is read at a time."""
        for key, plan in documents:
            yield key, self._read(plan, progress)

    @torch.inference_mode()
    def _read(self, plan: Plan, progress: Callable[[int], None]) -> MemoryKV:
        parts = [MemoryKV.of(self.reader.sink), *plan.before]
        for window in plan.unread:
            ids = plan.ids[window.first : window.first + window.tokens]
            parts.append(self.read_window(prefix_of(self.model, parts, len(ids)), ids, window.ratio))
            progress(len(ids))
        return MemoryKV.concat(parts[1:])

    def read_window(self, prefix: Prefix, ids: Sequence[int], ratio: int) -> MemoryKV:
        """Read one window behind a memory; returns its own: len(ids) / ratio slots, the mean over heads.

        Ratio 0 keeps every token, and nothing is scored.
        """
        (window,) = self.model.cut(Cursor(), ids, iter([self.beacon_ratio(ratio)]), tail="close")
        watch = self.watch(len(ids))
        layout = BeaconLayout.build([Piece(Cursor(), [window])], self.model.config)
        own = layout.windows[0].own
        kept = self.model.run(layout, self.model.empty_kv(), own, prefixes=[prefix], watch=watch).kept
        raw, beacons = kept[: len(ids)], kept[len(ids) :]
        if not ratio:
            return MemoryKV.of(raw)
        scores = self.score(ReadWindow(self.model, prefix, ids, raw, watch))
        if scores.shape != raw.keys.shape[:-1]:
            raise ConfigError(
                f"{type(self).__name__}.score gave scores of shape {list(scores.shape)}; a window of {len(ids)} tokens "
                f"needs one for each entry, {list(raw.keys.shape[:-1])}: layers, kv_heads, tokens"
            )
        budget = slots_of(len(ids), ratio) - beacons.slots
        chosen = MemoryKV.chosen(raw, best(scores, budget), levels_of(scores))
        return MemoryKV.concat([chosen, MemoryKV.of(beacons)])
