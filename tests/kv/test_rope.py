from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_base
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from beacon_memory.kv.rope import Rope, apply_rotation
from beacon_memory.modeling.support import model_rope


def rotate(rope: Rope, x: Tensor, positions: Tensor) -> Tensor:
    return apply_rotation(x, *rope.table(positions))


KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "large theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn with attention factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.7,
    },
}
POSITIONS = torch.tensor([0, 1, 2, 3, 7, 63, 64, 100, 511, 1000, 4095, 8191, 32767, 100000])

every_kind = pytest.mark.parametrize("kind", KINDS)


def both(kind: str) -> tuple[Rope, LlamaRotaryEmbedding]:
    """Our rotation of a model, and the model's own."""
    base = tiny_base("llama", head_dim=16, rope_parameters=KINDS[kind])
    return model_rope(base), base.model.rotary_emb


def stock(rotary: LlamaRotaryEmbedding, x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = rotary(x, positions[None])
    rotated: Tensor = apply_rotary_pos_emb(x, x, cos, sin)[0]
    return rotated


def some_rows(count: int = len(POSITIONS), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, 4, count, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


@every_kind
def test_rotation_is_that_of_the_stock_model(kind: str) -> None:
    rope, rotary = both(kind)
    x = some_rows()
    torch.testing.assert_close(rotate(rope, x, POSITIONS), stock(rotary, x, POSITIONS), atol=1e-5, rtol=0)


@every_kind
def test_positions_may_be_negative_or_fractional(kind: str) -> None:
    rope, rotary = both(kind)
    x, positions = some_rows(6), torch.tensor([-512.0, -1.0, -0.25, 0.5, 1.75, 100.125])
    torch.testing.assert_close(rotate(rope, x, positions), stock(rotary, x, positions), atol=1e-5, rtol=0)


@every_kind
def test_position_zero_is_the_scaling_alone_and_can_be_taken_back(kind: str) -> None:
    rope, rotary = both(kind)
    x = some_rows()
    at_zero = stock(rotary, x, torch.zeros_like(POSITIONS))
    torch.testing.assert_close(at_zero, x * rope.scaling)
    torch.testing.assert_close(rope.remove_scaling(at_zero), x, atol=1e-6, rtol=0)


def test_only_yarn_scales() -> None:
    assert [kind for kind in KINDS if both(kind)[0].scaling != 1.0] == ["yarn", "yarn with attention factor"]
    assert both("yarn with attention factor")[0].scaling == 1.7


def test_without_scaling_there_is_nothing_to_remove() -> None:
    rope, _ = both("default")
    x = some_rows()
    assert rope.remove_scaling(x) is x


@every_kind
def test_scaling_is_removed_from_bf16_without_a_trace(kind: str) -> None:
    rope, rotary = both(kind)
    x = some_rows(dtype=torch.bfloat16)
    scaled = stock(rotary, x, torch.zeros_like(POSITIONS))
    # scaling rounds once, dividing rounds once more: two units in the last of 8 bits
    torch.testing.assert_close(rope.remove_scaling(scaled), x, atol=0, rtol=2**-7)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rotations_add(kind: str) -> None:
    rope, _ = both(kind)
    x, a, b = some_rows(6), torch.tensor([0, 1, 5, 50, 500, 1000]), torch.tensor([3, 0, 9, 200, 11, 1000])
    torch.testing.assert_close(rotate(rope, rotate(rope, x, a), b), rotate(rope, x, a + b), atol=5e-4, rtol=0)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_a_rotation_is_taken_back_by_its_opposite(kind: str) -> None:
    rope, _ = both(kind)
    x = some_rows()
    torch.testing.assert_close(rotate(rope, rotate(rope, x, POSITIONS), -POSITIONS), x, atol=1e-5, rtol=0)


def test_rotation_is_computed_in_float32_whatever_the_dtype() -> None:
    rope, _ = both("default")
    x = some_rows(dtype=torch.bfloat16)
    rotated = rotate(rope, x, POSITIONS)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(rope, x.float(), POSITIONS).to(torch.bfloat16))
