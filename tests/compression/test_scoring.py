"""Scores against explicit softmax, explicit rotation matrices and plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from stock_behind import eager, slow_repeated, some_kept, stock_reading
from tiny_models import MODELS, some_ids, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from beacon_memory.compression.methods import ReadWindow
from beacon_memory.compression.scoring import ExpectedAttention, repeated, spread
from beacon_memory.config import BeaconConfig
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.repetition import PIECE

every_model = pytest.mark.parametrize("name", MODELS)


def both(name: str) -> tuple[PreTrainedModel, BeaconModel]:
    family, overrides = MODELS[name]
    return eager(name), tiny_model(family, BeaconConfig(), tokenizer=tiny_tokenizer(), **overrides)


def in_front(stock: PreTrainedModel, tokens: int) -> MemoryKV:
    """An uneven memory of a text of so many tokens."""
    if not tokens:
        return MemoryKV.of(BeaconKV.empty(3, 2, stock.model.layers[0].self_attn.head_dim))
    return MemoryKV.chosen(stock_reading(stock, some_ids(tokens, seed=7)).kv, some_kept((3, 2), tokens))


@every_model
@pytest.mark.parametrize("tokens", [1, 40, PIECE, PIECE + 86])
@pytest.mark.parametrize("prefix", [0, 30])
def test_repeated_adds_up_what_tokens_contribute_to_all_that_a_piece_sees(name: str, tokens: int, prefix: int) -> None:
    stock, model = both(name)
    memory, ids = in_front(stock, prefix), some_ids(tokens, seed=1)
    window = stock_reading(stock, ids, memory).kv
    with torch.no_grad():
        ours = repeated(model, [ReadWindow(model, model.prefix(memory), ids, window, None)])[0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, slow_repeated(stock, memory, window, ids), atol=1e-4, rtol=1e-3)


def rotation(base: PreTrainedModel, position: float) -> Tensor:
    """The rotary embedding of one position as a matrix [head_dim, head_dim], float64."""
    frequencies = base.model.rotary_emb.inv_freq.double()
    half = len(frequencies)
    matrix = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
    for i, frequency in enumerate(frequencies.tolist()):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        matrix[i, i] = matrix[i + half, i + half] = cos
        matrix[i, i + half], matrix[i + half, i] = -sin, sin
    return matrix * float(base.model.rotary_emb.attention_scaling)


def slow_expected(stock: PreTrainedModel, prefix: MemoryKV, ids: list[int]) -> Tensor:
    """exp(k m + k C k / 2) over its sum, of queries spread over the 512 positions behind the window."""
    reading = stock_reading(stock, ids, prefix)
    count, dim = len(ids), reading.kv.keys.shape[-1]
    future = torch.stack([rotation(stock, position) for position in range(count, count + 512)]).mean(0)
    turns = torch.stack([rotation(stock, position) for position in range(count)])
    scores = torch.zeros(3, 2, count)
    for layer in range(3):
        for head in range(2):
            keys = torch.einsum("tij,tj->ti", turns, reading.kv.keys[layer, head].double())
            for query in (2 * head, 2 * head + 1):  # the query heads of a kv head
                queries = reading.queries[layer, query].double() / math.sqrt(dim)
                mean = queries.mean(0)
                covariance = sum(torch.outer(q - mean, q - mean) for q in queries) / count
                mean, covariance = future @ mean, future @ covariance @ future.T
                expected = torch.stack([(k @ mean + k @ covariance @ k / 2).exp() for k in keys])
                scores[layer, head] += (expected / expected.sum()).float() / 2
    return scores


@every_model
@pytest.mark.parametrize("tokens", [1, 40])
def test_expected_attention_is_its_formula(name: str, tokens: int) -> None:
    stock, model = both(name)
    memory, ids = in_front(stock, 30), some_ids(tokens, seed=1)
    layout = BeaconLayout.build([Piece(Cursor(), [Window.behind(0, ids)])], model.config)
    heard = ExpectedAttention(model.rope, tokens)
    with torch.no_grad():
        model.run(layout, model.empty_kv(), [], prefixes=[model.prefix(memory)], watch=heard)
    torch.testing.assert_close(heard.scores, slow_expected(stock, memory, ids), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("measured", "others"), [(7, 7), (12, 5), (5, 12), (9, 1), (1, 6)])
def test_the_best_token_of_a_head_takes_its_highest_score(measured: int, others: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, ranking = (torch.rand(2, 3, count, generator=generator) for count in (measured, others))
    handed = spread(scores, ranking)
    for layer in range(2):
        for head in range(3):
            falling = sorted(scores[layer, head].tolist(), reverse=True)
            by_rank = sorted(range(others), key=ranking[layer, head].tolist().__getitem__, reverse=True)
            expected = [0.0] * others
            for rank, token in enumerate(by_rank):
                expected[token] = falling[int((rank + 0.5) * measured / others)]
            assert handed[layer, head].tolist() == expected
