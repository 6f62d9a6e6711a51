"""Which tokens of a window each head needs, told by attention; no question takes part.

`repeat`: the model repeats the window behind itself, piece by piece, as in KVzip (arXiv 2505.23416). What counts is how
much a token contributes to a head's output then: attention weight times norm of the value, squared, over all queries.

`expected`: no second pass. Within a head, tokens are ranked by the attention that queries distributed like those of the
window would give them, as in ExpectedAttention (Devoto et al., arXiv 2510.00636). That says little of how much a head
needs in all; but how much hardly depends on the text, so it is measured once, by repeating a text of our own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from beacon_memory.errors import ConfigError
from beacon_memory.kv.prefix import Block
from beacon_memory.kv.rope import Rope, apply_rotation
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.repetition import RepeatedWindow

__all__ = ["SCORES", "ExpectedAttention", "check_score", "repeated", "spread"]

SCORES = ("repeat", "expected")

_FUTURE = 512  # positions behind a window that expected queries are spread over


def check_score(score: str) -> str:
    """Return `score` unchanged; raises ConfigError unless it is one of SCORES."""
    if score not in SCORES:
        raise ConfigError(f"score={score!r} must be one of {', '.join(map(repr, SCORES))}")
    return score


def repeated(model: BeaconModel, windows: Sequence[RepeatedWindow]) -> list[Tensor]:
    """Return how much tokens of each window contribute while it is repeated, [layers, kv_heads, tokens] float32."""
    received = model.repeat(windows)
    return [one * window.kv.values.float().square().sum(-1) for one, window in zip(received, windows, strict=True)]


def spread(measured: Tensor, ranking: Tensor) -> Tensor:
    """Hand scores measured on one text, [layers, kv_heads, tokens], to the tokens of another in their ranking.

    ranking: [layers, kv_heads, other tokens], higher is better within a head. The best token of a head takes the head's
    highest score, and so on; the shares of the heads in a budget stay as measured.
    """
    tokens = ranking.shape[-1]
    places = ((torch.arange(tokens, device=measured.device) + 0.5) * measured.shape[-1] / tokens).long()
    falling = measured.sort(dim=-1, descending=True).values[..., places]
    return torch.empty_like(falling).scatter_(-1, ranking.argsort(dim=-1, descending=True), falling)


class ExpectedAttention:
    """Work out the attention that tokens of a window may expect of the queries behind it; called as a `Watch`.

    With mean m and covariance C of a head's queries before RoPE, both rotated by the mean rotation over the next
    positions, a key k expects the weight exp(k m + k C k / 2), over the sum of these (as the package kvpress has it);
    scores are comparable within a head only.
    """

    def __init__(self, rope: Rope, tokens: int) -> None:
        device = rope.inv_freq.device
        cos, sin = rope.table(torch.arange(tokens, device=device))
        future = rope.table(torch.arange(tokens, tokens + _FUTURE, device=device))
        mean_cos, mean_sin = (part.mean(0) / rope.scaling**2 for part in future)  # takes back that of the present too
        self.turn = mean_cos * cos + mean_sin * sin, mean_sin * cos - mean_cos * sin  # from each position to the mean
        self.tokens = tokens
        self.layers: list[Tensor] = []

    @property
    def scores(self) -> Tensor:
        """[layers, kv_heads, tokens] float32."""
        return torch.stack(self.layers)

    def __call__(
        self, _layer: int, _sequence: int, query: Tensor, key: Tensor, _memory: int, _front: Sequence[Block]
    ) -> None:
        """Take the attention of one layer; they come in their order, and raw rows first."""
        queries = apply_rotation(query[:, : self.tokens].float(), *self.turn)
        mean = queries.mean(1, keepdim=True)
        queries -= mean
        covariance = queries.mT @ queries / self.tokens
        keys = key[:, : self.tokens].float().repeat_interleave(len(query) // len(key), dim=0)
        # k m + k C k / 2
        along = (torch.baddbmm(mean, keys, covariance, alpha=0.5) * keys).sum(-1)
        self.layers.append(along.softmax(-1).unflatten(0, (len(key), -1)).mean(1))
