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
from beacon_memory.kv.memory_kv import BeaconKV
from beacon_memory.kv.prefix import Block, Prefix
from beacon_memory.kv.rope import Rope, apply_rotation
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window
from beacon_memory.modeling.model import BeaconModel

__all__ = ["PIECE", "SCORES", "ExpectedAttention", "check_score", "repeated", "spread"]

SCORES = ("repeat", "expected")

PIECE = 256  # tokens that are repeated at a time, which bounds the memory that it takes
_FUTURE = 512  # positions behind a window that expected queries are spread over


def check_score(score: str) -> str:
    """Return `score` unchanged; raises ConfigError unless it is one of SCORES."""
    if score not in SCORES:
        raise ConfigError(f"score={score!r} must be one of {', '.join(map(repr, SCORES))}")
    return score


def repeated(model: BeaconModel, prefix: Prefix, raw: BeaconKV, ids: Sequence[int]) -> Tensor:
    """Return how much tokens of a window contribute while it is repeated, [layers, kv_heads, tokens].

    raw: K/V of the window.
    """
    pieces = [(at, min(at + PIECE, len(ids))) for at in range(0, len(ids), PIECE)]
    branches = [Window.behind(raw.slots, ids[start:stop]) for start, stop in pieces]
    layout = BeaconLayout.build([Piece(Cursor(memory=raw.slots), branches)], model.config)
    received = _Received(pieces)
    model.run(layout, raw, [], prefixes=[prefix], watch=received)
    return received.scores * raw.values.float().square().sum(-1)


def spread(measured: Tensor, ranking: Tensor) -> Tensor:
    """Hand scores measured on one text, [layers, kv_heads, tokens], to the tokens of another in their ranking.

    ranking: [layers, kv_heads, other tokens], higher is better within a head. The best token of a head takes the head's
    highest score, and so on; the shares of the heads in a budget stay as measured.
    """
    tokens = ranking.shape[-1]
    places = ((torch.arange(tokens, device=measured.device) + 0.5) * measured.shape[-1] / tokens).long()
    falling = measured.sort(dim=-1, descending=True).values[..., places]
    return torch.empty_like(falling).scatter_(-1, ranking.argsort(dim=-1, descending=True), falling)


class _Scores:
    """Collect a tensor of scores for each layer, in their order."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []

    @property
    def scores(self) -> Tensor:
        """[layers, kv_heads, tokens] float32."""
        return torch.stack(self.layers)


class _Received(_Scores):
    """Add up the squares of the weights that memory slots receive in a pass; called as a `Watch`.

    spans: the rows of each branch, first and stop; a branch sees itself and the memory, not the others.
    """

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.spans = spans

    def __call__(
        self, _layer: int, _sequence: int, query: Tensor, key: Tensor, memory: int, prefix: Sequence[Block]
    ) -> None:
        """Take the attention of one layer; they come in their order."""
        grouped = query.unflatten(0, (len(key), -1))
        received = query.new_zeros(len(key), memory, dtype=torch.float32)
        for start, stop in self.spans:
            rows = grouped[:, :, start:stop]
            own = (rows @ key[:, None, memory + start : memory + stop].mT).float()
            own.masked_fill_(torch.ones_like(own[0, 0], dtype=torch.bool).triu(1), float("-inf"))
            seen = (rows @ key[:, None, :memory].mT).float()
            total = torch.logaddexp(own.logsumexp(-1), seen.logsumexp(-1))
            for heads, keys, _ in prefix:
                total[heads] = total[heads].logaddexp((rows[heads] @ keys[:, None].mT).float().logsumexp(-1))
            received += (seen - total[..., None]).exp_().square_().sum((1, 2))
        self.layers.append(received)


class ExpectedAttention(_Scores):
    """Work out the attention that tokens of a window may expect of the queries behind it; called as a `Watch`.

    With mean m and covariance C of a head's queries before RoPE, both rotated by the mean rotation over the next
    positions, a key k expects the weight exp(k m + k C k / 2), over the sum of these (as the package kvpress has it);
    scores are comparable within a head only.
    """

    def __init__(self, rope: Rope, tokens: int) -> None:
        super().__init__()
        here = rope.table(torch.arange(tokens, device=rope.inv_freq.device))
        self.inverse = [part / rope.scaling**2 for part in here]  # takes the scaling back too
        future = torch.arange(tokens, tokens + _FUTURE, device=rope.inv_freq.device)
        self.future = [part.mean(0) for part in rope.table(future)]
        self.tokens = tokens

    def __call__(
        self, _layer: int, _sequence: int, query: Tensor, key: Tensor, _memory: int, _front: Sequence[Block]
    ) -> None:
        """Take the attention of one layer; they come in their order, and raw rows first."""
        cos, sin = self.inverse
        queries = apply_rotation(query[:, : self.tokens].float(), cos, -sin)
        keys = key[:, : self.tokens].float()
        cos, sin = self.future
        mean = queries.mean(1, keepdim=True)
        spread = apply_rotation(queries - mean, cos, sin).unflatten(0, (len(keys), -1))
        mean = apply_rotation(mean, cos, sin).unflatten(0, (len(keys), -1))
        along = (
            keys[:, None] @ mean.mT
            + (keys[:, None] @ (spread.mT @ spread / self.tokens) * keys[:, None]).sum(-1, keepdim=True) / 2
        )
        self.layers.append(along[..., 0].softmax(-1).mean(1))
