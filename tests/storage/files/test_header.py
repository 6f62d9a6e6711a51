from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from kv_samples import sample

from beacon_memory.errors import InputError
from beacon_memory.storage.files.header import SECTION, SectionSpan, WindowSpan


def offsets(tokens: int, start: int = 0) -> list[tuple[int, int]]:
    """Where tokens of three characters, with one between them, lie."""
    return [(start + 4 * n, start + 4 * n + 3) for n in range(tokens)]


@pytest.mark.parametrize(
    ("tokens", "span", "cuts"),
    [
        (1, 1, ()),
        (64, 64, ()),
        (65, 65, (4 * 64,)),
        (200, 200, (4 * 64, 4 * 128, 4 * 192)),
        (200, 230, (4 * 64, 4 * 128, 4 * 192)),  # hybrid: tokens, and beacons behind them
        (100, 150, (4 * 64,)),
        (1024, 128, (4 * 512,)),  # beacons: each stands for 8 tokens
        (1000, 125, (4 * 512,)),
        (500, 63, ()),
        (500, 65, (4 * (64 * 500 // 65),)),
    ],
)
def test_sections_begin_where_their_tokens_do(tokens: int, span: int, cuts: tuple[int, ...]) -> None:
    window = WindowSpan.of(tokens, 2, span, offsets(tokens))
    assert (window.start, window.stop, window.cuts) == (0, 4 * tokens - 1, cuts)


@pytest.mark.parametrize(("first", "second"), [((200, 200), (77, 77)), ((200, 230), (65, 90)), ((512, 128), (300, 75))])
def test_sections_cover_positions_and_text_without_gaps(first: tuple[int, int], second: tuple[int, int]) -> None:
    one = WindowSpan.of(first[0], 2, first[1], offsets(first[0]))
    two = WindowSpan.of(second[0], 2, second[1], offsets(second[0], one.stop))
    header = replace(
        sample()[0], tokens=first[0] + second[0], windows=(one, two), span=first[1] + second[1], tail_ids=()
    )
    sections = header.sections
    assert len(sections) == header.section_count
    assert [section.first for section in sections] == [
        *range(0, first[1], SECTION),
        *range(first[1], first[1] + second[1], SECTION),
    ]
    assert sum(section.size for section in sections) == header.span
    assert all(1 <= section.size <= SECTION for section in sections)
    for number, window in enumerate((one, two)):
        own = [section for section in sections if section.window == number]
        covering = own[: len(window.cuts) + 1]
        assert covering[0].start == window.start
        assert covering[-1].stop == window.stop
        assert all(a.stop == b.start for a, b in pairwise(covering))
        assert all((section.start, section.stop) == (window.start, window.stop) for section in own[len(covering) :])


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
        (64, (3,), "64 positions cannot have 1 cuts"),
        (0, (3,), "0 positions cannot have 1 cuts"),
        (128, (3, 4), "128 positions cannot have 2 cuts"),
        (128, (11,), r"must not fall, got \(0, 11, 10\)"),
        (192, (6, 5), r"must not fall, got \(0, 6, 5, 10\)"),
        (128, (-1,), "a cut must be an integer of at least 0"),
        (128, (1.5,), "a cut must be an integer"),
        (128, (True,), "a cut must be an integer"),
    ],
)
def test_cuts_that_cannot_be_are_refused(span: int, cuts: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WindowSpan(10, 1, 0, 10, span, cuts)


@pytest.mark.parametrize("namespace", [None, 0, False, [], "\ud800"])
def test_a_namespace_is_a_text(namespace: str) -> None:
    with pytest.raises(InputError, match=r"must be a str|surrogate"):
        replace(sample()[0], namespace=namespace)
