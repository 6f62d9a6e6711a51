from __future__ import annotations

import re
from typing import Any

import pytest

from beacon_memory.errors import InputError
from beacon_memory.evaluation.items import Item
from beacon_memory.evaluation.needles import needle_document, needle_items
from beacon_memory.ranking import matches


def words(text: str) -> int:
    return len(text.split())


# 400 sentences of five words each, in lines that end inside a sentence
ESSAYS = [
    "\n".join(f"of it. Essay {essay} has {number} words" for number in range(100)) + " of it." for essay in range(4)
]


class TestNeedles:
    def read(self, lengths: list[int], depths: list[float], **options: Any) -> list[Item]:
        return needle_items(ESSAYS, lengths=lengths, depths=depths, count=words, **options)

    @pytest.mark.parametrize("length", [50, 100, 900])
    def test_the_text_fills_the_length_up_to_a_sentence(self, length: int) -> None:
        for item in self.read([length], [0, 0.3, 1]):
            assert length - 7 < words("\n".join(item.context)) <= length

    def test_the_line_ends_between_passages_count(self) -> None:
        for item in needle_items(ESSAYS, lengths=[3000, 3010, 3020], depths=[0, 1], count=len):
            assert 3000 - 60 < len("\n".join(item.context)) <= int(item.group.split()[0])

    @pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
    def test_the_needle_stands_at_its_depth_behind_a_whole_sentence(self, depth: float) -> None:
        (item,) = self.read([900], [depth])
        (answer,) = item.answers
        text = " ".join(item.context)
        before, after = text.split(answer)
        needle = before.rpartition(". ")[2] if ". " in before else before
        hay = words(text) - words(needle) - 1
        assert (words(before) - words(needle)) / hay == pytest.approx(depth, abs=7 / hay)
        assert after.startswith(".")
        assert text.count(answer) == 1
        assert item.group == f"900 {depth}"

    def test_the_question_asks_for_it(self) -> None:
        for item in self.read([200], [0.5], repeats=8):
            assert item.metrics == ("contains",)
            place = item.question.rstrip("?").split()[-1]
            (passage,) = (passage for passage in item.context if item.answers[0] in passage)
            assert place in passage
            assert "Essay" in passage  # it stands in a paragraph, not for itself
            assert item.answers[0] not in item.question

    def test_other_words_share_none_with_their_question(self) -> None:
        items = self.read([200], [0, 0.5, 1], repeats=9, other_words=True)
        assert len({item.question for item in items}) == 6
        for item in items:
            (sentence,) = re.findall(rf"[^.]*{item.answers[0]}[^.]*\.", " ".join(item.context))
            assert matches([sentence, "of it"], item.question) == [0, 0]

    def test_needles_differ_by_seed_depth_and_repeat(self) -> None:
        items = [*self.read([200], [0, 1], repeats=3), *self.read([200], [0, 1], repeats=3, seed=1)]
        assert len({item.answers for item in items}) == 12
        assert len({item.id for item in items}) == 6
        assert self.read([200], [0, 1], repeats=3) == items[:6]

    def test_depths_share_one_haystack(self) -> None:
        def hay(item: Item) -> list[str]:
            return [word for word in " ".join(item.context).split() if word.isdigit()][:20]

        early, late = self.read([400], [0.9, 1])
        assert hay(early) == hay(late)
        assert any(hay(self.read([400], [1], seed=seed)[0]) != hay(late) for seed in range(1, 5))

    @pytest.mark.parametrize(("end", "gap"), [('."', " "), ("!)", " "), ("?", "\n"), (".", "")])
    def test_sentences_also_end_with_quotes_and_where_a_space_was_lost(self, end: str, gap: str) -> None:
        first = f"They met at noon and one said it{end}"
        essay = f"{first}{gap}He left at once and they never met again for many years."
        (item,) = needle_items([essay], lengths=[22], depths=[0], count=words)
        assert item.context[0].endswith(f" {first}")

    def test_hard_wrapped_lines_are_joined_into_passages(self) -> None:
        (item,) = self.read([900], [0.5])
        assert not any("\n" in passage for passage in item.context)
        assert 2 < len(item.context) < 20

    def test_what_cannot_be_made_is_refused_with_the_numbers(self) -> None:
        with pytest.raises(InputError, match=r"depths=\[1.5\]"):
            self.read([100], [0.5, 1.5])
        with pytest.raises(InputError, match=r"9000 tokens.*too short"):
            self.read([9000], [0.5])
        with pytest.raises(InputError, match=r"8 tokens.*no sentence fits"):
            self.read([8], [0.5])


class TestNeedleDocument:
    DEPTHS = (0, 0.05, 0.25, 0.5, 0.95, 1)

    def read(self, tokens: int = 1500, **options: Any) -> list[Item]:
        return needle_document(ESSAYS, tokens=tokens, **{"depths": self.DEPTHS, "count": words} | options)

    @pytest.mark.parametrize("tokens", [300, 1500, 7000])
    def test_the_text_fills_the_length_though_the_haystack_be_shorter(self, tokens: int) -> None:
        items = self.read(tokens)
        assert len({item.context for item in items}) == 1
        assert tokens - 7 < words("\n".join(items[0].context)) <= tokens

    def test_each_fact_stands_once_at_its_depth(self) -> None:
        items = self.read()
        text = "\n".join(items[0].context)
        for item, depth in zip(items, self.DEPTHS, strict=True):
            (answer,) = item.answers
            assert text.count(answer) == 1
            assert words(text.partition(answer)[0]) / words(text) == pytest.approx(depth, abs=0.05)
            assert item.group == str(depth)
        assert len({item.question for item in items}) == len({item.answers for item in items}) == len(items)

    def test_the_seed_decides_it(self) -> None:
        assert self.read() == self.read()
        assert self.read()[0].context != self.read(seed=1)[0].context

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"depths": [1.5]}, "must be from 0"),
            ({"depths": [0.5] * 34}, "34 of them, but there are only 33"),
            ({"tokens": 10}, "no sentence fits"),
        ],
    )
    def test_what_cannot_be_made_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            self.read(**options)
        with pytest.raises(InputError, match="has no sentence"):
            needle_document([" "], tokens=10, depths=[0.5], count=words)
