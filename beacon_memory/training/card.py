"""The model card of a trained adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from beacon_memory.config import BeaconConfig
from beacon_memory.modeling.adapter import base_name

from .recipe import DataSource, Recipe, Stage

__all__ = ["write_card"]

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the embedded default model is a copy of it

History = Mapping[str, Sequence[Mapping[str, float]]]


def write_card(adapter: Path, recipe: Recipe, config: BeaconConfig, history: History) -> None:
    """Write the model card of an adapter, its README.md.

    config: the settings it was trained with. history: for each stage the entries that the Trainer has logged.
    """
    base = recipe.base or DEFAULT_BASE
    name = base_name(base)
    lines = [
        "---",
        "library_name: beacon_memory",
        f'base_model: "{name}"',
        "---",
        f"# Beacon adapter for {name}",
        "",
        *_how_to_load(recipe, name),
        "## Settings",
        "",
        *_table(("", ""), _settings(recipe, config, name)),
        "## Training",
        "",
        *_table(
            ("stage", "steps", "documents a step", "tokens", "parts", "ratios", "learning rate", "loss", "seconds"),
            (_stage(stage, config, history.get(stage.name, ())) for stage in recipe.stages),
        ),
        "`documents a step` is for each device; `seconds` are those of the run that finished the stage.",
        "",
        *_table(("stage", "data", "kind", "rows", "weight", "share"), _sources(recipe)),
        "## Losses",
        "",
        "Means over the first and the last quarter of the log, in nats per predicted token; `qa_x8` are answers from",
        "documents read at ratio 8, `text_x8` what follows a text read at ratio 8. A training loss is no score:",
        "scores, on data that was not trained on, come from `beacon-memory eval`.",
        "",
        *_table(("stage", "", "first", "last"), _losses(history)),
        "## Versions",
        "",
        *_table(("", ""), ((one, version(one)) for one in ("beacon-memory", "torch", "transformers", "peft"))),
    ]
    (adapter / "README.md").write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


def _how_to_load(recipe: Recipe, base: str) -> list[str]:
    """Return the lines that say what an adapter is, and how it is loaded."""
    argument, option = (f'"{base}", ', f"--model {base} ") if recipe.base else ("", "")
    return [
        "With this adapter the base model compresses a document to the keys and values of *beacon* tokens at every",
        "layer (Activation Beacon, [arXiv 2401.03462](https://arxiv.org/abs/2401.03462)) and answers from them later",
        "without reading the document again. It is for the package `beacon-memory`:",
        "",
        "```python",
        "from beacon_memory import BeaconModel",
        "",
        f'model = BeaconModel.from_pretrained({argument}adapter="path/to/this/folder")',
        "```",
        "",
        "```bash",
        f'beacon-memory ask "..." {option}--adapter path/to/this/folder',
        "```",
        "",
    ]


def _settings(recipe: Recipe, config: BeaconConfig, base: str) -> Iterator[tuple[object, ...]]:
    yield "base", f"{base}, frozen, in {recipe.dtype}"
    yield (
        "started from",
        {None: "untrained beacons", "default": "the shipped adapter"}.get(recipe.adapter, "an adapter"),
    )
    for key, value in config.to_dict().items():
        yield f"`{key}`", ", ".join(map(str, value)) if isinstance(value, list) else value
    if recipe.salience is not None:
        sources = ", ".join(" ".join((one.path, *_conditions(one))) for one in recipe.salience.data)
        yield "salience", f"of {sources}; weight of being part of an answer: {recipe.salience.answer_weight:g}"
    for name, lora in (("lora", recipe.lora), ("lora of answers, trained alone", recipe.answers)):
        if lora is not None:
            yield name, f"LoRA, rank {lora.rank}, alpha {lora.alpha}, {', '.join(lora.targets)}"
        elif name == "lora":
            yield name, "none" if recipe.answers is None else "as it was"
    yield "seed", recipe.seed


def _stage(stage: Stage, config: BeaconConfig, log: Sequence[Mapping[str, float]]) -> tuple[object, ...]:
    ratios = _counted(stage.ratios or config.beacon_ratio)
    kinds = {"labels": stage.label_weight, "distillation": stage.distill_weight}
    return (
        stage.name,
        stage.steps,
        stage.batch_size * stage.accumulate,
        f"{stage.tokens[0]} to {stage.tokens[1]}",
        _counted(stage.parts),
        f"{ratios}, drawn for {_drawn_for(stage)}",
        f"{stage.learning_rate:g}",
        ", ".join(f"{weight:g} {kind}" for kind, weight in kinds.items() if weight),
        f"{sum(entry.get('train_runtime', 0) for entry in log):,.0f}",
    )


def _drawn_for(stage: Stage) -> str:
    """Return what has a ratio of its own."""
    if stage.compression != "select":
        return f"each {stage.ratio_per}"
    return f"two groups of questions, and for each of the {stage.zoomed:.0%} that see passages"


def _counted(values: Sequence[int]) -> str:
    """Write values with the number of times that each occurs: 1, 1, 2 becomes `1 (2x), 2`."""
    counts = {value: values.count(value) for value in values}
    return ", ".join(f"{value} ({count}x)" if count > 1 else str(value) for value, count in counts.items())


def _sources(recipe: Recipe) -> Iterator[tuple[object, ...]]:
    for stage in recipe.stages:
        weights = sum(source.weight for source in stage.data)
        for source in stage.data:
            rows = ", ".join(_conditions(source)) or "all"
            share = f"{source.weight / weights:.1%}"
            yield stage.name, source.path, source.kind, rows, f"{source.weight:g}", share


def _conditions(source: DataSource) -> list[str]:
    return [f"{key}={value}" for key, value in source.where.items()]


def _losses(history: History) -> Iterator[tuple[object, ...]]:
    for stage, log in history.items():
        found: dict[str, list[float]] = {}
        for entry in log:
            for key, value in entry.items():
                if key == "loss" or key.startswith("loss_"):
                    found.setdefault(key.removeprefix("loss_"), []).append(value)
        for name in sorted(found, key=_by_ratio):
            losses = found[name]
            some = max(1, len(losses) // 4)
            first, last = sum(losses[:some]) / some, sum(losses[-some:]) / some
            yield stage, "all" if name == "loss" else name, f"{first:.3f}", f"{last:.3f}"


def _by_ratio(name: str) -> tuple[bool, str, int]:
    """Return a sort key: the loss of all samples first, then kind by kind, ratios as numbers (16 after 2)."""
    kind, _, ratio = name.partition("_x")
    return name != "loss", kind, int(ratio or -1)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a markdown table, and an empty line after it."""
    body = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body, ""]
