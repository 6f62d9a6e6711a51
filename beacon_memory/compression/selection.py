"""Reading a window into K/V of chosen tokens, each head its own: no training, on any supported model.

All heads of all layers compete for one budget of slots. Some heads look every word up, most need next to nothing of a
text; a budget of the same size for each would starve the former. Which tokens a head needs, `scoring` tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.kv.prefix import Prefix
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window, slots_of
from beacon_memory.modeling.model import BeaconModel

from .scoring import ExpectedAttention, repeated, spread

__all__ = ["best", "read_raw", "read_sink", "read_window", "span_of"]


def read_window(
    model: BeaconModel,
    prefix: Prefix,
    ids: Sequence[int],
    ratio: int,
    *,
    hybrid: bool = False,
    measured: Tensor | None = None,
) -> MemoryKV:
    """The memory of one window behind a memory in front of it: len(ids) / ratio slots, the mean over heads.

    hybrid:   some of the slots hold beacons, at `beacon_hybrid_factor` times the ratio; they stand behind the others.
    measured: scores of another text, `repeated`; with them the window is not repeated but its attention `expected`.

    Without beacons, ratio 0 and 1 keep every token.
    """
    beacon_ratio = ratio * model.config.beacon_hybrid_factor if hybrid else 0
    (window,) = model.cut(Cursor(), ids, iter([beacon_ratio]), tail="close")
    expected = None if measured is None else ExpectedAttention(model.rope, len(ids))
    layout = BeaconLayout.build([Piece(Cursor(), [window])], model.config)
    kept = model.run(layout, model.empty_kv(), layout.windows[0].own, prefixes=[prefix], watch=expected).kept
    raw, beacons = kept[: len(ids)], kept[len(ids) :]
    budget = slots_of(len(ids), ratio) - beacons.slots
    if budget == len(ids):
        return MemoryKV.of(raw)
    if expected is None or measured is None:
        scores = repeated(model, prefix, raw, ids)
    else:
        scores = spread(measured, expected.scores)
    return MemoryKV.concat([MemoryKV.chosen(raw, best(scores, budget)), MemoryKV.of(beacons)])


def span_of(tokens: int, ratio: int, hybrid_factor: int = 0) -> int:
    """Positions that the memory of a window takes: those of its tokens, and of the beacons that stand behind them.

    hybrid_factor: of a `hybrid` memory, `beacon_hybrid_factor`.
    """
    beacon_ratio = ratio * hybrid_factor
    return tokens + (slots_of(tokens, beacon_ratio) if beacon_ratio else 0)


def read_raw(model: BeaconModel, prefix: Prefix | None, ids: Sequence[int]) -> BeaconKV:
    """K/V of all tokens of a window, read behind a memory or behind nothing."""
    layout = BeaconLayout.build([Piece(Cursor(), [Window.behind(0, ids)])], model.config)
    return model.run(layout, model.empty_kv(), layout.windows[0].own, prefixes=[prefix]).kept


def read_sink(model: BeaconModel) -> BeaconKV:
    """K/V of the sink, the same for every document of a model; of no slots where the model has none."""
    return read_raw(model, None, model.sink_ids) if model.sink_ids else model.empty_kv()


def best(scores: Tensor, budget: int) -> Tensor:
    """The entries with the highest scores [layers, kv_heads, tokens], `budget` for each head in the mean, as bool."""
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().topk(budget * scores[..., 0].numel()).indices] = True
    return kept.view(scores.shape)
