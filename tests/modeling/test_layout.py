from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beacon_memory.config import BeaconConfig
from beacon_memory.errors import ConfigError, InputError
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Tail, Window, after, cut_windows, slots_of


def config(
    window: int = 8, *, attn: str = "hidden", placement: str = "end", ratios: tuple[int, ...] = (2, 4), sink: int = 0
) -> BeaconConfig:
    return BeaconConfig(
        beacon_window=window,
        beacon_ratio=ratios,
        beacon_attn=attn,
        beacon_placement=placement,
        beacon_sink_size=sink,
    )


def document_slots(tokens: int, ratios: Sequence[int], settings: BeaconConfig) -> int:
    window = settings.beacon_window
    return sum(slots_of(min(window, tokens - window * i), ratio) for i, ratio in enumerate(ratios))


def cut(
    tokens: int,
    ratio: int = 4,
    *,
    tail: Tail = "close",
    cursor: Cursor | None = None,
    settings: BeaconConfig | None = None,
) -> list[Window]:
    return cut_windows(cursor or Cursor(), range(tokens), settings or config(), repeat(ratio), tail=tail)


def by_value(ids: Sequence[int]) -> list[float]:
    """A salience in which a token's id says how informative it is."""
    return [float(token) for token in ids]


def anchors(windows: Sequence[Window]) -> list[tuple[int, ...]]:
    return [window.anchors for window in windows]


class TestUnits:
    @pytest.mark.parametrize(
        ("tokens", "expected"),
        [
            (1, [(0,)]),
            (3, [(2,)]),
            (4, [(3,)]),
            (5, [(3, 4)]),
            (8, [(3, 7)]),
            (9, [(3, 7), (0,)]),
            (15, [(3, 7), (3, 6)]),
            (16, [(3, 7), (3, 7)]),
        ],
    )
    def test_a_beacon_stands_after_each_unit_and_the_last_incomplete_one(
        self, tokens: int, expected: list[tuple[int, ...]]
    ) -> None:
        windows = cut(tokens)
        assert anchors(windows) == expected
        assert all(window.finished for window in windows)
        assert sum(len(window.kept) for window in windows) == sum(map(len, expected))

    def test_an_open_tail_has_beacons_after_its_complete_units_only(self) -> None:
        assert anchors(cut(14, tail="open")) == [(3, 7), (3,)]
        assert [window.finished for window in cut(14, tail="open")] == [True, False]

    def test_an_open_tail_of_whole_windows_leaves_nothing_open(self) -> None:
        assert [window.finished for window in cut(16, tail="open")] == [True, True]

    @pytest.mark.parametrize("tokens", [3, 8, 9, 16])
    def test_a_raw_tail_has_no_beacons_and_stays_open(self, tokens: int) -> None:
        *before, last = cut(tokens, tail="raw")
        assert (last.anchors, last.finished, last.ratio) == ((), False, 0)
        assert all(window.finished and window.anchors == (3, 7) for window in before)

    def test_a_raw_tail_asks_for_no_ratio(self) -> None:
        assert [window.ratio for window in cut_windows(Cursor(), range(20), config(), iter([2, 4]), tail="raw")] == [
            2,
            4,
            0,
        ]

    def test_a_window_that_goes_on_keeps_the_ratio_it_began_with(self) -> None:
        first, second, third = cut_windows(Cursor(), range(17), config(), iter([2, 4, 8]))
        (went_on,) = cut_windows(after(Cursor(ratio=4), third), range(3), config(), iter([2]))
        assert [first.ratio, second.ratio, third.ratio, went_on.ratio] == [2, 4, 8, 8]

    def test_a_ratio_that_does_not_divide_the_window_ends_with_a_smaller_unit(self) -> None:
        assert anchors(cut(16, ratio=3)) == [(2, 5, 7), (2, 5, 7)]

    def test_a_ratio_above_the_window_leaves_one_beacon_a_window(self) -> None:
        assert anchors(cut(18, ratio=99, tail="open")) == [(7,), (7,), ()]

    def test_ratio_zero_keeps_every_raw_token(self) -> None:
        (window,) = cut(5, ratio=0)
        assert window.anchors == ()
        assert [window.orders[i] for i in window.kept] == [0, 2, 4, 6, 8]

    def test_no_tokens_make_no_window(self) -> None:
        assert cut(0) == []


class TestSalience:
    def salient(self, ids: Sequence[int], ratio: int, *, tail: Tail = "close") -> list[tuple[int, ...]]:
        settings = config(placement="salient")
        return anchors(cut_windows(Cursor(), ids, settings, repeat(ratio), tail=tail, salience=by_value))

    def test_a_beacon_stands_after_the_most_salient_token_of_its_unit(self) -> None:
        assert self.salient([9, 1, 2, 3, 1, 2, 9, 3], 4) == [(0, 6)]

    def test_of_equally_salient_tokens_the_last_one_is_taken(self) -> None:
        assert self.salient([7, 1, 7, 3, 5, 5, 5, 5], 4) == [(2, 7)]

    def test_the_last_incomplete_unit_is_searched_alone(self) -> None:
        assert self.salient([9, 1, 2, 3, 8, 1], 4) == [(0, 4)]
        assert self.salient([9, 1, 2, 3, 8, 1], 4, tail="open") == [(0,)]

    def test_salience_is_ignored_where_beacons_stand_at_the_end(self) -> None:
        assert anchors(cut_windows(Cursor(), [9, 1, 2, 3], config(), repeat(4), salience=by_value)) == [(3,)]

    def test_an_open_tail_shorter_than_a_unit_has_no_beacon_yet(self) -> None:
        assert self.salient([9, 1, 2], 4, tail="open") == [()]

    def test_with_full_coverage_a_beacon_cannot_be_put_before_what_was_read(self) -> None:
        settings = config(attn="full-coverage", placement="salient")
        (window,) = cut_windows(Cursor(), [9, 1], settings, repeat(4), salience=by_value)
        with pytest.raises(ConfigError, match="salient"):
            cut_windows(after(Cursor(), window), [1, 1], settings, repeat(4), salience=by_value)


class TestSalientWords:
    def placed(
        self, ids: Sequence[int], ratio: int, *, tail: Tail = "close", cursor: Cursor | None = None
    ) -> list[tuple[int, ...]]:
        settings = config(placement="salient-words")
        return anchors(cut_windows(cursor or Cursor(), ids, settings, repeat(ratio), tail=tail, salience=by_value))

    def test_as_many_beacons_as_units_stand_after_the_most_informative_tokens_wherever_they_are(self) -> None:
        assert self.placed([1, 2, 3, 1, 8, 9, 1, 7], 4) == [(4, 5)]
        assert self.placed([1, 2, 3, 1, 8, 9, 1, 7], 2) == [(2, 4, 5, 7)]

    def test_of_equally_informative_tokens_the_last_ones_are_taken(self) -> None:
        assert self.placed([5, 5, 5, 5, 5, 5, 5, 5], 4) == [(6, 7)]

    @pytest.mark.parametrize(("tokens", "ratio", "slots"), [(1, 4, 1), (5, 4, 2), (8, 3, 3), (8, 1, 8), (8, 99, 1)])
    def test_an_incomplete_unit_counts_as_one(self, tokens: int, ratio: int, slots: int) -> None:
        ((*placed,),) = self.placed(range(tokens), ratio)
        assert placed == list(range(tokens))[-slots:]

    def test_each_window_is_searched_alone(self) -> None:
        assert self.placed([1, 1, 1, 1, 1, 1, 1, 2, 9, 9, 9, 9], 4) == [(6, 7), (3,)]

    def test_there_is_no_beacon_before_the_window_is_finished(self) -> None:
        assert self.placed([9, 1, 2, 3, 1, 2], 2, tail="open") == [()]
        settings = config(placement="salient-words")
        (begun,) = cut_windows(Cursor(), [9, 1, 2, 3, 1, 2], settings, repeat(4), salience=by_value)
        assert self.placed([1, 8], 4, tail="open", cursor=after(Cursor(), begun)) == [(0, 7)]

    def test_ratio_zero_and_a_raw_tail_have_none(self) -> None:
        assert self.placed([9, 1, 2], 0) == [()]
        assert self.placed([9, 1, 2], 2, tail="raw") == [()]


def branch(length: int, memory: int) -> Window:
    ids = tuple(range(length))
    return Window(memory=memory, sink=0, ids=ids, cached=(), first=0, anchors=(), ratio=0, finished=False)


class TestComposition:
    settings = config()

    def pieces(self) -> list[Piece]:
        """A sink, two documents behind it, and two branches behind all of them."""
        sink = Piece(Cursor(), cut(1, 0))
        documents = [Piece(Cursor(memory=1), cut(n, cursor=Cursor(memory=1)), behind=(0,)) for n in (9, 5)]
        return [sink, *documents, Piece(Cursor(memory=6), [branch(3, 6), branch(4, 6)], behind=(0, 1, 2))]

    def test_memories_of_the_pieces_it_stands_behind_come_first_in_their_order(self) -> None:
        layout = BeaconLayout.build(self.pieces(), self.settings)
        assert layout.past == 0
        assert len(layout.raw_ids) == 1 + 9 + 5 + 7
        first = layout.rows - len(layout.anchor_ids)
        assert layout.memories == [
            [0],
            [0, first, first + 1, first + 2],
            [0, first + 3, first + 4],
            [0, first, first + 1, first + 2, first + 3, first + 4],
        ]

    def test_windows_stand_behind_all_of_that_memory(self) -> None:
        layout = BeaconLayout.build(self.pieces(), self.settings)
        assert [window.memory for window in layout.windows] == [0, 1, 3, 1, 6, 6]
        assert [layout.positions[window.own[0]] for window in layout.windows] == [0, 1, 3, 1, 6, 6]

    def test_branches_share_no_row(self) -> None:
        *_, one, other = BeaconLayout.build(self.pieces(), self.settings).windows
        assert one.sequence == other.sequence == 3
        assert not set(one.own) & set(other.own)

    def test_the_order_may_differ_and_a_piece_may_have_slots_of_its_own(self) -> None:
        *before, _ = self.pieces()
        layout = BeaconLayout.build([*before, Piece(Cursor(memory=8), [branch(1, 8)], behind=(0, 2, 1))], self.settings)
        first = layout.past + len(layout.raw_ids)
        assert layout.past == 2
        assert layout.memories[3] == [2, first + 3, first + 4, first, first + 1, first + 2, 0, 1]

    @pytest.mark.parametrize("behind", [(3,), (0, 4), (-1,)])
    def test_it_can_only_stand_behind_earlier_pieces(self, behind: tuple[int, ...]) -> None:
        *before, _ = self.pieces()
        with pytest.raises(InputError, match=rf"behind=\[.*{behind[-1]}\].*number 3"):
            BeaconLayout.build([*before, Piece(Cursor(memory=6), [branch(3, 6)], behind=behind)], self.settings)

    def test_it_cannot_have_fewer_slots_than_the_pieces_it_stands_behind(self) -> None:
        *before, _ = self.pieces()
        with pytest.raises(InputError, match="piece 3 has 5 memory slots, fewer"):
            BeaconLayout.build([*before, Piece(Cursor(memory=5), [branch(3, 5)], behind=(0, 1, 2))], self.settings)


class TestPasses:
    def build(self, tokens: int, settings: BeaconConfig, *, memory: int = 0, ratio: int = 4) -> BeaconLayout:
        cursor = Cursor(memory=memory, sink_pending=settings.beacon_sink_size)
        return BeaconLayout.build([Piece(cursor, cut(tokens, ratio, cursor=cursor, settings=settings))], settings)

    def test_hidden_positions_count_raw_tokens_behind_the_memory(self) -> None:
        layout = self.build(5, config(), memory=3)
        assert layout.raw_ids == [0, 1, 2, 3, 4]
        assert layout.anchor_ids == [3, 4]
        assert layout.positions == [0, 0, 0, 3, 4, 5, 6, 7, 6, 7]  # memory slots, raw rows, beacon rows

    def test_full_coverage_positions_count_beacons_too(self) -> None:
        layout = self.build(5, config(attn="full-coverage"), memory=3)
        assert layout.positions == [0, 0, 0, 3, 4, 5, 6, 8, 7, 9]

    def test_a_window_sees_the_slots_that_earlier_windows_of_its_document_left(self) -> None:
        layout = self.build(20, config())
        assert [window.memory for window in layout.windows] == [0, 2, 4]
        assert layout.memories == [[20, 21, 22, 23, 24]]  # behind 20 raw rows the beacons
        assert layout.unfinished == [[]]

    def test_the_first_window_leaves_the_sink_before_its_beacons(self) -> None:
        layout = self.build(12, config(sink=2))
        assert [window.memory for window in layout.windows] == [0, 4]
        assert layout.memories == [[0, 1, 12, 13, 14]]

    def test_documents_of_one_pass_share_no_entries(self) -> None:
        settings = config()
        pieces = [Piece(Cursor(memory=2), cut(9)), Piece(Cursor(), cut(3)), Piece(Cursor(memory=1), cut(8))]
        layout = BeaconLayout.build(pieces, settings)
        used = [entry for window in layout.windows for entry in window.own]
        assert layout.past == 3
        assert sorted(used) == list(range(3, 3 + layout.rows))
        assert [window.sequence for window in layout.windows] == [0, 0, 1, 2]
        assert layout.memories[0][:2] == [0, 1]
        assert layout.memories[2][:1] == [2]
        assert sorted(query for window in layout.windows for query in window.queries) == list(range(layout.rows))

    def test_cached_rows_belong_to_the_window_but_ask_nothing(self) -> None:
        settings = config()
        (begun,) = cut(6, tail="open")
        cursor = after(Cursor(), begun)
        layout = BeaconLayout.build([Piece(cursor, cut(2, cursor=cursor, tail="open"))], settings)
        (window,) = layout.windows
        assert (layout.past, window.cached, layout.rows) == (7, 7, 3)
        assert [layout.orders[entry] for entry in window.own] == [0, 2, 4, 6, 7, 8, 10, 12, 14, 15]
        assert window.queries == [0, 1, 2]
        assert layout.memories == [[4, 9]]

    def test_a_pass_of_nothing_is_refused(self) -> None:
        with pytest.raises(InputError, match="at least one window"):
            BeaconLayout.build([Piece(Cursor(), [])], config())


def read_in_pieces(
    ids: Sequence[int], cuts: Sequence[int], settings: BeaconConfig, ratios: Iterator[int], tail: Tail
) -> tuple[Cursor, list[tuple[int, int, bool]]]:
    """Feed `ids` cut at `cuts`; returns where the sequence stands and (token index, order, is beacon) of every row."""
    cursor, rows, window_start = Cursor(sink_pending=settings.beacon_sink_size), [], 0
    bounds = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    for start, stop in pairwise(bounds):
        how: Tail = tail if stop == len(ids) else "open"
        for window in cut_windows(cursor, ids[start:stop], settings, ratios, tail=how, salience=by_value):
            new = window.orders[len(window.cached) :]
            rows += [(window_start + order // 2, order, order % 2 == 1) for order in new]
            cursor = after(cursor, window)
            window_start += len(window.ids) if window.finished else 0
    return cursor, sorted(rows)


documents = st.lists(st.integers(0, 5), min_size=1, max_size=60)
cuts = st.lists(st.integers(0, 100), max_size=6)
windows_and_ratios = st.integers(1, 12).flatmap(
    lambda window: st.tuples(st.just(window), st.lists(st.integers(0, window + 3), min_size=60, max_size=60))
)


@given(
    ids=documents,
    cuts=cuts,
    sizes=windows_and_ratios,
    sink=st.integers(0, 1),
    placement=st.sampled_from(["end", "salient", "salient-words"]),
)
def test_however_the_input_is_cut_the_same_rows_come_out(
    ids: list[int], cuts: list[int], sizes: tuple[int, list[int]], sink: int, placement: str
) -> None:
    settings = config(sizes[0], ratios=(1,), sink=sink, placement=placement)
    for tail in ("open", "close"):
        at_once = read_in_pieces(ids, [], settings, iter(sizes[1]), tail)
        assert read_in_pieces(ids, cuts, settings, iter(sizes[1]), tail) == at_once


@given(ids=documents, cuts=cuts, sizes=windows_and_ratios, placement=st.sampled_from(["end", "salient"]))
def test_every_raw_token_is_covered_by_exactly_one_unit(
    ids: list[int], cuts: list[int], sizes: tuple[int, list[int]], placement: str
) -> None:
    window, ratios = sizes
    settings = config(window, ratios=(1,), placement=placement)
    cursor, rows = read_in_pieces(ids, cuts, settings, iter(ratios), "close")
    assert [token for token, _, beacon in rows if not beacon] == list(range(len(ids)))
    windows = [range(first, min(first + window, len(ids))) for first in range(0, len(ids), window)]
    ratios = ratios[: len(windows)]
    units = [
        span[i : i + ratio]
        for span, ratio in zip(windows, ratios, strict=True)
        if ratio
        for i in range(0, len(span), ratio)
    ]
    beacons = [token for token, _, beacon in rows if beacon]
    assert len(beacons) == len(units)
    assert all(beacon in unit for beacon, unit in zip(beacons, units, strict=True))
    kept_raw = sum(len(span) for span, ratio in zip(windows, ratios, strict=True) if ratio == 0)
    assert sum(map(len, units)) + kept_raw == len(ids)
    assert cursor.memory == document_slots(len(ids), ratios, settings)


@given(tokens=st.integers(1, 200), sizes=windows_and_ratios, memory=st.integers(0, 5), sink=st.integers(0, 1))
def test_a_document_leaves_as_many_slots_as_was_said(
    tokens: int, sizes: tuple[int, list[int]], memory: int, sink: int
) -> None:
    settings = config(sizes[0], ratios=(1,), sink=sink)
    ratios = [sizes[1][i % 60] for i in range(-(-tokens // sizes[0]))]
    cursor = Cursor(memory=memory, sink_pending=sink)
    windows = cut_windows(cursor, range(tokens), settings, iter(ratios), tail="close")
    layout = BeaconLayout.build([Piece(cursor, windows)], settings)
    slots = document_slots(tokens, ratios, settings)
    assert len(layout.memories[0]) == memory + sink + slots
    assert slots == sum(slots_of(len(window.ids), window.ratio) for window in windows)
    assert [w.memory for w in windows] == [memory, *accumulate((len(w.kept) for w in windows[:-1]), initial=memory)][1:]


def test_salience_is_asked_for_the_tokens_of_one_window_at_a_time() -> None:
    asked: list[int] = []

    def salience(ids: Sequence[int]) -> list[float]:
        asked.append(len(ids))
        return by_value(ids)

    cut_windows(Cursor(), range(20), config(placement="salient"), repeat(4), tail="close", salience=salience)
    assert asked == [8, 8, 4]
