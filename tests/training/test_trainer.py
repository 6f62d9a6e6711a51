from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import some_ids, tiny_base
from torch import Tensor
from training_samples import LORA, QA, TEXT, a_base, a_recipe, a_stage, write_rows

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.errors import AdapterError, ConfigError, InputError
from beacon_memory.modeling.answering import answering_layers
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.training import LoraRecipe, Recipe, Stage, read_recipe, trainer
from beacon_memory.training.losses import TrainingModel
from beacon_memory.training.start import trained_parameters
from beacon_memory.training.trainer import train

PAPER = {
    "beacon_window": 8,
    "beacon_ratio": [2, 4],
    "beacon_attn": "full-coverage",
    "beacon_embed": "learned",
    "beacon_sink_size": 0,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return a_base(tmp_path / "base")


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[BeaconModel]:
    """The models that runs end with, in memory."""
    models: list[BeaconModel] = []
    start = trainer.start_model

    def start_model(*given: Any) -> BeaconModel:
        models.append(start(*given))
        return models[-1]

    monkeypatch.setattr(trainer, "start_model", start_model)
    return models


def run(recipe: Recipe, data: Path, output: Path) -> Path:
    return train(recipe, data.parent, data, output, "cpu")


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def interrupted(recipe: Recipe, data: Path, output: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Run until Ctrl-C comes in the pass behind the first `after`."""
    forward, calls = TrainingModel.forward, iter(range(after + 1))

    def until(self: TrainingModel, samples: Any) -> Any:
        return interrupt() if next(calls) == after else forward(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModel, "forward", until)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, data, output)


def tensors(adapter: Path) -> dict[str, Tensor]:
    return {
        f"{file.relative_to(adapter)} {name}": tensor
        for file in sorted(adapter.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_adapter(ours: Path, theirs: Path) -> None:
    assert tensors(ours).keys() == tensors(theirs).keys()
    for name, tensor in tensors(theirs).items():
        torch.testing.assert_close(tensors(ours)[name], tensor, atol=1e-6, rtol=0, msg=name)


def losses(output: Path, stage: str = "first") -> list[float]:
    log = json.loads((output / stage / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


class TestRun:
    @pytest.mark.parametrize("settings", [{}, PAPER, {"beacon_placement": "salient-words"}], ids=str)
    @pytest.mark.parametrize("lora", [None, LORA], ids=["no LoRA", "lora"])
    def test_the_adapter_is_the_model_that_was_trained(
        self, settings: dict[str, Any], lora: LoraRecipe | None, base: Path, data: Path, left: list[BeaconModel]
    ) -> None:
        beacon = {"beacon_window": 8, "beacon_ratio": [2, 4], **settings}
        adapter = run(a_recipe(base, beacon=beacon, lora=lora), data, data.parent / "run")
        (ours,), loaded = left, BeaconModel.from_pretrained(base, adapter, device="cpu")
        assert adapter == data.parent / "run" / "adapter"
        assert loaded.config == ours.config
        assert (adapter / "reader").exists() == (lora is not None)
        ids = torch.tensor([some_ids(29)])
        with torch.no_grad():
            logits = [model(ids, ratios=[iter([2, 4, 2])]).logits for model in (ours, loaded)]
            untrained = BeaconModel.from_pretrained(base, config=ours.config, device="cpu") if not settings else None
        torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
        if untrained is not None:
            with torch.no_grad():
                assert not torch.allclose(untrained(ids, ratios=[iter([2, 4, 2])]).logits, logits[0], atol=1e-2)

    def test_the_base_is_not_trained(self, base: Path, data: Path, left: list[BeaconModel]) -> None:
        run(a_recipe(base, lora=LORA), data, data.parent / "run")
        trained = {id(parameter) for _, parameter in trained_parameters(left[0])}
        stock = dict(tiny_base("llama").named_parameters())
        names = [(name, p) for name, p in left[0].base.named_parameters() if id(p) not in trained]
        assert len(names) == len(stock)
        for name, parameter in names:
            assert torch.equal(parameter, stock[name.replace(".base_layer", "").replace("_proj.base.", "_proj.")]), name

    def test_the_loss_falls(self, base: Path, data: Path) -> None:
        write_rows(data / "qa.jsonl", [{"context": "The key is red.", "question": "Key?", "answers": ["red"]}])
        recipe = a_recipe(base, a_stage(data=(QA,), steps=25, learning_rate=2e-2, ratios=(2,)), lora=LORA)
        run(recipe, data, data.parent / "run")
        logged = losses(data.parent / "run")
        assert logged[-1] < 0.2 * logged[0]

    def test_losses_are_logged_by_kind_and_ratio_for_tensorboard_too(self, base: Path, data: Path) -> None:
        stage = a_stage(steps=12, ratios=(2, 0), ratio_per="document", batch_size=2)
        run(a_recipe(base, stage), data, data.parent / "run")
        log = json.loads((data.parent / "run/first/trainer_state.json").read_text())["log_history"]
        named = {key for entry in log for key in entry if key.startswith("loss_")}
        assert named == {"loss_text_x2", "loss_text_x0", "loss_qa_x2", "loss_qa_x0"}
        assert list((data.parent / "run").rglob("events.out.tfevents*"))

    def test_the_loss_of_a_step_is_the_mean_over_its_passes(self, base: Path, data: Path) -> None:
        stage = a_stage(data=(TEXT,), ratios=(2,), accumulate=3, label_weight=2)
        run(a_recipe(base, stage), data, data.parent / "run")
        log = json.loads((data.parent / "run/first/trainer_state.json").read_text())["log_history"]
        for entry in log[:-1]:
            assert entry["loss"] == pytest.approx(2 * entry["loss_text_x2"], rel=1e-3)

    def test_several_ratios_in_one_document_are_logged_without_one(self, base: Path, data: Path) -> None:
        run(a_recipe(base, a_stage(steps=2, data=(TEXT,), tokens=(60, 60))), data, data.parent / "run")
        log = json.loads((data.parent / "run/first/trainer_state.json").read_text())["log_history"]
        assert "loss_text" in log[0]

    def test_stages_go_on_from_each_other(self, base: Path, data: Path) -> None:
        still = a_stage(name="second", steps=1, learning_rate=1e-30)
        one = run(a_recipe(base, a_stage()), data, data.parent / "one")
        two = run(a_recipe(base, a_stage(), still), data, data.parent / "two")
        assert_same_adapter(two, one)

    def test_all_text_can_be_labelled_and_the_full_reading_distilled(self, base: Path, data: Path) -> None:
        stages = (
            a_stage(data=(TEXT,), label_text=True, continuation=0),
            a_stage(name="second", label_weight=0, distill_weight=1, accumulate=2, parts=(1, 2)),
        )
        run(a_recipe(base, *stages, beacon=PAPER), data, data.parent / "run")
        assert all(0 < loss < 20 for stage in ("first", "second") for loss in losses(data.parent / "run", stage))

    def test_the_paper_s_recipe_runs(self, base: Path, data: Path) -> None:
        recipe, _ = read_recipe("paper")
        stages = [replace(one, steps=2, tokens=(12, 40), accumulate=1, learning_rate=1e-2) for one in recipe.stages]
        beacon = {**recipe.beacon, "beacon_window": 8}
        (data / "qa.jsonl").rename(data / "tasks.jsonl")
        tiny = replace(recipe, stages=tuple(stages), beacon=beacon, base=str(base), dtype="float32")
        model = BeaconModel.from_pretrained(base, run(tiny, data, data.parent / "run"), device="cpu")
        assert (model.config.beacon_attn, model.config.beacon_embed) == ("full-coverage", "learned")

    def test_checkpointing_gradients_changes_nothing(self, base: Path, data: Path, left: list[BeaconModel]) -> None:
        adapters = [
            run(
                a_recipe(base, a_stage(gradient_checkpointing=wanted), lora=LORA),
                data,
                data.parent / f"run {wanted}",
            )
            for wanted in (False, True)
        ]
        assert_same_adapter(*adapters)
        assert not left[1].base.is_activation_checkpointing

    def test_gradients_are_checkpointed_where_that_is_wanted(
        self, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[bool] = []
        forward = TrainingModel.forward

        def noted(self: TrainingModel, samples: Any) -> Any:
            seen.append(self.model.base.is_activation_checkpointing)
            return forward(self, samples)

        monkeypatch.setattr(TrainingModel, "forward", noted)
        second = a_stage(name="second", steps=1)
        run(a_recipe(base, a_stage(steps=1, gradient_checkpointing=True), second), data, data.parent / "run")
        assert seen == [True, False]

    def test_in_bfloat16_what_is_trained_stays_in_float32_until_it_is_saved(
        self, base: Path, data: Path, left: list[BeaconModel]
    ) -> None:
        adapter = run(a_recipe(base, dtype="bfloat16", lora=LORA), data, data.parent / "run")
        assert {p.dtype for _, p in trained_parameters(left[0])} == {torch.float32}
        assert {tensor.dtype for tensor in load_file(data.parent / "run/first/trained.safetensors").values()} == {
            torch.float32
        }
        assert {tensor.dtype for tensor in tensors(adapter).values()} == {torch.bfloat16}


class TestInterruption:
    @pytest.mark.parametrize("after", [0, 2, 7, 11])
    def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted(
        self, after: int, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stages = (a_stage(steps=3, accumulate=2), a_stage(name="second", steps=3, accumulate=2, ratios=(2, 4, 0)))
        recipe = a_recipe(base, *stages, lora=LORA)
        whole = run(recipe, data, data.parent / "whole")
        interrupted(recipe, data, data.parent / "parts", monkeypatch, after)
        assert not (data.parent / "parts/adapter").exists()
        resumed = run(recipe, data, data.parent / "parts")
        assert_same_adapter(resumed, whole)
        for stage in ("first", "second"):
            assert losses(data.parent / "parts", stage) == losses(data.parent / "whole", stage)

    def test_a_checkpoint_that_was_being_written_is_passed_over(
        self, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = a_recipe(base, a_stage(steps=6))
        whole = run(recipe, data, data.parent / "whole")
        for number, content in enumerate((None, "", '{"global_step": ')):
            output = data.parent / f"parts {number}"
            interrupted(recipe, data, output, monkeypatch, after=5)
            state = output / "first/checkpoint-4/trainer_state.json"
            state.unlink() if content is None else state.write_text(content)
            assert_same_adapter(run(recipe, data, output), whole)

    @pytest.mark.parametrize("name", ["save_file", "_BeaconTrainer.save_state", "write_lora", "write_card"])
    def test_a_run_interrupted_while_it_writes_is_finished_by_the_next(
        self, name: str, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = a_recipe(base, lora=LORA)
        whole = run(recipe, data, data.parent / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(f"{trainer.__name__}.{name}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(recipe, data, data.parent / "parts")
        adapter = run(recipe, data, data.parent / "parts")
        assert_same_adapter(adapter, whole)
        assert (adapter / "README.md").exists()

    def test_a_finished_run_is_not_run_again(self, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        recipe = a_recipe(base, lora=LORA)
        adapter = run(recipe, data, data.parent / "run")
        before = {file.relative_to(adapter): file.read_bytes() for file in adapter.rglob("*") if file.is_file()}
        monkeypatch.setattr(TrainingModel, "forward", interrupt)
        again = run(recipe, data, data.parent / "run")
        assert {file.relative_to(again): file.read_bytes() for file in again.rglob("*") if file.is_file()} == before

    def test_the_folder_of_another_recipe_is_refused(self, base: Path, data: Path) -> None:
        run(a_recipe(base), data, data.parent / "run")
        with pytest.raises(ConfigError, match=r"run holds a run of another recipe \(see .*recipe\.json\)"):
            run(a_recipe(base, a_stage(steps=5)), data, data.parent / "run")

    def test_a_setting_that_came_later_and_is_left_out_is_no_other_recipe(self, base: Path, data: Path) -> None:
        recipe = a_recipe(base)
        run(recipe, data, data.parent / "run")
        file = data.parent / "run/recipe.json"
        begun = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in begun.items() if value is not None}))
        run(recipe, data, data.parent / "run")

    def test_a_folder_of_something_else_is_refused(self, base: Path, data: Path) -> None:
        with pytest.raises(InputError, match="data is not empty and holds no training run"):
            run(a_recipe(base), data, data)


class TestStart:
    def test_an_adapter_and_its_lora_are_trained_on(self, base: Path, data: Path) -> None:
        first = run(a_recipe(base, lora=LORA), data, data.parent / "run")
        still = a_stage(steps=1, learning_rate=1e-30)
        second = run(a_recipe(base, still, adapter="run/adapter", lora=LORA), data, data.parent / "again")
        assert_same_adapter(second, first)

    def test_a_lora_of_another_shape_or_left_out_is_refused(self, base: Path, data: Path) -> None:
        run(a_recipe(base, lora=LORA), data, data.parent / "run")
        with pytest.raises(ConfigError, match=r"a LoRA of rank 4, alpha 8 on \['o_proj', 'q_proj', 'up_proj'\]"):
            run(a_recipe(base, adapter="run/adapter", lora=LoraRecipe(rank=8, alpha=8)), data, data.parent / "a")
        with pytest.raises(ConfigError, match=r"'run/adapter' has a LoRA, so the recipe needs a \[lora\]"):
            run(a_recipe(base, adapter="run/adapter"), data, data.parent / "b")

    def test_an_adapter_that_is_not_there_is_named(self, base: Path, data: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(AdapterError, match="absent"):
            run(a_recipe(base, adapter="absent"), data, data.parent / "run")

    def test_a_lora_of_layers_that_the_base_lacks_is_refused(self, base: Path, data: Path) -> None:
        with pytest.raises(ConfigError, match=r"\[lora\] targets names 'c_proj', but the base model has no layer"):
            run(a_recipe(base, lora=LoraRecipe(targets=("q_proj", "c_proj"))), data, data.parent / "run")

    def test_the_seed_decides_how_a_lora_begins(self, base: Path, data: Path) -> None:
        still = a_stage(steps=1, learning_rate=1e-30)
        made = []
        for number, seed in enumerate((0, 0, 1)):
            torch.manual_seed(number)
            made.append(tensors(run(a_recipe(base, still, lora=LORA, seed=seed), data, data.parent / str(number))))
        name = next(name for name in made[0] if "lora_A" in name)
        assert torch.equal(made[0][name], made[1][name])
        assert not torch.equal(made[0][name], made[2][name])

    def test_salience_is_that_of_the_data(self, base: Path, data: Path, left: list[BeaconModel]) -> None:
        beacon = {"beacon_window": 8, "beacon_ratio": [2, 4], "beacon_placement": "salient-words"}
        adapter = run(a_recipe(base, beacon=beacon), data, data.parent / "run")
        ids = left[0].tokenizer("ze Q7.", add_special_tokens=False)["input_ids"]
        salience, starts = (
            load_file(adapter / "beacon.safetensors")[f"token_{of}"] for of in ("salience", "starts_word")
        )
        assert starts[ids].tolist() == [False, False, True, False, False, True]
        assert salience[ids[0]] > salience[ids[1]] > 0  # there is no z in the data, and many an e

    def test_float16_needs_an_accelerator(self, base: Path, data: Path) -> None:
        with pytest.raises(ConfigError, match="dtype='float16' cannot be trained in on cpu"):
            run(a_recipe(base, dtype="float16"), data, data.parent / "run")


def test_documents_can_be_compressed_with_what_was_trained(base: Path, data: Path) -> None:
    adapter = run(a_recipe(base, lora=LORA), data, data.parent / "run")
    model = BeaconModel.from_pretrained(base, adapter, device="cpu")
    document = BeaconCompressor(model).compress_one(Work(some_ids(20), [2, 4, 2]))
    assert document.kv.slots == 4 + 2 + 2


def test_beacons_can_be_trained_beside_chosen_tokens(base: Path, data: Path, tmp_path: Path) -> None:
    stage = a_stage(compression="hybrid", tokens=(4, 8), ratios=(2,))
    settings = {"beacon_window": 8, "beacon_ratio": [2, 4], "beacon_compression": "hybrid"}
    adapter = run(a_recipe(base, stage, beacon=settings), data, tmp_path / "run")
    model = BeaconModel.from_pretrained(base, adapter, device="cpu")
    assert model.compression == "hybrid"
    start = dict(BeaconModel.from_pretrained(base, device="cpu").named_beacon_parameters())
    assert any(not torch.equal(parameter, start[name]) for name, parameter in model.named_beacon_parameters())


class TestAnswers:
    """Recipes with `[answers]`: their LoRA is trained alone."""

    def stage(self, **settings: Any) -> Stage:
        return a_stage(compression="select", ratios=(0, 2, 4), zoomed=0.5, **settings)

    def test_it_is_all_that_changes(self, base: Path, data: Path, left: list[BeaconModel]) -> None:
        run(a_recipe(base), data, data.parent / "beacons")
        before = data.parent / "beacons" / "adapter"
        recipe = a_recipe(base, self.stage(), adapter=str(before), beacon={}, answers=LORA)
        adapter = run(recipe, data, data.parent / "run")
        ours, start = (BeaconModel.from_pretrained(base, one, device="cpu") for one in (adapter, before))
        assert ours.fingerprint == start.fingerprint
        trained = [(layer.down, layer.up) for _, layer in answering_layers(ours.base)]
        assert len(trained) == len(LORA.targets) * len(ours.base.model.layers)
        assert all(up.any() for _, up in trained)
        for one, (_, layer) in zip(trained, answering_layers(left[-1].base), strict=True):
            torch.testing.assert_close(one, (layer.down, layer.up), atol=1e-6, rtol=0)

    def test_the_loss_falls(self, base: Path, data: Path) -> None:
        write_rows(data / "qa.jsonl", [{"context": "The key is red.", "question": "Key?", "answers": ["red"]}])
        stage = self.stage(data=(QA,), steps=25, learning_rate=2e-2)
        run(a_recipe(base, stage, answers=LORA), data, data.parent / "run")
        logged = losses(data.parent / "run")
        assert logged[-1] < 0.2 * logged[0]

    def test_its_training_goes_on(self, base: Path, data: Path) -> None:
        run(a_recipe(base, self.stage(steps=3), answers=LORA), data, data.parent / "run")
        first = data.parent / "run" / "adapter"
        settings: dict[str, Any] = {"adapter": str(first), "beacon": {}}
        again = run(a_recipe(base, self.stage(steps=3), answers=LORA, **settings), data, data.parent / "again")
        weights = [load_file(one / "answers" / "adapter_model.safetensors") for one in (first, again)]
        assert weights[0].keys() == weights[1].keys()
        assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        wide = a_recipe(base, self.stage(), answers=replace(LORA, rank=5), **settings)
        with pytest.raises(ConfigError, match="give the recipe the same values"):
            run(wide, data, data.parent / "wide")

    def test_beacons_that_are_trained_on_lose_it(self, base: Path, data: Path) -> None:
        """It was trained behind memories of other weights."""
        run(a_recipe(base, self.stage(steps=3), answers=LORA), data, data.parent / "run")
        settings: dict[str, Any] = {"adapter": str(data.parent / "run" / "adapter"), "beacon": {}}
        assert not (run(a_recipe(base, **settings), data, data.parent / "beacons") / "answers").exists()
