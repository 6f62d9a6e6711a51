from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny_models import tiny_base
from training_samples import LORA, QA, TEXT, a_base, a_model, a_recipe, a_stage

from beacon_memory.config import BeaconConfig
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.training import DataSource, Recipe, SalienceRecipe
from beacon_memory.training.card import write_card

HISTORY: dict[str, list[dict[str, float]]] = {
    "first": [
        {"loss": 3.0, "loss_qa_x16": 4.0, "loss_qa_x2": 2.0, "step": 1},
        {"loss": 2.5, "loss_qa_x16": 3.5, "loss_text": 2.25, "step": 2},
        {"loss": 2.0, "loss_qa_x2": 1.0, "step": 3},
        {"train_runtime": 90.0, "train_loss": 2.5, "step": 3},
    ],
    "second": [{"loss": 1.5, "step": 1}, {"train_runtime": 1000.0, "step": 1}, {"train_runtime": 200.4, "step": 1}],
}
RECIPE = a_recipe(
    None,
    a_stage(data=(TEXT, DataSource(path="qa.jsonl", kind="qa", weight=3, where={"source": "squad"})), parts=(1, 1, 2)),
    a_stage(name="second", data=(QA,), ratios=(2, 2, 0), ratio_per="document", distill_weight=0.5, accumulate=4),
)


def card(folder: Path, recipe: Recipe = RECIPE, history: Any = HISTORY, **settings: Any) -> str:
    config = BeaconConfig(beacon_window=8, beacon_ratio=(2, 4), **settings)
    write_card(folder, recipe, config, history)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_front_matter_names_library_and_base(tmp_path: Path) -> None:
    data = ModelCard(card(tmp_path)).data
    assert (data.library_name, data.base_model) == ("beacon_memory", "HuggingFaceTB/SmolLM2-135M-Instruct")
    data = ModelCard(card(tmp_path, a_recipe(base="some/model"))).data  # type: ignore[arg-type]
    assert data.base_model == "some/model"


def test_where_the_base_lay_is_not_told(tmp_path: Path) -> None:
    written = card(tmp_path, a_recipe(a_base(tmp_path / "some model")))
    assert ModelCard(written).data.base_model == "some model"
    assert str(tmp_path) not in written


def test_it_tells_settings_and_lora(tmp_path: Path) -> None:
    written = card(tmp_path, a_recipe(lora=LORA), beacon_placement="salient-words")
    for line in (
        "| `beacon_window` | 8 |",
        "| `beacon_ratio` | 2, 4 |",
        "| `beacon_placement` | salient-words |",
        "| lora | LoRA, rank 4, alpha 8, q_proj, o_proj, up_proj |",
        "| started from | untrained beacons |",
    ):
        assert line in written
    assert "| lora | none |" in card(tmp_path)


def test_it_tells_that_answers_were_trained_alone(tmp_path: Path) -> None:
    stage = a_stage(compression="select", ratios=(0, 4), zoomed=0.5)
    written = card(tmp_path, a_recipe(None, stage, answers=LORA))
    assert "| lora | as it was |" in written
    assert "| lora of answers, trained alone | LoRA, rank 4, alpha 8, q_proj, o_proj, up_proj |" in written
    assert "| 0, 4, drawn for two groups of questions, and for each of the 50% that see passages |" in written


def test_it_tells_where_salience_comes_from(tmp_path: Path) -> None:
    salience = SalienceRecipe(data=(TEXT, replace(QA, where={"source": "squad"})), answer_weight=2)
    written = card(tmp_path, a_recipe(salience=salience))
    assert "| salience | of text.jsonl, qa.jsonl source=squad; weight of being part of an answer: 2 |" in written


def test_it_tells_stages_and_the_share_of_each_source(tmp_path: Path) -> None:
    written = card(tmp_path)
    for line in (
        "| first | 4 | 1 | 12 to 40 | 1 (2x), 2 | 2, 4, drawn for each window | 0.01 | 1 labels | 90 |",
        "| second | 4 | 4 | 12 to 40 | 1 | 2 (2x), 0, drawn for each document | 0.01 | 1 labels, 0.5 distillation "
        "| 1,200 |",
        "| first | text.jsonl | text | all | 1 | 25.0% |",
        "| first | qa.jsonl | qa | source=squad | 3 | 75.0% |",
        "| second | qa.jsonl | qa | all | 1 | 100.0% |",
    ):
        assert line in written


def test_it_tells_the_first_and_last_loss_at_each_ratio(tmp_path: Path) -> None:
    table = card(tmp_path).partition("## Losses")[2].partition("## Versions")[0]
    assert [line for line in table.splitlines() if line.startswith(("| first", "| second"))] == [
        "| first | all | 3.000 | 2.000 |",
        "| first | qa_x2 | 2.000 | 1.000 |",
        "| first | qa_x16 | 4.000 | 3.500 |",
        "| first | text | 2.250 | 2.250 |",
        "| second | all | 1.500 | 1.500 |",
    ]
    assert "A training loss is no score" in table
    assert "`beacon-memory eval`" in table


def test_it_tells_versions(tmp_path: Path) -> None:
    written = card(tmp_path)
    for package in ("torch", "transformers", "peft", "beacon-memory"):
        assert f"| {package} | {version(package)} |" in written


@pytest.mark.parametrize("named", [True, False])
def test_its_python_loads_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    base = a_base(tmp_path / "base")
    monkeypatch.setattr("beacon_memory.modeling.model.ensure_default_model", lambda: base)
    monkeypatch.chdir(tmp_path)
    a_model().save_adapter(tmp_path / "adapter")
    written = card(tmp_path / "adapter", a_recipe(base) if named else RECIPE)
    (code,) = re.findall(r"```python\n(.*?)```", written, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", "adapter"), names)  # noqa: S102  # our own document
    assert isinstance(names["model"], BeaconModel)
    assert names["model"].adapter == "adapter"
    assert names["model"].base.config.hidden_size == tiny_base("llama").config.hidden_size
