from __future__ import annotations

import sys

import pytest

from beacon_memory.errors import MissingDependencyError
from beacon_memory.ranking import rank_passages

PASSAGES = ("The cat sat on a mat.", "Dogs bark loudly.", "Rivers flow to the sea, and a river is deep.")


@pytest.mark.parametrize(("question", "best"), [("Which DOGS bark?", 1), ("What is on the mat?", 0), ("sea", 2)])
def test_the_passage_with_the_words_of_the_question_is_first(question: str, best: int) -> None:
    ranked = rank_passages(PASSAGES, question)
    assert ranked[0] == best
    assert sorted(ranked) == [0, 1, 2]


@pytest.mark.parametrize("question", ["zebra", "of the", ""])
@pytest.mark.parametrize("passages", [PASSAGES, ("...", "!"), ("the", "a")])
def test_where_nothing_matches_the_order_stays(passages: tuple[str, ...], question: str) -> None:
    assert rank_passages(passages, question) == list(range(len(passages)))


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'beacon-memory\[eval\]'"):
        rank_passages(PASSAGES, "cat")
