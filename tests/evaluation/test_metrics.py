from __future__ import annotations

import sys

import pytest

from beacon_memory.errors import InputError, MissingDependencyError
from beacon_memory.evaluation import metrics
from beacon_memory.evaluation.metrics import (
    LEVAL_METRICS,
    LONGBENCH_METRICS,
    METRICS,
    Interval,
    bootstrap,
    classification,
    code_similarity,
    contains,
    exact_match,
    exam,
    f1,
    number,
    paired_difference,
    rouge_l,
)


class TestWords:
    @pytest.mark.parametrize(
        ("prediction", "answer", "score"),
        [
            ("The Black Sea.", "black sea", 1.0),
            ("in the black sea", "Black Sea", 2 * 2 / (3 + 2)),
            ("sea sea sea", "the sea", 2 * 1 / (3 + 1)),  # a word counts as often as both have it
            ("sea sea", "sea sea sea", 2 * 2 / (2 + 3)),
            ("the Alps", "Black Sea", 0.0),
            ("", "Black Sea", 0.0),
            ("A!", "the", 1.0),  # neither has a word
        ],
    )
    def test_f1_is_the_share_of_common_words(self, prediction: str, answer: str, score: float) -> None:
        assert f1(prediction, [answer]) == pytest.approx(score)

    def test_the_best_of_several_answers_counts(self) -> None:
        # against "one two": 2 x 1 / (1 + 2); against "two three four": 2 x 1 / (1 + 3)
        assert f1("two", ["five", "two three four", "one two"]) == pytest.approx(2 / 3)

    def test_exact_match_forgives_case_articles_punctuation_and_space_only(self) -> None:
        assert exact_match(" An  APPLE, pie!\n", ["apple-pie", "apple pie"]) == 1
        assert exact_match("apple pie", ["apple-pie"]) == 0  # which is the one word "applepie"
        assert exact_match("pie apple", ["apple pie"]) == 0
        assert exact_match("apples", ["apple"]) == 0

    def test_articles_inside_words_stay(self) -> None:
        assert metrics.normalized("The theme: an Atlas, a-b") == ["theme", "atlas", "ab"]

    @pytest.mark.parametrize(
        ("prediction", "answer", "score"),
        [
            ("It was on 7 May, 2023, I think.", "May 7", 0),
            ("It was on 7 May, 2023, I think.", "7 May 2023", 1),
            ("17 May", "7 May", 0),  # words, not characters
            ("7 May", "on 7 May", 0),
            ("anything", "the", 0),
        ],
    )
    def test_contains_wants_the_words_of_the_answer_in_a_row(self, prediction: str, answer: str, score: float) -> None:
        assert contains(prediction, [answer]) == score

    @pytest.mark.parametrize("metric", [f1, exact_match, contains, rouge_l, code_similarity, exam, number])
    def test_a_metric_without_right_answers_is_refused(self, metric: metrics.Metric) -> None:
        with pytest.raises(InputError, match=r"answers=\[\]"):
            metric("anything", [])

    def test_a_text_is_not_taken_for_a_sequence_of_answers(self) -> None:
        with pytest.raises(InputError, match="'a b'"):
            f1("a", "a b")


class TestRouge:
    def test_it_is_the_longest_common_subsequence(self) -> None:
        pytest.importorskip("rouge_score")
        # "cat on mat": 3 of 4 predicted words, 3 of 6 right ones; F = 2 x 3/4 x 1/2 / (3/4 + 1/2)
        assert rouge_l("Cat, on mat: dog", ["the cat sat on the mat"]) == pytest.approx(0.6)
        assert rouge_l("cats", ["cat"]) == 0
        assert rouge_l("", ["cat"]) == 0

    def test_a_missing_package_is_named_with_the_extra_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        metrics._rouge.cache_clear()
        monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)  # as if it were not installed
        with pytest.raises(MissingDependencyError, match=r"rouge-score.*pip install 'beacon-memory\[eval\]'"):
            rouge_l("cat", ["cat"])


class TestLongBench:
    @pytest.mark.parametrize(
        ("prediction", "score"),
        [
            ("Number of something", 1),
            ("Date or Number of something", 1 / 2),
            ("Date", 0),
            ("a date", 0),
            ("no idea", 0),
            ("\nNumber of something\nType: Date", 1),  # only the first line counts
            ("Type:\nNumber of something", 0),
        ],
    )
    def test_classification_is_shared_by_the_classes_that_are_named(self, prediction: str, score: float) -> None:
        # "Number" stands in the right class's own name
        assert classification(prediction, ["Number of something", "Date", "Number"]) == score

    @pytest.mark.parametrize("answers", [[], ["Date"], "Date"])
    def test_classification_without_other_classes_is_refused(self, answers: list[str]) -> None:
        with pytest.raises(InputError, match="other classes"):
            classification("Date", answers)

    @pytest.mark.parametrize(
        ("prediction", "score"),
        [("Paragraph 7", 1), ("It is 7 or 17, or 7.", 2 / 3), ("17", 0), ("seven", 0), ("", 0)],
    )
    def test_number_is_the_share_of_right_numbers(self, prediction: str, score: float) -> None:
        assert number(prediction, ["Paragraph 7"]) == pytest.approx(score)
        assert number(prediction, ["7"]) == pytest.approx(score)

    def test_an_answer_without_number_is_refused(self) -> None:
        with pytest.raises(InputError, match="'the second'"):
            number("2", ["the second"])

    def test_code_similarity_compares_the_first_line_of_code(self) -> None:
        assert code_similarity("\n# comment\n```python\n// too\nx = 1\ny = 2", ["x = 1"]) == 1
        assert code_similarity("bcde", ["abcd"]) == pytest.approx(2 * 3 / 8)
        assert code_similarity("# nothing else", ["abcd"]) == 0

    def test_long_lines_are_compared_by_all_their_characters(self) -> None:
        assert code_similarity("b" + "a" * 300, ["a" * 300]) == pytest.approx(600 / 601)

    def test_few_shot_tasks_count_the_first_line_only(self) -> None:
        prediction = "\nthe Black Sea\nQuestion: and then?"
        assert METRICS["first_line_f1"](prediction, ["Black Sea"]) == 1
        assert METRICS["first_line_f1"]("Black\nSea", ["Black Sea"]) == pytest.approx(2 / 3)
        assert f1(prediction, ["Black Sea"]) < 1
        assert {LONGBENCH_METRICS[name] for name in ("trec", "triviaqa", "samsum")} == {
            "classification",
            "first_line_f1",
            "first_line_rouge_l",
        }

    def test_every_data_set_has_a_metric(self) -> None:
        assert {*LONGBENCH_METRICS.values(), *LEVAL_METRICS.values()} <= METRICS.keys()
        assert LONGBENCH_METRICS["hotpotqa"] == "f1"
        assert LONGBENCH_METRICS["gov_report"] == "rouge_l"
        assert LONGBENCH_METRICS["repobench-p"] == "code_similarity"


class TestExam:
    @pytest.mark.parametrize(
        ("prediction", "answer", "score"),
        [
            ("C", "C", 1),
            ("C. To answer questions", "C", 1),
            ("The answer is (C).", "C", 1),
            ("B", "C", 0),
            ("A friend told him: C", "C", 1),  # an article
            ("A and C", "AC", 1),
            ("A or C", "A", 0),
            ("CA", "AC", 1),
            ("A, C", "AC", 1),
            ("A", "AC", 0),  # all must be there
            ("ABC", "AC", 0),  # and no other
            ("C\nA. Analyze\nB. Generate", "C", 1),  # repeated options do not count
            ("A\nC", "C", 0),  # the first line that names any
            ("Let me think.\nC", "C", 1),
            ("DNA", "D", 0),
            ("C'est B", "B", 1),
            ("", "A", 0),
            ("to answer questions", "A", 0),
        ],
    )
    def test_exactly_the_right_letters_are_right(self, prediction: str, answer: str, score: float) -> None:
        assert exam(prediction, [answer]) == score

    def test_an_answer_that_is_no_option_is_refused(self) -> None:
        with pytest.raises(InputError, match="'Yes'"):
            exam("A", ["Yes"])


class TestIntervals:
    def test_values_that_are_all_alike_leave_no_doubt(self) -> None:
        assert bootstrap([0.25] * 7) == Interval(0.25, 0.25, 0.25)

    def test_it_is_about_two_standard_errors_to_each_side(self) -> None:
        # 400 values of 0 or 1, half each: the standard error is sqrt(0.25 / 400) = 0.025
        interval = bootstrap([0.0, 1.0] * 200)
        assert interval.mean == 0.5
        assert interval.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
        assert interval.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)

    def test_two_values_give_the_known_quantiles(self) -> None:
        # the mean of a draw is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4: both tails hold more than 2.5 %
        assert bootstrap([0.0, 1.0]) == Interval(0.5, 0.0, 1.0)

    def test_it_follows_from_the_seed(self) -> None:
        values = [0.1, 0.9, 0.4, 0.35, 0.7]
        assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
        assert len({bootstrap(values, seed=seed, resamples=50) for seed in range(5)}) > 1

    def test_a_constant_gain_is_certain_however_values_scatter(self) -> None:
        first, second = [0.5, 1.0, 0.75, 0.25], [0.25, 0.75, 0.5, 0.0]
        assert paired_difference(first, second) == Interval(0.25, 0.25, 0.25)
        assert bootstrap(first).low < bootstrap(second).high  # unpaired they overlap

    def test_a_difference_is_first_less_second(self) -> None:
        interval = paired_difference([0, 0, 0, 1], [1, 1, 0, 1])
        assert interval.mean == -0.5
        assert (interval.low, interval.high) == (-1.0, 0.0)

    def test_what_cannot_be_compared_is_refused(self) -> None:
        with pytest.raises(InputError, match="no values"):
            bootstrap([])
        with pytest.raises(InputError, match="resamples=0"):
            bootstrap([1.0], resamples=0)
        with pytest.raises(InputError, match="2 and 1 values"):
            paired_difference([1, 2], [1])
