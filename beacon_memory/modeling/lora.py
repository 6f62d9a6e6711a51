"""LoRAs of the base: one is merged into its weights when a model is loaded, another may be kept apart for answers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from beacon_memory.errors import AdapterError
from beacon_memory.kv.fingerprint import digest_tensors

__all__ = ["LORA_PREFIX", "LORA_WEIGHTS", "lora_digest", "lora_factors", "merge_lora"]

LORA_WEIGHTS = "adapter_model.safetensors"
Factors = dict[str, tuple[Tensor, Tensor]]  # `down` and `up` by the name of a layer
LORA_PREFIX = "base_model.model."  # PEFT's files put this before a model's own names
# What PEFT's settings may say of a plain LoRA. Anything else that is set makes it another kind, which is left to PEFT.
_PLAIN = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}
_NO_MATTER = (
    *("peft_version", "base_model_name_or_path", "revision", "auto_mapping", "task_type"),
    *("inference_mode", "lora_dropout", "megatron_core", "qalora_group_size"),
)


def merge_lora(base: PreTrainedModel, lora: Path) -> PreTrainedModel:
    """Merge a PEFT LoRA into the weights of the base and return it, still a stock model.

    A plain one is merged here, with the same result as by PEFT, which takes several times as long to be imported and to
    build its layers. Raises AdapterError for a LoRA that does not fit the base, which is left without any.
    """
    try:
        plain = _plain_factors(base, lora)
        if plain is None:
            return _merge_by_peft(base, lora)
    except Exception as error:  # of peft, torch or safetensors, depending on what is wrong with it
        raise AdapterError(f"the LoRA in {lora} does not fit the base model: {error}") from error
    factors, scaling = plain
    with torch.no_grad():
        for name, (down, up) in factors.items():
            layer: Any = base.get_submodule(name)
            weight: Tensor = layer.weight
            change = (up.to(weight.device) @ down.to(weight.device)) * scaling
            # a new tensor: the weight may be a map of the checkpoint, which is copied page by page when written to
            weight.data = (weight + change).to(weight.dtype)
    return base


def lora_factors(base: PreTrainedModel, lora: Path) -> tuple[Factors, float]:
    """Read a plain PEFT LoRA of a stock model that is to be kept apart from its weights.

    Returns by the name of each layer that it changes the factors `down` [rank, in_features] and `up` [out_features,
    rank], and what their product is multiplied by. Raises AdapterError if it does not fit the base, or is not plain.
    """
    try:
        plain = _plain_factors(base, lora)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"the LoRA of answers in {lora} cannot be read: {error}") from error
    if plain is None:
        raise AdapterError(f"the LoRA of answers in {lora} does not fit the base model, or is no plain LoRA")
    return plain


def _plain_factors(base: PreTrainedModel, lora: Path) -> tuple[Factors, float] | None:
    """Return the factors of a plain LoRA in float32 at least, and its scaling.

    None for a LoRA of another kind, or one that does not fit.
    """
    settings: Mapping[str, Any] = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(lora / LORA_WEIGHTS)
    said = {name: value for name, value in settings.items() if value and name not in _NO_MATTER}
    rank, alpha, targets = (said.pop(name, None) for name in ("r", "lora_alpha", "target_modules"))
    if said != _PLAIN or not isinstance(alpha, int | float) or not isinstance(targets, list):
        return None
    layers = dict(base.named_modules())
    factors: Factors = {}
    for key in {key.rpartition(".lora_")[0] for key in tensors}:
        name = key.removeprefix(LORA_PREFIX)
        layer, down, up = layers.get(name), tensors.get(f"{key}.lora_A.weight"), tensors.get(f"{key}.lora_B.weight")
        if type(layer) is not nn.Linear or down is None or up is None or name.rpartition(".")[2] not in targets:
            return None
        if (*up.shape, *down.shape) != (layer.out_features, rank, rank, layer.in_features):
            return None
        factors[name] = (_wide(down), _wide(up))
    return (factors, alpha / rank) if factors and 2 * len(factors) == len(tensors) else None


def _wide(factor: Tensor) -> Tensor:
    return factor.float() if factor.dtype.itemsize < torch.float32.itemsize else factor


def _merge_by_peft(base: PreTrainedModel, lora: Path) -> PreTrainedModel:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name of transformers
            merged: PreTrainedModel = PeftModel.from_pretrained(base, str(lora)).merge_and_unload()
    except BaseException:
        _remove_layers(base)
        raise
    return merged


def _remove_layers(base: PreTrainedModel) -> None:
    """Take out the LoRA layers that PEFT put into the base before it found that their weights do not fit."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(name, module.get_base_layer())
    vars(base).pop("peft_config", None)


def lora_digest(lora: Path | None) -> str:
    """Return a short hash of a LoRA's weights."""
    return digest_tensors(load_file(lora / LORA_WEIGHTS).items() if lora is not None else [])
