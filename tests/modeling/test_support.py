from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_base
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, PreTrainedModel, Qwen3NextConfig

from beacon_memory.config import BeaconConfig
from beacon_memory.errors import UnsupportedModelError
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.support import attention_modules, max_positions, model_rope

LONG = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


def refuse(base: PreTrainedModel, reason: str) -> None:
    """Refused with the reason, and left as it was."""
    implementation = base.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=reason):
        BeaconModel(base, BeaconConfig(beacon_window=8, beacon_ratio=(2,)))
    assert base.config._attn_implementation == implementation
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tested_family_is_taken(family: str) -> None:
    base = tiny_base(family, num_hidden_layers=3)
    assert attention_modules(base) == [layer.self_attn for layer in base.model.layers]
    assert isinstance(model_rope(base).inv_freq, torch.Tensor)


class TestSlidingWindow:
    def test_mistral_with_one_is_refused(self) -> None:
        refuse(tiny_base("mistral", sliding_window=16), r"sliding-window attention \(sliding_window=16\) forgets")

    @pytest.mark.parametrize("family", ["qwen2", "qwen3"])
    @pytest.mark.parametrize("full_layers", [0, 1])
    def test_qwen_with_one_in_any_layer_is_refused(self, family: str, full_layers: int) -> None:
        settings = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": full_layers}
        refuse(tiny_base(family, **settings), "sliding-window attention")

    @pytest.mark.parametrize("family", ["qwen2", "qwen3"])
    def test_qwen_that_names_one_but_does_not_use_it_is_taken(self, family: str) -> None:
        unused: dict[str, Any]
        for unused in ({"use_sliding_window": False}, {"use_sliding_window": True, "max_window_layers": 28}):
            assert attention_modules(tiny_base(family, sliding_window=16, **unused))


def test_quantized_weights_are_refused() -> None:
    base = tiny_base("llama")
    base.config.quantization_config = {"quant_method": "bitsandbytes"}
    refuse(base, r"quantized \(bitsandbytes\)")


class TestRope:
    @pytest.mark.parametrize(
        "rope",
        [
            {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            {"rope_type": "longrope", **LONG, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
        ],
        ids=["dynamic", "longrope"],
    )
    def test_one_that_changes_with_the_length_is_refused(self, rope: dict[str, Any]) -> None:
        refuse(tiny_base("llama", rope_parameters=rope), rf"{rope['rope_type']}.*changes with the sequence length")

    def test_one_that_turns_a_part_of_each_head_is_refused(self) -> None:
        base = tiny_base("llama")
        base.model.rotary_emb.inv_freq = base.model.rotary_emb.inv_freq[:2]
        refuse(base, "4 of 8 dimensions")


SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class TestOtherModels:
    @pytest.mark.parametrize(
        ("config", "name"),
        [
            (GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2), "gpt2"),
            (
                Gemma2Config(**SMALL, head_dim=8),
                "gemma2",
            ),
            (
                Qwen3NextConfig(**SMALL, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8),
                "qwen3_next",
            ),
        ],
        ids=["unknown shape", "softcaps", "linear attention"],
    )
    def test_an_architecture_that_was_not_verified_is_refused(self, config: Any, name: str) -> None:
        base: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        refuse(base, rf"'{name}' is not supported.*llama, mistral, qwen2, qwen3")

    def test_a_tested_family_with_linear_attention_layers_is_refused(self) -> None:
        base = tiny_base("qwen2")
        base.config.layer_types = ["full_attention", "linear_attention"]
        refuse(base, "linear_attention.*no keys and values per token")


class TestMaxPositions:
    @pytest.mark.parametrize(
        ("settings", "positions"),
        [
            ({"max_position_embeddings": 2048}, 2048),
            ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, 2048),
            ({"rope_parameters": {"rope_type": "yarn", **LONG}, "max_position_embeddings": 128}, 512),
            (
                {"rope_parameters": {"rope_type": "llama3", **LONG, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
                512,
            ),
            ({"rope_parameters": {"rope_type": "yarn", **LONG}, "max_position_embeddings": 512}, 512),
            ({"rope_parameters": {"rope_type": "yarn", **LONG}, "max_position_embeddings": 1024}, 1024),
        ],
    )
    def test_scaled_positions_are_counted_once(self, settings: dict[str, Any], positions: int) -> None:
        assert max_positions(tiny_base("llama", **settings).config) == positions
