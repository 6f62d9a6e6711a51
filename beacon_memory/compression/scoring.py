"""Which tokens of a window each head needs, told by attention; no question takes part.

`repeat`: the model repeats the window behind itself, piece by piece, as in KVzip (arXiv 2505.23416). What counts is how
much a token contributes to a head's output then: attention weight times norm of the value, squared, over all queries.

`expected`: no second pass. A probe predicts what the first would find, from keys, values and the attention that queries
distributed like those of the window would give, as in ExpectedAttention (Devoto et al., arXiv 2510.00636). It is fitted
to windows that were repeated: it comes with the adapter, or is fitted to a text of our own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from beacon_memory.errors import ConfigError
from beacon_memory.kv.memory_kv import BeaconKV
from beacon_memory.kv.prefix import Block
from beacon_memory.kv.rope import Rope, apply_rotation
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.probe import Probe, features
from beacon_memory.modeling.repetition import RepeatedWindow

__all__ = ["SCORES", "ExpectedAttention", "ProbeFit", "check_score", "repeated"]

SCORES = ("repeat", "expected")

_NOTHING = 1e-9  # of the mean score: less is no different from that
_CONSTANT = 1e-12  # variance of a feature that tells nothing
_FUTURE = 512  # positions behind a window that expected queries are spread over


def check_score(score: str) -> str:
    """Return `score` unchanged; raises ConfigError unless it is `auto` or one of SCORES."""
    if score not in ("auto", *SCORES):
        raise ConfigError(f"score={score!r} must be 'auto' or one of {', '.join(map(repr, SCORES))}")
    return score


def repeated(model: BeaconModel, windows: Sequence[RepeatedWindow]) -> list[Tensor]:
    """Return how much tokens of each window contribute while it is repeated, [layers, kv_heads, tokens] float32."""
    received = model.repeat(windows)
    return [one * window.kv.values.float().square().sum(-1) for one, window in zip(received, windows, strict=True)]


class ProbeFit:
    """Fit a probe to windows that were repeated, by ridge regression; however many there are, it holds sums alone.

    In each layer, with x the standardized features of a token and y the logarithm of a head's score:

        weights = (mean(x x^T) + penalty I)^-1 mean(x (y - mean(y))),   penalty = features / (4 tokens)

    tokens: how many it was fitted to.
    """

    def __init__(self) -> None:
        self.tokens = self._kv_heads = 0
        self._products: list[Tensor] = []  # for each layer those of [features, logarithms of scores, 1] of all tokens

    def take(self, kv: BeaconKV, expected: Tensor, scores: Tensor) -> None:
        """Take a window: its K/V, the expected attention and the scores, [layers, kv_heads, tokens] both."""
        self.tokens += kv.slots
        self._kv_heads = kv.keys.shape[1]
        logarithms = scores.clamp(min=scores.mean() * _NOTHING).log()
        for layer, found in enumerate(logarithms):
            known = features(kv, expected, layer)
            rows = torch.cat((known, found.T, known.new_ones(len(known), 1)), dim=1).cpu().double()
            if layer == len(self._products):
                self._products.append(rows.new_zeros(rows.shape[1], rows.shape[1]))
            self._products[layer].addmm_(rows.T, rows)

    def probe(self) -> Probe:
        """Return the probe that fits the windows taken so far."""
        weights, bias = zip(*map(self._map, self._products), strict=True)
        return Probe(torch.stack(weights).float(), torch.stack(bias).float())

    def _map(self, products: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights [features, kv_heads] and bias [kv_heads] of a layer."""
        mean = products[-1, :-1] / self.tokens
        covariance = products[:-1, :-1] / self.tokens - mean.outer(mean)
        known = len(mean) - self._kv_heads
        scale = covariance.diagonal()[:known].clamp(min=_CONSTANT).sqrt()
        alike = covariance[:known, :known] / scale.outer(scale)
        alike.diagonal().add_(known / (4 * self.tokens))
        weights = torch.linalg.solve(alike, covariance[:known, known:] / scale[:, None]) / scale[:, None]
        return weights, mean[known:] - mean[:known] @ weights


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
