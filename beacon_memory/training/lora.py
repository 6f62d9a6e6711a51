"""The LoRAs that are trained: one of the base together with the beacons, by PEFT's layers, or that of answers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from beacon_memory.errors import ConfigError
from beacon_memory.modeling.answering import answering_layers
from beacon_memory.modeling.lora import LORA_PREFIX, LORA_WEIGHTS
from beacon_memory.modeling.model import BeaconModel

from .recipe import LoraRecipe

__all__ = ["answering_parameters", "inject_answers", "inject_lora", "lora_parameters", "write_answers", "write_lora"]


def inject_lora(model: BeaconModel, recipe: LoraRecipe, start: Path | None) -> None:
    """Put LoRA layers into the base, with the weights of the LoRA in the folder `start`, or without effect at first.

    Where beacons have a projection of their own, only the projection of the raw rows gets a LoRA. Raises ConfigError
    for layers that the base does not have, and if the LoRA in `start` has another shape than the recipe's.
    """
    if start is not None:
        _require_shape(start, recipe)
    _require_layers(recipe, (name for name, _ in model.base.named_modules()))
    own = {f"{letter}_proj" for letter in model.config.beacon_param}
    targets = [f"{target}.base" if target in own else target for target in recipe.targets]
    inject_adapter_in_model(LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=targets), model.base)
    if start is not None:
        weights = load_file(start / LORA_WEIGHTS)
        renamed = {_with_beacons(name.removeprefix(LORA_PREFIX), own): weights[name] for name in weights}
        loaded: Any = set_peft_model_state_dict(model.base, renamed)
        if loaded.unexpected_keys:
            raise ConfigError(f"the LoRA in {start} does not fit the base model: it has {loaded.unexpected_keys[0]!r}")


def inject_answers(model: BeaconModel, recipe: LoraRecipe, start: Path | None) -> None:
    """Put a LoRA of answers into the base, without effect at first, unless the model has that of the folder `start`.

    Raises ConfigError for layers that the base does not have, and if `start` has another shape than the recipe's.
    """
    if start is not None:
        _require_shape(start, recipe)
        return
    stock = model.base
    layers = {
        name.removesuffix(".base"): layer
        for name, layer in stock.named_modules()
        if isinstance(layer, nn.Linear) and ".beacon" not in name
    }
    _require_layers(recipe, layers)
    factors = {}
    for name, layer in layers.items():
        if name.rpartition(".")[2] in recipe.targets:
            down = torch.empty(recipe.rank, layer.in_features)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # as PEFT does
            factors[name] = (down, torch.zeros(layer.out_features, recipe.rank))
    model.install_answering(factors, recipe.alpha / recipe.rank)


def lora_parameters(base: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of the LoRA layers in `base`, if there are any."""
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            yield name, parameter


def answering_parameters(base: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of the LoRA of answers, if there is one."""
    for name, layer in answering_layers(base):
        yield f"{name}.down", layer.down
        yield f"{name}.up", layer.up


def write_lora(model: BeaconModel, recipe: LoraRecipe, folder: Path) -> None:
    """Write the LoRA to a folder in PEFT's own form, in the dtype of the base, for the base without beacons."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        LORA_PREFIX + name.replace("_proj.base.", "_proj."): tensor.detach().to(model.dtype).cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model.base).items()
    }
    _write(weights, recipe, folder)


def write_answers(model: BeaconModel, recipe: LoraRecipe, folder: Path) -> None:
    """Write the LoRA of answers to a folder in PEFT's own form, in the dtype of the base."""
    folder.mkdir(parents=True, exist_ok=True)
    factors = {
        f"{LORA_PREFIX}{name}.lora_{letter}.weight": factor.detach().to(model.dtype).cpu().contiguous()
        for name, layer in answering_layers(model.base)
        for letter, factor in (("A", layer.down), ("B", layer.up))
    }
    _write(factors, recipe, folder)


def _write(weights: Mapping[str, Tensor], recipe: LoraRecipe, folder: Path) -> None:
    save_file(dict(weights), folder / LORA_WEIGHTS, metadata={"format": "pt"})
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.targets), task_type="CAUSAL_LM"
    )
    config.save_pretrained(str(folder))


def _require_layers(recipe: LoraRecipe, names: Iterable[str]) -> None:
    layers = {name.rpartition(".")[2] for name in names}
    absent = [target for target in recipe.targets if target not in layers]
    if absent:
        raise ConfigError(f"[lora] targets names {absent[0]!r}, but the base model has no layer of that name")


def _require_shape(start: Path, recipe: LoraRecipe) -> None:
    found: Any = PeftConfig.from_pretrained(str(start))
    shape = (found.r, found.lora_alpha, set(found.target_modules or ()))
    if shape != (recipe.rank, recipe.alpha, set(recipe.targets)):
        raise ConfigError(
            f"the adapter to start from has a LoRA of rank {found.r}, alpha {found.lora_alpha} on "
            f"{sorted(found.target_modules or ())}; give the recipe the same values"
        )
    if found.use_rslora or found.use_dora:
        raise ConfigError(f"the LoRA in {start} is no plain LoRA (use_rslora or use_dora), which training needs")


def _with_beacons(name: str, own: set[str]) -> str:
    """Return the name that a parameter has in a base that carries beacons."""
    module, dot, rest = name.partition("_proj.")
    return f"{module}_proj.base.{rest}" if f"{module.rpartition('.')[2]}_proj" in own else module + dot + rest
