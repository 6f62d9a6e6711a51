"""Which rows, windows, slots and positions one forward pass has: integers only, no model.

A pass reads pieces of one or more *sequences*. Everything in it is an entry of one *pool*:

    [ past entries, sequence by sequence: memory slots, then rows of the unfinished window | raw rows | beacon rows ]

The rows are what the model computes; past entries come with K/V from earlier passes. Within its window an entry has an
*order*: 2 i for raw token i, 2 i + 1 for the beacon that stands after raw token i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from beacon_memory.config import BeaconConfig
from beacon_memory.errors import ConfigError, InputError

__all__ = ["BeaconLayout", "Cursor", "Piece", "Tail", "Window", "WindowRows", "cut_windows", "slots_of"]

Tail = Literal["open", "close", "raw"]
Salience = Callable[[Sequence[int]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a sequence stands: the integers behind its K/V.

    memory:       slots at positions 0, 1, 2, ...: sink and beacons of finished windows.
    sink_pending: sink slots that the first window still has to leave behind when it is finished.
    ids:          raw token ids of the unfinished window.
    orders:       orders of the rows kept of the unfinished window, ascending.
    ratio:        raw tokens per beacon in the unfinished window.
    """

    memory: int = 0
    sink_pending: int = 0
    ids: tuple[int, ...] = ()
    orders: tuple[int, ...] = ()
    ratio: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """One window of a sequence, or the new part of one.

    memory:   slots in front of it.
    sink:     of its first tokens, how many become sink slots when it is finished.
    ids:      raw token ids of the whole window, earlier part included.
    cached:   orders of its rows that were read in an earlier pass.
    first:    index within the window of its first new raw token; the new ones reach to its end.
    anchors:  for each new beacon the index within the window of the raw token that it stands after.
    ratio:    raw tokens per beacon; 0 keeps the K/V of all raw tokens when the window is finished.
    finished: only its beacons survive the pass.
    """

    memory: int
    sink: int
    ids: tuple[int, ...]
    cached: tuple[int, ...]
    first: int
    anchors: tuple[int, ...]
    ratio: int
    finished: bool

    @classmethod
    def behind(cls, memory: int, ids: Sequence[int]) -> Window:
        """Tokens that are read raw behind so many memory slots: a prompt, or a branch beside others."""
        return cls(memory=memory, sink=0, ids=tuple(ids), cached=(), first=0, anchors=(), ratio=0, finished=False)

    @property
    def new_ids(self) -> tuple[int, ...]:
        """Token ids that this pass reads."""
        return self.ids[self.first :]

    @property
    def orders(self) -> tuple[int, ...]:
        """Orders of all its entries: cached ones, new raw rows, new beacon rows."""
        raw = range(2 * self.first, 2 * len(self.ids), 2)
        return (*self.cached, *raw, *(2 * anchor + 1 for anchor in self.anchors))

    @property
    def kept(self) -> list[int]:
        """Indices into `orders` of the entries that become memory slots when it is finished, in slot order."""
        by_order = sorted(range(len(self.orders)), key=self.orders.__getitem__)
        sink = [i for i in by_order if self.orders[i] % 2 == 0][: self.sink]
        survivors = [i for i in by_order if self.orders[i] % 2 == (1 if self.ratio else 0)]
        return sink + survivors


def slots_of(tokens: int, ratio: int) -> int:
    """Memory slots that a finished window of `tokens` raw tokens leaves, the sink not counted."""
    return -(-tokens // ratio) if ratio else tokens


def cut_windows(
    cursor: Cursor,
    ids: Sequence[int],
    config: BeaconConfig,
    ratios: Iterator[int],
    *,
    tail: Tail = "open",
    salience: Salience | None = None,
) -> list[Window]:
    """Cut the next `ids` of a sequence into windows of `config.beacon_window` raw tokens, with beacons interleaved.

    The first window goes on where `cursor` stands. `ratios` is asked once for each window that begins. `tail` says what
    becomes of the last window: `open` (more text may follow: its complete units have beacons), `close` (the text ends:
    the last, incomplete unit has a beacon too, the window is finished) or `raw` (training: no beacons in it).
    """
    windows: list[Window] = []
    at = 0
    while at < len(ids):
        room = config.beacon_window - len(cursor.ids)
        new = tuple(ids[at : at + room])
        at += len(new)
        last = at == len(ids)
        without_beacons = last and tail == "raw"
        ratio = cursor.ratio if cursor.ids else 0 if without_beacons else next(ratios)
        window_ids = cursor.ids + new
        finished = not without_beacons and (len(new) == room or (last and tail == "close"))
        anchors: tuple[int, ...] = ()
        if ratio and not without_beacons:
            beacons = sum(order % 2 for order in cursor.orders)
            anchors = _anchors(window_ids, ratio, beacons, finished, config.beacon_placement, salience)
        if config.beacon_attn == "full-coverage" and anchors and anchors[0] < len(cursor.ids):
            raise ConfigError(
                f"beacon_placement={config.beacon_placement!r} with beacon_attn='full-coverage' cannot read a window "
                "in several pieces: a raw token that was already read would have to see a later beacon"
            )
        window = Window(
            memory=cursor.memory,
            sink=cursor.sink_pending,
            ids=window_ids,
            cached=cursor.orders,
            first=len(cursor.ids),
            anchors=anchors,
            ratio=ratio,
            finished=finished,
        )
        windows.append(window)
        cursor = after(cursor, window)
    return windows


def after(cursor: Cursor, window: Window) -> Cursor:
    """Where a sequence stands once `window` was read."""
    if window.finished:
        return Cursor(memory=cursor.memory + len(window.kept))
    return replace(cursor, ids=window.ids, orders=tuple(sorted(window.orders)), ratio=window.ratio)


def _anchors(
    ids: Sequence[int], ratio: int, beacons: int, finished: bool, placement: str, salience: Salience | None
) -> tuple[int, ...]:
    """The raw tokens after which the beacons of the units from number `beacons` on stand."""
    if placement == "salient-words" and salience is not None:
        return _most_informative(ids, slots_of(len(ids), ratio), salience) if finished else ()
    ends = list(range((beacons + 1) * ratio, len(ids) + 1, ratio))
    if finished and (ends[-1] if ends else beacons * ratio) < len(ids):
        ends.append(len(ids))  # the last, incomplete unit
    if placement == "end" or salience is None or not ends:
        return tuple(end - 1 for end in ends)
    scores = salience(ids)
    starts = [beacons * ratio, *ends[:-1]]
    # of equally informative tokens the last one, which has read more
    return tuple(max(range(start, end), key=lambda i: (scores[i], i)) for start, end in zip(starts, ends, strict=True))


def _most_informative(ids: Sequence[int], count: int, salience: Salience) -> tuple[int, ...]:
    """The places of a window's most informative tokens; of equally informative ones the last."""
    scores = salience(ids)
    return tuple(sorted(sorted(range(len(ids)), key=lambda i: (scores[i], i))[-count:]))


@dataclass(frozen=True, slots=True)
class Piece:
    """What a pass reads of one sequence: where it stands, and the next of its windows.

    Several unfinished windows are parallel branches: each sees the memory and itself, none sees another.

    behind: numbers of earlier pieces of the pass whose memories stand, in this order, in front of this one's own; their
            slots count in `cursor.memory`. So a pass can compose documents that it compresses itself.
    """

    cursor: Cursor
    windows: Sequence[Window]
    behind: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class WindowRows:
    """One window in a pass.

    sequence: number of its sequence in the pass.
    memory:   how many of the sequence's memory slots it sees.
    queries:  its rows among the rows of the pass.
    own:      its entries in the pool: cached ones, raw rows, beacon rows.
    cached:   how many of `own` are cached, so that own[cached:] are the queries.
    """

    sequence: int
    memory: int
    queries: list[int]
    own: list[int]
    cached: int


@dataclass(frozen=True, slots=True)
class BeaconLayout:
    """One pass over windows of many sequences.

    past:       pool entries in front of the rows, sum over sequences of memory slots and cached rows.
    raw_ids:    token id of each raw row.
    anchor_ids: token id before each beacon row.
    positions:  of each pool entry within its own window (0 for a memory slot, whose position is its slot number).
    orders:     of each pool entry within its own window.
    memories:   for each sequence the pool entries of its memory slots: of pieces it stands behind, old ones, new ones.
    unfinished: for each sequence the pool entries to keep of its unfinished window, ascending order.
    windows:    the windows of the pass.
    """

    past: int
    raw_ids: list[int]
    anchor_ids: list[int]
    positions: list[int]
    orders: list[int]
    memories: list[list[int]]
    unfinished: list[list[int]]
    windows: list[WindowRows]

    @property
    def rows(self) -> int:
        """Rows that the model computes."""
        return len(self.raw_ids) + len(self.anchor_ids)

    @classmethod
    def build(cls, pieces: Sequence[Piece], config: BeaconConfig) -> BeaconLayout:
        """Lay the windows of all pieces out in one pass. Raises InputError if there is none."""
        windows = [(number, window) for number, piece in enumerate(pieces) for window in piece.windows]
        if not windows:
            raise InputError("a pass needs at least one window")
        past_slots = _past_slots(pieces)
        past_sizes = [slots + len(piece.cursor.orders) for slots, piece in zip(past_slots, pieces, strict=True)]
        past_starts = [sum(past_sizes[:number]) for number in range(len(pieces))]
        past = sum(past_sizes)
        raw_ids = [token for _, window in windows for token in window.new_ids]
        anchor_ids = [window.ids[anchor] for _, window in windows for anchor in window.anchors]
        positions = [0] * (past + len(raw_ids) + len(anchor_ids))
        orders = positions.copy()
        memories = [list(range(start, start + slots)) for start, slots in zip(past_starts, past_slots, strict=True)]
        unfinished: list[list[int]] = [[] for _ in pieces]
        placed: list[WindowRows] = []
        next_raw, next_beacon = past, past + len(raw_ids)
        for number, window in windows:
            cached_start = past_starts[number] + past_slots[number]
            own = list(range(cached_start, cached_start + len(window.cached)))
            own += range(next_raw, next_raw + len(window.new_ids))
            own += range(next_beacon, next_beacon + len(window.anchors))
            next_raw += len(window.new_ids)
            next_beacon += len(window.anchors)
            window_orders = window.orders
            for entry, order, index in zip(own, window_orders, _indices(window_orders, config), strict=True):
                orders[entry] = order
                positions[entry] = window.memory + index
            placed.append(
                WindowRows(
                    sequence=number,
                    memory=window.memory,
                    queries=[entry - past for entry in own[len(window.cached) :]],
                    own=own,
                    cached=len(window.cached),
                )
            )
            if window.finished:
                memories[number] += [own[i] for i in window.kept]
            else:
                unfinished[number] = sorted(own, key=orders.__getitem__)
        composed = [
            [entry for other in (*piece.behind, number) for entry in memories[other]]
            for number, piece in enumerate(pieces)
        ]
        return cls(past, raw_ids, anchor_ids, positions, orders, composed, unfinished, placed)


def _past_slots(pieces: Sequence[Piece]) -> list[int]:
    """For each piece, the memory slots of its own that earlier passes left it. Raises InputError for a bad `behind`."""
    past: list[int] = []
    own: list[int] = []
    for number, piece in enumerate(pieces):
        if any(other not in range(number) for other in piece.behind):
            raise InputError(
                f"behind={list(piece.behind)!r} must name pieces before this one, which is number {number}"
            )
        past.append(piece.cursor.memory - sum(own[other] for other in piece.behind))
        if past[-1] < 0:
            raise InputError(
                f"piece {number} has {piece.cursor.memory} memory slots, fewer than the pieces that it stands behind"
            )
        own.append(past[-1] + sum(len(window.kept) for window in piece.windows if window.finished))
    return past


def _indices(orders: Sequence[int], config: BeaconConfig) -> list[int]:
    """The index of each entry within its window that its position is counted by."""
    if config.beacon_attn == "hidden":
        return [order // 2 for order in orders]
    ranks = {order: rank for rank, order in enumerate(sorted(orders))}
    return [ranks[order] for order in orders]
