"""Reading all tokens of a window, and choosing among them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from beacon_memory.kv.levels import LEVELS
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.kv.prefix import Prefix
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.repetition import PIECE

__all__ = ["best", "prefix_of", "read_raw", "read_sink"]

_VIEW = 2048  # slots of earlier windows that a window is read behind


def prefix_of(model: BeaconModel, parts: Sequence[MemoryKV], tokens: int) -> Prefix:
    """Return memories, the sink first, as the prefix of a window of so many tokens, interpolated if they must be.

    There is room for the window and a piece of its repetition: for all scores, so that they see the same prefix.
    """
    room = max(1, model.max_positions - tokens - min(PIECE, tokens))
    return model.prefix(MemoryKV.concat(_view(parts, room), room).interpolated(room))


def _view(parts: Sequence[MemoryKV], room: int) -> list[MemoryKV]:
    """Return what a window is read behind: the sink, and of the windows before it the last ones as far as they fit.

    They are seen at the lowest level that leaves `_VIEW` slots at most; if none does, as where beacons are never left
    out, the first ones are not seen. So however long a document is, reading a window takes no longer.
    """
    sink, *windows = parts
    spans = accumulate((one.span for one in reversed(windows)), initial=sink.span)
    seen = windows[len(windows) - max(1, sum(span <= room for span in spans) - 1) :]
    view = seen
    for level in range(LEVELS):
        view = [one.from_level(level) for one in seen]
        if sum(one.slots for one in view) <= _VIEW:
            break
    while len(view) > 1 and sum(one.slots for one in view) > _VIEW:
        view = view[1:]
    return [sink, *view]


def read_raw(model: BeaconModel, prefix: Prefix | None, ids: Sequence[int]) -> BeaconKV:
    """Return the K/V of all tokens of a window, read behind a memory or behind nothing."""
    layout = BeaconLayout.build([Piece(Cursor(), [Window.behind(0, ids)])], model.config)
    return model.read(layout, model.empty_kv(), layout.windows[0].own, prefixes=[prefix])


def read_sink(model: BeaconModel) -> BeaconKV:
    """Return the K/V of the sink, the same for every document of a model; of no slots where the model has none."""
    return read_raw(model, None, model.sink_ids) if model.sink_ids else model.empty_kv()


def best(scores: Tensor, budget: int) -> Tensor:
    """Return which entries have the highest scores, `budget` for each head in the mean; of equal ones the first.

    scores: [layers, kv_heads, tokens], as is the result, of bool.
    """
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().argsort(descending=True, stable=True)[: budget * scores[..., 0].numel()]] = True
    return kept.view(scores.shape)
