"""The base models that can carry beacons, and the reasons why others cannot."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from beacon_memory.errors import UnsupportedModelError
from beacon_memory.kv.rope import Rope

__all__ = ["attention_modules", "max_positions", "model_rope", "require_supported"]

# Families whose numbers are tested. Others may look alike and differ in a detail (interleaved rotation, layers without
# rotation, softcaps) that would make every stored key silently wrong.
TESTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# RoPE whose frequencies do not depend on how long the sequence is.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the attention module of each layer; raises UnsupportedModelError, with the reason, for other models."""
    require_supported(model.config)
    return [layer.self_attn for layer in model.model.layers]


def require_supported(config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError, with the reason, for the configuration of a model that cannot carry beacons."""
    if config.model_type not in TESTED_FAMILIES:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} is not supported: its attention has not been verified to give the same "
            f"numbers when keys are kept before RoPE; supported are {', '.join(TESTED_FAMILIES)}"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"layers of type {sorted(kinds - {'full_attention', 'sliding_attention'})} keep no keys and values per "
            "token, so there is nothing that beacons could hold"
        )
    if "sliding_attention" in kinds or (config.model_type == "mistral" and window is not None):
        raise UnsupportedModelError(
            f"sliding-window attention (sliding_window={window}) forgets the memory in front of a prompt; "
            "only models with full attention in every layer are supported"
        )
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"the model's weights are quantized ({method}), which beacons are not made for; take the checkpoint that "
            "they were made from, or a GGUF file, whose weights are dequantized when they are loaded"
        )


def model_rope(model: PreTrainedModel) -> Rope:
    """Return the model's RoPE; raises UnsupportedModelError if it depends on the length of the sequence."""
    rotary = model.model.rotary_emb
    if rotary.rope_type not in FIXED_ROPE:
        raise UnsupportedModelError(
            f"RoPE of type {rotary.rope_type!r} changes with the sequence length, so stored keys could not be given "
            f"positions later; supported are {', '.join(FIXED_ROPE)}"
        )
    head_dim: int = model.model.layers[0].self_attn.head_dim
    if 2 * rotary.inv_freq.numel() != head_dim:
        raise UnsupportedModelError(
            f"RoPE covers {2 * rotary.inv_freq.numel()} of {head_dim} dimensions of a head; partial rotation is not "
            "supported"
        )
    return Rope(rotary.inv_freq.float(), float(rotary.attention_scaling))


def max_positions(config: PretrainedConfig) -> int:
    """Return how many positions the model can tell apart, RoPE scaling included."""
    positions: int = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    factor = float(rope.get("factor") or 1.0)
    original = rope.get("original_max_position_embeddings")
    if original is None:
        return int(positions * factor)
    return max(positions, int(original * factor))
