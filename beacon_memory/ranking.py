"""Rankings of passages: by BM25, as plain retrieval would choose them for a prompt, and several joined."""

from __future__ import annotations

from collections.abc import Sequence

from beacon_memory.errors import MissingDependencyError

__all__ = ["fused", "matches", "rank_passages"]

_SOON = 5  # how many ranks count about as much as the first one


def fused(*rankings: Sequence[float]) -> list[float]:
    """Return one score out of several of the same passages, by reciprocal rank fusion (Cormack et al., SIGIR 2009).

    Of each ranking the scores above 0 count, 1 / (5 + rank).
    """
    scores = [0.0] * len(rankings[0])
    for ranking in rankings:
        falling = sorted((one for one, score in enumerate(ranking) if score > 0), key=lambda one: -ranking[one])
        for rank, one in enumerate(falling):
            scores[one] += 1 / (_SOON + rank)
    return scores


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
