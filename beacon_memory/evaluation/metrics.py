"""Metrics of answers, each from 0 to 1, and confidence intervals of their means."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, wraps
from typing import Any

import numpy as np

from beacon_memory.errors import InputError, MissingDependencyError

__all__ = [
    "LEVAL_JUDGED",
    "LEVAL_METRICS",
    "LONGBENCH_METRICS",
    "METRICS",
    "Interval",
    "Metric",
    "bootstrap",
    "classification",
    "code_similarity",
    "contains",
    "exact_match",
    "exam",
    "f1",
    "first_line",
    "normalized",
    "number",
    "paired_difference",
    "rouge_l",
]

Metric = Callable[[str, Sequence[str]], float]  # (prediction, right answers): the best over the answers

_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Option letters, alone or together ("AC"), but not the article in "A friend".
_OPTIONS = re.compile(r"(?<![\w'’])(?!A\s+(?!and\b|or\b)[a-z])[A-D]+(?![\w'’])")


def _best_over_answers(score: Callable[[str, str], float]) -> Metric:
    @wraps(score)
    def best(prediction: str, answers: Sequence[str]) -> float:
        if not answers or isinstance(answers, str):
            raise InputError(f"answers={answers!r}, but must be a sequence of one or more right answers")
        return max(score(prediction, answer) for answer in answers)

    return best


def normalized(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation, a, an, the, as in SQuAD (arXiv 1606.05250)."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


@_best_over_answers
def f1(prediction: str, answer: str) -> float:
    """Return the harmonic mean of precision and recall of words (arXiv 1606.05250); 1 if neither text has any."""
    said, right = normalized(prediction), normalized(answer)
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right)) if said or right else 1.0


@_best_over_answers
def exact_match(prediction: str, answer: str) -> float:
    """Return 1 if both have the same words in the same order (arXiv 1606.05250), else 0."""
    return float(normalized(prediction) == normalized(answer))


@_best_over_answers
def contains(prediction: str, answer: str) -> float:
    """Return 1 if the prediction contains the answer's words, one directly after the other, else 0."""
    return float(f" {' '.join(normalized(answer))} " in f" {' '.join(normalized(prediction))} ")


@_best_over_answers
def rouge_l(prediction: str, answer: str) -> float:
    """Return the F measure of the longest common subsequence of words, by the package rouge-score, without stemming.

    LongBench's published figures come from the package `rouge`, which differs in tokens and weights. Raises
    MissingDependencyError without rouge-score.
    """
    return float(_rouge().score(answer, prediction)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingDependencyError(
            "rouge_l needs the package rouge-score: pip install 'beacon-memory[eval]'"
        ) from error
    return RougeScorer(["rougeL"])


def first_line(metric: Metric) -> Metric:
    """Return a metric that looks at the first line only. After few-shot examples, models add more examples."""
    return lambda prediction, answers: metric(_first_line(prediction), answers)


def _first_line(text: str) -> str:
    return text.lstrip("\n").split("\n", 1)[0]


def classification(prediction: str, answers: Sequence[str]) -> float:
    """Return LongBench's accuracy (arXiv 2308.14508): 1/n if the first line names n classes, the right one included.

    answers: the right class, then the others. A class whose name is part of the name of the right one does not count.
    The published code also has a branch that takes the most similar class if none is named. It is never reached, so it
    is left out here.
    """
    if len(answers) < 2 or isinstance(answers, str):
        raise InputError(f"answers={answers!r}, but must be the right class and then the other classes")
    right, line = answers[0], _first_line(prediction)
    named = {name for name in answers if name in line and (name == right or name not in right)}
    return 1 / len(named) if right in named else 0.0


@_best_over_answers
def number(prediction: str, answer: str) -> float:
    """Return the share of the prediction's numbers that equal the number in the answer.

    This is LongBench's metric for passage retrieval and passage count (arXiv 2308.14508).
    """
    right = re.search(r"\d+", answer)
    if right is None:
        raise InputError(f"the right answer {answer!r} has no number")
    said = re.findall(r"\d+", prediction)
    return said.count(right[0]) / len(said) if said else 0.0


@_best_over_answers
def code_similarity(prediction: str, answer: str) -> float:
    """Return how similar the prediction's first line of code is to the right line: 2 x matching / all characters.

    This is LongBench's edit similarity (arXiv 2308.14508); a line with `, # or // is no code. LongBench takes the ratio
    of the package fuzzywuzzy, which is difflib's, rounded to whole percent. Here it is difflib's own, without the
    heuristic that ignores frequent characters in lines of 200 characters or more.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return SequenceMatcher(None, code, answer, autojunk=False).ratio()


@_best_over_answers
def exam(prediction: str, answer: str) -> float:
    """Return 1 if the first line that names options (A to D) names exactly the right ones, in any order, else 0.

    This is L-Eval's accuracy (arXiv 2307.11088) with one difference: an answer that names no option is wrong here,
    while L-Eval counts it as A.
    """
    right = set("".join(_OPTIONS.findall(answer)))
    if not right:
        raise InputError(f"the right answer {answer!r} names no option from A to D")
    named = ({*"".join(_OPTIONS.findall(line))} for line in prediction.splitlines())
    return float(next(filter(None, named), None) == right)


METRICS: dict[str, Metric] = {
    "f1": f1,
    "exact_match": exact_match,
    "contains": contains,
    "rouge_l": rouge_l,
    "first_line_f1": first_line(f1),
    "first_line_rouge_l": first_line(rouge_l),
    "classification": classification,
    "number": number,
    "code_similarity": code_similarity,
    "exam": exam,
}

# The metric of each data set. The Chinese ones are left out: they need word segmentation (jieba) and a Chinese model.
LONGBENCH_METRICS = {
    "narrativeqa": "f1",
    "qasper": "f1",
    "multifieldqa_en": "f1",
    "hotpotqa": "f1",
    "2wikimqa": "f1",
    "musique": "f1",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "trec": "classification",
    "triviaqa": "first_line_f1",
    "samsum": "first_line_rouge_l",
    "passage_retrieval_en": "number",
    "passage_count": "number",
    "lcc": "code_similarity",
    "repobench-p": "code_similarity",
}

LEVAL_METRICS = {"exam": "exam", "f1": "f1", "rouge": "rouge_l"}  # by the name that L-Eval gives to a document's metric
LEVAL_JUDGED = ("LLM", "human")  # for documents whose answers have to be judged by a model or a person


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the mean with its 95 % percentile interval over `resamples` draws with replacement.

    The same seed gives the same interval. Raises InputError for no values.
    """
    if not len(values):
        raise InputError("there are no values: their mean has no interval")
    if resamples < 1:
        raise InputError(f"resamples={resamples}, but must be 1 or more")
    sample, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = rng.choice(sample, (resamples, len(sample))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(sample.mean()), float(low), float(high))


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the mean of `first - second` over the same items, with its interval.

    The two differ if 0 is not in the interval. Raises InputError if they have different lengths.
    """
    if len(first) != len(second):
        raise InputError(f"{len(first)} and {len(second)} values are not of the same items")
    return bootstrap([one - other for one, other in zip(first, second, strict=True)], resamples=resamples, seed=seed)
