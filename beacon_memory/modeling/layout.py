"""The layout of one forward pass: its rows, windows, slots and positions. Integers only, no model.

A pass reads pieces of one or more *sequences*. All keys and values in it are entries of one *pool*:

    [ past entries, sequence by sequence: memory slots, then rows of the unfinished window | raw rows | beacon rows ]

The model computes the rows; past entries come with their K/V from earlier passes. Each entry has an *order* within its
window: 2 i for raw token i, and 2 i + 1 for the beacon after raw token i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from beacon_memory.config import BeaconConfig
from beacon_memory.errors import ConfigError, InputError

__all__ = [
    "BeaconLayout",
    "Cursor",
    "Piece",
    "Tail",
    "Window",
    "WindowRows",
    "cut_windows",
    "document_slots",
    "slots_of",
]

Tail = Literal["open", "close", "raw"]
Salience = Callable[[Sequence[int]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a sequence has been read, in integers; its K/V are kept elsewhere.

    memory:       how many memory slots it has so far: sink and beacons of finished windows, at positions 0, 1, 2, ...
    sink_pending: how many sink slots the first window will still add when it is finished.
    ids:          raw token ids of the unfinished window.
    orders:       orders of the rows of the unfinished window whose K/V are kept, ascending.
    ratio:        raw tokens per beacon in the unfinished window.
    """

    memory: int = 0
    sink_pending: int = 0
    ids: tuple[int, ...] = ()
    orders: tuple[int, ...] = ()
    ratio: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """One window of a sequence, or the next part of a window that was begun in an earlier pass.

    memory:   how many memory slots it sees.
    sink:     how many of its first tokens become sink slots when it is finished.
    ids:      raw token ids of the whole window, those of earlier passes included.
    cached:   orders of its rows that were read in an earlier pass.
    first:    index within the window of the first raw token that this pass reads; it reads all from there on.
    anchors:  for each new beacon, the index within the window of the raw token that it follows.
    ratio:    raw tokens per beacon; with 0, the K/V of all raw tokens are kept when the window is finished.
    finished: whether the window ends with this pass, so that only its beacons are kept.
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
        """Return a window of raw tokens that follow `memory` slots: a prompt, or one of several parallel branches."""
        return cls(memory=memory, sink=0, ids=tuple(ids), cached=(), first=0, anchors=(), ratio=0, finished=False)

    @property
    def new_ids(self) -> tuple[int, ...]:
        """Return the token ids that this pass reads."""
        return self.ids[self.first :]

    @property
    def orders(self) -> tuple[int, ...]:
        """Return the orders of all its entries: cached ones, new raw rows, new beacon rows."""
        raw = range(2 * self.first, 2 * len(self.ids), 2)
        return (*self.cached, *raw, *(2 * anchor + 1 for anchor in self.anchors))

    @property
    def kept(self) -> list[int]:
        """Return the indices into `orders` of the entries that become memory slots at the end, in slot order."""
        orders = self.orders
        by_order = sorted(range(len(orders)), key=orders.__getitem__)
        sink = [i for i in by_order if orders[i] % 2 == 0][: self.sink]
        survivors = [i for i in by_order if orders[i] % 2 == (1 if self.ratio else 0)]
        return sink + survivors


def slots_of(tokens: int, ratio: int) -> int:
    """Return how many memory slots a finished window of `tokens` raw tokens gives, the sink not counted."""
    return -(-tokens // ratio) if ratio else tokens


def document_slots(tokens: int, ratio: int, window: int) -> int:
    """Return how many memory slots a document of so many tokens takes in windows, all at one ratio."""
    full, rest = divmod(tokens, window)
    return full * slots_of(window, ratio) + slots_of(rest, ratio)


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

    The first window continues the unfinished window of `cursor`, if there is one. Each window that begins takes the
    next of `ratios`. `tail` decides about the last window:

    * `open`: more text may follow, so only complete units get a beacon;
    * `close`: the text ends, so an incomplete last unit gets a beacon too, and the window is finished;
    * `raw`: it gets no beacons, as in training.
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
    """Return the cursor of a sequence after `window` was read."""
    if window.finished:
        return Cursor(memory=cursor.memory + len(window.kept))
    return replace(cursor, ids=window.ids, orders=tuple(sorted(window.orders)), ratio=window.ratio)


def _anchors(
    ids: Sequence[int], ratio: int, beacons: int, finished: bool, placement: str, salience: Salience | None
) -> tuple[int, ...]:
    """Return the indices of the raw tokens that the next beacons follow; the window has `beacons` beacons already."""
    if placement == "salient-words" and salience is not None:
        return _most_informative(ids, slots_of(len(ids), ratio), salience) if finished else ()
    ends = list(range((beacons + 1) * ratio, len(ids) + 1, ratio))
    if finished and (ends[-1] if ends else beacons * ratio) < len(ids):
        ends.append(len(ids))  # the last, incomplete unit
    if placement == "end" or salience is None or not ends:
        return tuple(end - 1 for end in ends)
    scores = salience(ids)
    starts = [beacons * ratio, *ends[:-1]]
    # of equally informative tokens the last one, because it has seen more of the text
    return tuple(max(range(start, end), key=lambda i: (scores[i], i)) for start, end in zip(starts, ends, strict=True))


def _most_informative(ids: Sequence[int], count: int, salience: Salience) -> tuple[int, ...]:
    """Return the indices of a window's most informative tokens; of equally informative ones, the last are taken."""
    scores = salience(ids)
    return tuple(sorted(sorted(range(len(ids)), key=lambda i: (scores[i], i))[-count:]))


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one sequence that a pass reads: its next windows, and the cursor before them.

    If several windows are unfinished, they are parallel branches: each sees the memory and itself, but no other branch.

    behind: numbers of earlier pieces of the same pass that this one follows: it sees their memories, in this order,
            before its own, and `cursor.memory` counts their slots too. So one pass can compress several documents, and
            read a question that follows all of them.
    """

    cursor: Cursor
    windows: Sequence[Window]
    behind: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class WindowRows:
    """The rows and the pool entries of one window in a pass.

    sequence: number of its sequence in the pass.
    memory:   how many of the sequence's memory slots it sees.
    queries:  numbers of its rows among the rows of the pass.
    own:      numbers of its entries in the pool: cached ones, raw rows, beacon rows.
    cached:   how many of `own` are cached, so that own[cached:] belong to the queries.
    """

    sequence: int
    memory: int
    queries: list[int]
    own: list[int]
    cached: int


@dataclass(frozen=True, slots=True)
class BeaconLayout:
    """One pass over windows of many sequences.

    past:       number of past entries in the pool: memory slots and cached rows of all sequences.
    raw_ids:    token id of each raw row.
    anchor_ids: for each beacon row, the id of the token that it follows.
    positions:  position of each pool entry when it is used inside its own window; 0 for memory slots, whose position
                is their slot number.
    orders:     order of each pool entry within its own window.
    memories:   for each sequence, the pool entries of its memory slots: first those of the pieces that it follows, then
                its past ones, then those that this pass adds.
    unfinished: for each sequence, the pool entries of its unfinished window, which have to be kept, in ascending order.
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
        """Return how many rows the model computes."""
        return len(self.raw_ids) + len(self.anchor_ids)

    @classmethod
    def build(cls, pieces: Sequence[Piece], config: BeaconConfig) -> BeaconLayout:
        """Lay out the windows of all pieces in one pass. Raises InputError if there is no window."""
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
    """Return how many memory slots each piece has of its own from earlier passes. Raises InputError for bad pieces."""
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
    """Return the index of each entry within its window. Its position is this index, counted from the memory on."""
    if config.beacon_attn == "hidden":
        return [order // 2 for order in orders]
    ranks = {order: rank for rank, order in enumerate(sorted(orders))}
    return [ranks[order] for order in orders]
