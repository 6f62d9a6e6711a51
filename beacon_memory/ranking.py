"""Rankings of passages, joined."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["fused"]

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
