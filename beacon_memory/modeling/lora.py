"""A LoRA of the base, merged into its weights when a model is loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from beacon_memory.errors import AdapterError
from beacon_memory.kv.fingerprint import digest_tensors

__all__ = ["LORA_PREFIX", "LORA_WEIGHTS", "lora_digest", "merge_lora"]

LORA_WEIGHTS = "adapter_model.safetensors"
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
        settings = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
        changes = _plain_changes(base, settings, load_file(lora / LORA_WEIGHTS))
        if changes is None:
            return _merge_by_peft(base, lora)
    except Exception as error:  # of peft, torch or safetensors, depending on what is wrong with it
        raise AdapterError(f"the LoRA in {lora} does not fit the base model: {error}") from error
    scaling = settings["lora_alpha"] / settings["r"]
    with torch.no_grad():
        for layer, down, up in changes:
            weight = layer.weight
            change = (up.to(weight.device) @ down.to(weight.device)) * scaling
            # a new tensor: the weight may be a map of the checkpoint, which is copied page by page when written to
            weight.data = (weight + change).to(weight.dtype)
    return base


def _plain_changes(
    base: PreTrainedModel, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[tuple[nn.Linear, Tensor, Tensor]] | None:
    """Return the layers that a plain LoRA changes, each with the two factors of its change, in float32 at least.

    None for a LoRA of another kind, or one that does not fit.
    """
    said = {name: value for name, value in settings.items() if value and name not in _NO_MATTER}
    rank, alpha, targets = (said.pop(name, None) for name in ("r", "lora_alpha", "target_modules"))
    if said != _PLAIN or not isinstance(alpha, int | float) or not isinstance(targets, list):
        return None
    layers = {f"{LORA_PREFIX}{name}": module for name, module in base.named_modules()}
    changes = []
    for name in {name.rpartition(".lora_")[0] for name in tensors}:
        layer, down, up = layers.get(name), tensors.get(f"{name}.lora_A.weight"), tensors.get(f"{name}.lora_B.weight")
        if type(layer) is not nn.Linear or down is None or up is None or name.rpartition(".")[2] not in targets:
            return None
        if (*up.shape, *down.shape) != (layer.out_features, rank, rank, layer.in_features):
            return None
        changes.append((layer, _wide(down), _wide(up)))
    return changes if changes and 2 * len(changes) == len(tensors) else None


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
