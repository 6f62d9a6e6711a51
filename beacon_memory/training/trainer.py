"""Training runs. Checkpoints, schedules, several devices and logs are those of transformers' Trainer."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from beacon_memory.errors import ConfigError, InputError
from beacon_memory.modeling.adapter import ANSWERS, LORA
from beacon_memory.modeling.model import BeaconModel

from .card import write_card
from .lora import write_answers, write_lora
from .losses import Losses, TrainingModel
from .recipe import ADAPTER, Recipe, Stage
from .samples import Sample, SampleSet
from .start import start_model, trained_parameters

__all__ = ["train"]

TRAINED = "trained.safetensors"  # trained parameters in float32, in a checkpoint and in the folder of a finished stage
STATE = "trainer_state.json"  # the Trainer's own file, which it writes last in a checkpoint
RECIPE = "recipe.json"  # the settings that the run was started with, in the output folder


def train(recipe: Recipe, recipe_folder: Path, data: Path, output: Path, device: str | None = None) -> Path:
    """Train as a recipe says; returns the folder of the finished adapter, `output/adapter`.

    data:   folder of the data files that the recipe names.
    output: folder for checkpoints, logs and the adapter. If it holds an interrupted run of this recipe, that run
            continues from its last checkpoint, with the same result as without the interruption.

    Raises ConfigError if the folder holds a run of another recipe.
    """
    if _is_main_process():
        _claim(output, recipe)
    adapter = output / ADAPTER
    model = start_model(recipe, recipe_folder, data, device)
    history = {stage.name: _run_stage(model, recipe, stage, data, output / stage.name) for stage in recipe.stages}
    if _is_main_process():
        lora = answers = None
        if recipe.lora is not None:
            lora = adapter / LORA
            write_lora(model, recipe.lora, lora)
        if recipe.answers is not None:
            answers = adapter / ANSWERS
            write_answers(model, recipe.answers, answers)
        model.save_adapter(adapter, lora, answers)
        write_card(adapter, recipe, model.config, history)
    return adapter


def _is_main_process() -> bool:
    """Return whether this is the only process, or the first of those that torchrun or accelerate has started."""
    return os.environ.get("RANK", "0") == "0"


def _claim(output: Path, recipe: Recipe) -> None:
    """Write the recipe to the output folder, or check that the recipe that is there is the same."""
    settings = recipe.to_dict()
    file = output / RECIPE
    if file.exists():
        begun = json.loads(file.read_text(encoding="utf-8"))
        if any(begun.get(key) != settings.get(key) for key in begun.keys() | settings.keys()):
            raise ConfigError(f"{output} holds a run of another recipe (see {file}); choose another folder")
        return
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty and holds no training run; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _run_stage(model: BeaconModel, recipe: Recipe, stage: Stage, data: Path, folder: Path) -> list[dict[str, float]]:
    """Train one stage, from its last checkpoint if there is one; returns the entries of its log."""
    if (folder / TRAINED).exists():
        restore(model, folder / TRAINED)
        history: list[dict[str, float]] = json.loads((folder / STATE).read_text(encoding="utf-8"))["log_history"]
        return history
    arguments = _arguments(model, recipe, stage, folder)
    size = stage.steps * stage.batch_size * stage.accumulate * arguments.world_size
    trainer = _BeaconTrainer(
        model=TrainingModel(model, stage.label_weight, stage.distill_weight, stage.compression),
        args=arguments,
        train_dataset=SampleSet(model, recipe, stage, data, size),
        data_collator=lambda samples: {"samples": samples},
    )
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    trainer.add_callback(_Progress())
    with _checkpointing(model, stage.gradient_checkpointing):
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    trainer.save_state()
    trainer.save_model(str(folder))
    model.eval()
    return trainer.state.log_history


def _arguments(model: BeaconModel, recipe: Recipe, stage: Stage, folder: Path) -> TrainingArguments:
    on_cpu = model.device.type == "cpu"
    if on_cpu and recipe.dtype == "float16":
        raise ConfigError("dtype='float16' cannot be trained in on cpu; take bfloat16 or float32")
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=stage.steps,
            per_device_train_batch_size=stage.batch_size,
            gradient_accumulation_steps=stage.accumulate,
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
            max_grad_norm=stage.max_grad_norm,
            warmup_steps=stage.warmup,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            bf16=recipe.dtype == "bfloat16",
            fp16=recipe.dtype == "float16",
            use_cpu=on_cpu,
            seed=recipe.seed,
            logging_steps=recipe.log_steps,
            save_steps=recipe.save_steps,
            save_total_limit=2,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=True,  # samples that are read uncompressed use no beacons
            report_to=["tensorboard"],
            disable_tqdm=False,
        )
    except ValueError as error:
        raise ConfigError(f"dtype={recipe.dtype!r} cannot be trained in on {model.device}: {error}") from error
    arguments._n_gpu = min(1, arguments.n_gpu)  # one device for each process: torchrun starts one for each of several
    return arguments


@contextmanager
def _checkpointing(model: BeaconModel, wanted: bool) -> Iterator[None]:
    """Switch gradient checkpointing of the base on, if wanted; the Trainer would look for it in the wrapping module."""
    if wanted:
        model.base.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if wanted:
            model.base.activation_checkpointing_disable()


def _last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that is complete, if there is one."""
    for checkpoint in sorted(
        folder.glob("checkpoint-*"), key=lambda one: int(one.name.partition("-")[2]), reverse=True
    ):
        try:
            json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # the run was interrupted while it was written
            continue
        return str(checkpoint)
    return None


@torch.no_grad()
def restore(model: BeaconModel, file: Path) -> None:
    """Set the trained parameters to the values in a checkpoint."""
    saved = load_file(file)
    for name, parameter in trained_parameters(model):
        parameter.copy_(saved[name])


class _BeaconTrainer(Trainer):
    """A Trainer that saves only the trained parameters, and logs the loss for each ratio."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.by_ratio: dict[str, list[float]] = defaultdict(list)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002  # as in the base
    ) -> Tensor | tuple[Tensor, Losses]:
        samples: Sequence[Sample] = inputs["samples"]
        losses: Losses = model(samples)
        for sample, loss in zip(samples, losses.labels.tolist(), strict=True):
            self.by_ratio[_name(sample)].append(loss)
        return (losses.loss, losses) if return_outputs else losses.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        means = {f"loss_{name}": sum(some) / len(some) for name, some in sorted(self.by_ratio.items())}
        self.by_ratio.clear()
        super().log(logs | means, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002  # as in the base
        if not self.args.should_save:  # called in every process
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        parameters = trained_parameters(_beacons(self.model))
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters}
        # written under another name first, because a stage counts as finished once its folder has this file
        save_file(tensors, folder / f"{TRAINED}.tmp", metadata={"format": "pt"})
        (folder / f"{TRAINED}.tmp").replace(folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore(_beacons(model or self.model), Path(resume_from_checkpoint) / TRAINED)


def _beacons(model: Any) -> BeaconModel:
    beacons: BeaconModel = model.model
    return beacons


def _name(sample: Sample) -> str:
    """Return the name under which a sample's loss is logged: `text_x8`; `text` if its windows have several ratios."""
    return sample.kind if sample.ratio is None else f"{sample.kind}_x{sample.ratio}"


class _Progress(ProgressCallback):
    """A progress bar, and lines with the loss for each ratio, on standard error."""

    training_bar: Any

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002  # as in the base
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002  # as in the base
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write the losses above the bar."""
        shown = {k.removeprefix("loss_"): v for k, v in (logs or {}).items() if k.startswith("loss")}
        if shown and state.is_world_process_zero and self.training_bar is not None:
            line = ", ".join(f"{name} {float(value):.2f}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}: {line}", file=sys.stderr)
