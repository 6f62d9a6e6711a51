"""Training data, recipes and models that fit on a screen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_base, tiny_checkpoint, tiny_model, tiny_tokenizer
from torch import Tensor

from beacon_memory.config import BeaconConfig
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.training import DataSource, LoraRecipe, Recipe, Stage
from beacon_memory.training.lora import answering_parameters, inject_answers, inject_lora, write_answers
from beacon_memory.training.samples import Branch, Sample
from beacon_memory.training.start import trained_parameters

TEXTS = [f"In year {year} the mill by the river was sold for {7 * year} pounds to a farmer." for year in range(20, 32)]
LORA = LoraRecipe(rank=4, alpha=8, targets=("q_proj", "o_proj", "up_proj"))


def question_rows() -> list[dict[str, Any]]:
    """Twelve passages of four titles, two questions each."""
    return [
        {
            "title": f"title {number % 4}",
            "context": f"Barn {number} was built by Ada in {1800 + number}.",
            "qa": [
                {"question": f"Who built barn {number}?", "answers": ["Ada"]},
                {"question": "When?", "answers": [str(1800 + number), f"in {1800 + number}"]},
            ],
        }
        for number in range(12)
    ]


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_data(folder: Path) -> Path:
    """A data folder with `text.jsonl` and `qa.jsonl`."""
    write_rows(folder / "text.jsonl", ({"text": text} for text in TEXTS))
    write_rows(folder / "qa.jsonl", question_rows())
    return folder


TEXT = DataSource(path="text.jsonl", kind="text")
QA = DataSource(path="qa.jsonl", kind="qa")


def a_stage(**settings: Any) -> Stage:
    given: dict[str, Any] = {"name": "first", "steps": 4, "data": (TEXT, QA), "tokens": (12, 40), "continuation": 8}
    return Stage(**(given | {"branches": 3, "learning_rate": 1e-2} | settings))


def a_recipe(base: Path | None = None, *stages: Stage, **settings: Any) -> Recipe:
    """A recipe for a tiny model in float32, with windows of 8 tokens."""
    beacon = {"beacon_window": 8, "beacon_ratio": [2, 4]}
    given: dict[str, Any] = {"beacon": beacon, "dtype": "float32", "save_steps": 2, "log_steps": 1}
    return Recipe(**(given | {"base": base and str(base), "stages": stages or (a_stage(),)} | settings))


def a_base(folder: Path, **overrides: Any) -> Path:
    """A checkpoint of a tiny Llama."""
    return tiny_checkpoint(folder, tiny_base("llama", **overrides))


def a_model(lora: LoraRecipe | None = None, **settings: Any) -> BeaconModel:
    """A tiny model whose beacons, and LoRA, are as a training would find them half way."""
    config = BeaconConfig(**({"beacon_window": 8, "beacon_ratio": (2, 4)} | settings))
    model = tiny_model("llama", config, tokenizer=tiny_tokenizer())
    if lora is not None:
        inject_lora(model, lora, None)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in trained_parameters(model):
                if ".lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for _, parameter in trained_parameters(model):
        parameter.requires_grad_(True)
    return model


def with_answers(model: BeaconModel, recipe: LoraRecipe = LORA) -> BeaconModel:
    """Give a model a LoRA of answers that changes a lot."""
    inject_answers(model, recipe, None)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, parameter in answering_parameters(model.base):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def files_with_answers(folder: Path) -> tuple[Path, Path]:
    """A base, and an adapter with a LoRA of answers."""
    model = with_answers(a_model())
    base = tiny_checkpoint(folder / "base", tiny_base("llama"))
    write_answers(model, LORA, folder / "trained")
    model.save_adapter(folder / "adapter", answers=folder / "trained")
    return base, folder / "adapter"


def a_sample(
    parts: Iterable[Iterable[int]], ratios: Iterable[Iterable[int]], *branches: tuple[Iterable[int], int], **more: Any
) -> Sample:
    return Sample(
        kind="qa",
        parts=tuple(map(tuple, parts)),
        ratios=tuple(map(tuple, ratios)),
        branches=tuple(Branch(tuple(ids), labelled) for ids, labelled in branches),
        **more,
    )


def trained(model: BeaconModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained_parameters(model)}
