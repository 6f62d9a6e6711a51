"""BM25 over the passages of one text, as plain retrieval would choose them for a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from beacon_memory.errors import MissingDependencyError

__all__ = ["rank_passages"]


def rank_passages(passages: Sequence[str], question: str) -> list[int]:
    """Return the numbers of the passages, the best match of the question first; equal ones in their order.

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
        return list(range(len(passages)))  # there are only stop words, which cannot be indexed
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    (numbers,), (scores,) = index.retrieve(asked, k=len(passages), show_progress=False)
    return [int(number) for _, number in sorted(zip(-scores, numbers, strict=True))]
