"""Reading token sequences piece by piece into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from beacon_memory.kv.memory_kv import BeaconKV
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window, after
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.ratio_mix import mixed_ratios

__all__ = ["BeaconSequence", "SequenceState", "advance"]


@dataclass(frozen=True, slots=True, eq=False)
class SequenceState:
    """A sequence after some windows: where it stands, and its K/V.

    memory: sink and beacons of finished windows, slot j at position j.
    open:   rows of the unfinished window, raw tokens and beacons in the order in which they stand.
    """

    cursor: Cursor
    memory: BeaconKV
    open: BeaconKV

    @classmethod
    def start(cls, model: BeaconModel, memory: BeaconKV | None = None, sink_pending: int = 0) -> SequenceState:
        """Return the state before anything is read.

        memory: a shared sink to stand behind; else `sink_pending` of the first tokens become the sink.
        """
        memory = model.empty_kv() if memory is None else memory
        return cls(Cursor(memory=memory.slots, sink_pending=sink_pending), memory, model.empty_kv())


def advance(
    model: BeaconModel, reads: Sequence[tuple[SequenceState, Sequence[Window]]]
) -> tuple[list[SequenceState], Tensor]:
    """Read the next windows of several sequences in one pass.

    Returns the new states, and the last hidden states of all raw tokens read [tokens, hidden_size].
    """
    layout = BeaconLayout.build([Piece(state.cursor, windows) for state, windows in reads], model.config)
    past = BeaconKV.concat([part for state, _ in reads for part in (state.memory, state.open)])
    new_slots = [memory[state.cursor.memory :] for memory, (state, _) in zip(layout.memories, reads, strict=True)]
    keep = [entry for slots, rows in zip(new_slots, layout.unfinished, strict=True) for entry in (*slots, *rows)]
    output = model.run(layout, past, keep)
    states, at = [], 0
    for (state, windows), slots, rows in zip(reads, new_slots, layout.unfinished, strict=True):
        cursor = state.cursor
        for window in windows:
            cursor = after(cursor, window)
        memory = BeaconKV.concat([state.memory, output.kept[at : at + len(slots)]])
        at += len(slots)
        states.append(SequenceState(cursor, memory, output.kept[at : at + len(rows)]))
        at += len(rows)
    return states, output.hidden


class BeaconSequence:
    """One growing sequence, read as in the paper: finished windows survive as beacons, the last one stays open.

    The sink, if any, is the sequence's own first tokens. How the input is cut into calls changes nothing.
    """

    def __init__(self, model: BeaconModel) -> None:
        self.model = model
        self.state = SequenceState.start(model, sink_pending=model.config.beacon_sink_size)
        self._ratios: Iterator[int] | None = None

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Read the next token ids; returns the logits at each of them [tokens, vocab]."""
        if self._ratios is None:
            self._ratios = mixed_ratios(self.model.config, len(ids), self.model.max_positions)
        windows = self.model.cut(self.state.cursor, ids, self._ratios)
        (self.state,), hidden = advance(self.model, [(self.state, windows)])
        return self.model.head(hidden)

    @property
    def sink(self) -> BeaconKV:
        """K/V of the first tokens; while the first window is unfinished they stand in it too."""
        cursor = self.state.cursor
        if not cursor.sink_pending:
            return self.state.memory[: self._sink_slots]
        raw = [entry for entry, order in enumerate(cursor.orders) if order % 2 == 0]
        return self.state.open[torch.tensor(raw[: cursor.sink_pending], dtype=torch.long)]

    @property
    def beacons(self) -> BeaconKV:
        """K/V of the beacons of all finished windows."""
        return self.state.memory[self._sink_slots :]

    @property
    def unfinished(self) -> BeaconKV:
        """K/V of the unfinished window: raw tokens, and the beacons among them."""
        return self.state.open

    @property
    def _sink_slots(self) -> int:
        return self.model.config.beacon_sink_size - self.state.cursor.sink_pending
