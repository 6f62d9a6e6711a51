"""Scores against explicit softmax, explicit rotation matrices and plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from stock_behind import eager, slow_repeated, some_kept, stock_reading
from tiny_models import MODELS, some_ids, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from beacon_memory.compression.methods import ReadWindow
from beacon_memory.compression.scoring import ExpectedAttention, ProbeFit, repeated
from beacon_memory.config import BeaconConfig
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.probe import Probe
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


def some_windows(*tokens: int) -> list[tuple[BeaconKV, Tensor, Tensor]]:
    """K/V, expected attention and scores of windows, made up, of 2 layers with 3 heads."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        (
            BeaconKV(3 + some(2, 3, count, 8), some(2, 3, count, 8)),
            some(2, 3, count).softmax(-1),
            some(2, 3, count).mul(2).exp(),
        )
        for count in tokens
    ]


def slow_features(kv: BeaconKV, expected: Tensor, layer: int, token: int) -> list[float]:
    keys, values = kv.keys[layer, :, token].tolist(), kv.values[layer, :, token].tolist()
    norms = [math.log(sum(number * number for number in head)) for head in (*keys, *values)]
    attention = [math.log(expected[layer, head, token].item() * expected.shape[-1]) for head in range(3)]
    return [number for head in (*keys, *values) for number in head] + norms + attention


def test_a_probe_is_a_linear_map_of_what_one_reading_tells() -> None:
    ((kv, expected, _),) = some_windows(5)
    weights, bias = torch.rand(2, 57, 3), torch.rand(2, 3)
    scores = Probe(weights, bias)(kv, expected)
    for layer in range(2):
        for token in range(5):
            known = torch.tensor(slow_features(kv, expected, layer, token))
            torch.testing.assert_close(scores[layer, :, token], known @ weights[layer] + bias[layer])


def test_a_fit_is_ridge_regression_on_the_tokens_of_all_windows() -> None:
    windows, fit = some_windows(60, 90), ProbeFit()
    for window in windows:
        fit.take(*window)
    probe = fit.probe()
    for layer in range(2):
        known = np.array([slow_features(kv, of, layer, token) for kv, of, _ in windows for token in range(kv.slots)])
        found = np.concatenate([scores[layer].log().T.double().numpy() for _, _, scores in windows])
        standard = (known - known.mean(0)) / known.std(0)
        # a ridge is a row for each feature that should be 0, beside the rows of the tokens
        ridge = math.sqrt(57 / 4) * np.eye(57)
        rows, answers = np.vstack((standard, ridge)), np.vstack((found - found.mean(0), np.zeros((57, 3))))
        fitted, *_ = np.linalg.lstsq(rows, answers)
        expected = standard @ fitted + found.mean(0)
        weights, bias = probe.weights[layer].double().numpy(), probe.bias[layer].double().numpy()
        np.testing.assert_allclose(known @ weights + bias, expected, rtol=1e-3, atol=1e-4)


def test_what_a_score_follows_from_is_learnt() -> None:
    (kv, expected, _), fit = some_windows(600)[0], ProbeFit()
    scores = (kv.values[..., 0] - kv.keys.flip(1)[..., 2] + kv.values.square().sum(-1).log()).exp()
    fit.take(BeaconKV(kv.keys[:, :, :500], kv.values[:, :, :500]), expected[..., :500], scores[..., :500])
    told = fit.probe()(BeaconKV(kv.keys[:, :, 500:], kv.values[:, :, 500:]), expected[..., 500:])
    assert torch.corrcoef(torch.stack((told.flatten(), scores[..., 500:].log().flatten())))[0, 1] > 0.99


def test_scores_of_zero_and_features_that_never_change_do_no_harm() -> None:
    (kv, expected, scores), fit = some_windows(50)[0], ProbeFit()
    kv.keys[:, :, :, 1], scores[:, 1, 3] = 7.0, 0.0
    fit.take(kv, expected, scores)
    assert fit.probe()(kv, expected).isfinite().all()
