from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from kv_samples import sample

from beacon_memory.errors import InputError
from beacon_memory.storage.files.header import LONGEST_SECTION, SectionSpan, WindowSpan


def offsets(tokens: int, start: int = 0) -> list[tuple[int, int]]:
    """Where tokens of three characters, with one between them, lie."""
    return [(start + 4 * n, start + 4 * n + 3) for n in range(tokens)]


@pytest.mark.parametrize(
    ("tokens", "span", "cuts"),
    [
        (10, 10, ()),
        (11, 11, ((10, 40),)),
        (100, 100, ((10, 40), (26, 102), (70, 280))),
        (100, 130, ((10, 40), (26, 102), (70, 280))),  # hybrid: tokens, and beacons behind them
        (100, 50, ((5, 40), (13, 102), (35, 280))),  # beacons: each stands for two tokens
        (100, 3, ((0, 102), (2, 280))[1:]),
    ],
)
def test_sections_begin_where_passages_do(tokens: int, span: int, cuts: tuple[tuple[int, int], ...]) -> None:
    window = WindowSpan.of(tokens, 2, span, offsets(tokens), [0, 40, 102, 280, 1000])
    assert (window.start, window.stop, window.cuts) == (0, 4 * tokens - 1, cuts)


def test_a_window_knows_the_passages_of_its_own_text_only() -> None:
    window = WindowSpan.of(50, 2, 50, offsets(50, start=1000), [0, 400, 1000, 1080, 1200])
    assert window.cuts == ((20, 1080),)


@pytest.mark.parametrize(
    ("first", "second"), [((200, 200), (77, 77)), ((200, 530), (65, 90)), ((512, 128), (300, 75)), ((900, 900), (1, 1))]
)
def test_sections_cover_positions_and_text_without_gaps(first: tuple[int, int], second: tuple[int, int]) -> None:
    breaks = range(0, 10_000, 270)
    one = WindowSpan.of(first[0], 2, first[1], offsets(first[0]), breaks)
    two = WindowSpan.of(second[0], 2, second[1], offsets(second[0], one.stop), breaks)
    header = replace(
        sample()[0], tokens=first[0] + second[0], windows=(one, two), span=first[1] + second[1], tail_ids=()
    )
    sections = header.sections
    assert len(sections) == header.section_count
    assert sections[0].first == 0
    assert all(a.first + a.size == b.first for a, b in pairwise(sections))
    assert sections[-1].first + sections[-1].size == header.span
    assert all(1 <= section.size <= LONGEST_SECTION for section in sections)
    for number, window in enumerate((one, two)):
        own = [section for section in sections if section.window == number]
        covering = own[: len(window.cuts) + 1]
        assert covering[0].start == window.start
        assert covering[-1].stop == window.stop
        assert all(a.stop == b.start for a, b in pairwise(covering))
        assert all((section.start, section.stop) == (window.start, window.stop) for section in own[len(covering) :])


def test_long_pieces_are_cut_into_equal_sections_of_one_text() -> None:
    header = replace(sample()[0], tokens=600, windows=(WindowSpan(600, 2, 0, 60, 600),), span=600, tail_ids=())
    assert [section.size for section in header.sections] == [120] * 5
    assert {(section.start, section.stop) for section in header.sections} == {(0, 60)}
    assert header.section_count == 5


def test_a_document_of_no_windows_has_no_sections() -> None:
    header = replace(sample()[0], tokens=0, windows=(), span=0, tail_ids=())
    assert header.sections == []
    assert header.section_count == 0
    assert replace(header, windows=(WindowSpan(0, 2, 0, 0, 0),)).sections == []


def test_sections_are_numbered_by_window() -> None:
    header, _ = sample()
    half = header.windows[0].stop
    assert header.sections == [SectionSpan(0, 0, 8, 0, half), SectionSpan(1, 8, 5, half, header.windows[1].stop)]


@pytest.mark.parametrize(
    ("span", "cuts", "message"),
    [
        (64, ((0, 3),), "must rise between 0 and its 10 tokens"),
        (64, ((10, 3),), "must rise between 0 and its 10 tokens"),
        (5, ((5, 3),), "must rise between 0 and its 5 tokens"),
        (64, ((3, 3), (3, 4)), "must rise"),
        (64, ((3, 11),), r"must not fall, got \[0, 11, 10\]"),
        (64, ((3, 6), (4, 5)), r"must not fall, got \[0, 6, 5, 10\]"),
        (64, ((3, -1),), "a number of a cut must be an integer of at least 0"),
        (64, ((1.5, 3),), "a number of a cut must be an integer"),
        (64, ((True, 3),), "a number of a cut must be an integer"),
    ],
)
def test_cuts_that_cannot_be_are_refused(span: int, cuts: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WindowSpan(10, 1, 0, 10, span, cuts)


@pytest.mark.parametrize("namespace", [None, 0, False, [], "\ud800"])
def test_a_namespace_is_a_text(namespace: str) -> None:
    with pytest.raises(InputError, match=r"must be a str|surrogate"):
        replace(sample()[0], namespace=namespace)
