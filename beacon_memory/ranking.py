"""Rankings of passages: by BM25, as plain retrieval would choose them for a prompt, and joined with another one."""

from __future__ import annotations

from collections.abc import Sequence

from beacon_memory.errors import MissingDependencyError

__all__ = ["TELLING", "joined", "matches", "rank_passages"]

TELLING = 2 / 3  # of a question's words: if no passage has more of them, words do not tell which one is asked for


def joined(worded: Sequence[float], attended: Sequence[float], told: float) -> list[float]:
    """Return one score out of two of the same passages, each of them as a share of its best.

    worded:   scores by words, which count by how much these tell. attended: scores by attention.
    told:     the largest share of the question's words that one passage has.
    """
    weight, words, attention = told / TELLING, max(worded, default=0.0) or 1.0, max(attended, default=0.0) or 1.0
    return [weight * word / words + look / attention for word, look in zip(worded, attended, strict=True)]


def rank_passages(passages: Sequence[str], question: str) -> list[int]:
    """Return the numbers of the passages, the best match of the question first; equal ones in their order."""
    scores = matches(passages, question)
    return sorted(range(len(scores)), key=lambda number: -scores[number])


def matches(passages: Sequence[str], question: str) -> list[float]:
    """Return how well each passage matches the question, 0 where they share no word.

    Scores are those of BM25 in the package bm25s, without English stop words. Raises MissingDependencyError without it.
    """
    try:
        import bm25s
    except ImportError as error:
        raise MissingDependencyError("bm25 needs the package bm25s: pip install 'beacon-memory[eval]'") from error
    words, asked = (
        bm25s.tokenize(texts, stopwords="en", show_progress=False) for texts in (list(passages), [question])
    )
    if not any(words.ids):
        return [0.0] * len(passages)  # there are only stop words, which cannot be indexed
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    (numbers,), (scores,) = index.retrieve(asked, k=len(passages), show_progress=False)
    return [float(score) for _, score in sorted(zip(numbers, scores, strict=True))]
