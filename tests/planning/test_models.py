from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_models import FAMILIES, tiny_base, tiny_checkpoint

from beacon_memory.config import BeaconConfig
from beacon_memory.errors import ConfigError, ModelError
from beacon_memory.modeling.adapter import PROBE
from beacon_memory.modeling.default_model import default_adapter
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.planning.measure import shape_of
from beacon_memory.planning.models import planned_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_of_a_folder_are_those_of_the_loaded_model(tmp_path: Path, family: str) -> None:
    base = tiny_base(family)
    planned = planned_model(str(tiny_checkpoint(tmp_path / "model", base)))
    small = [one.numel() for name, one in base.named_parameters() if "norm" in name or name.endswith("bias")]
    assert planned.shape.weights == sum(one.numel() for one in base.parameters()) - sum(small)
    assert planned.shape == shape_of(BeaconModel(base, BeaconConfig()))
    assert planned.compression == "select"
    assert planned.tokenizer == tmp_path / "model" / "tokenizer.json"


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        (None, 0.1345),
        ("Qwen/Qwen2.5-7B-Instruct", 7.615),
        ("qwen2.5-7b-instruct", 7.615),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.030),
        ("meta-llama/Llama-3.1-70B-Instruct", 70.55),
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.494),
    ],
)
def test_known_models_have_as_many_weights_as_their_cards_say(name: str | None, billions: float) -> None:
    assert planned_model(name).shape.weights / 1e9 == pytest.approx(billions, rel=0.002)


def test_numbers_that_are_given_replace_those_of_a_model() -> None:
    assert planned_model("qwen2.5-7b-instruct", shape={"layers": 2}).shape.layers == 2
    with pytest.raises(ConfigError, match="the numbers of a model are layers"):
        planned_model(None, shape={"depth": 2})


def test_an_adapter_says_how_texts_are_read(tmp_path: Path) -> None:
    (tmp_path / "beacon.json").write_text('{"beacon_window": 512, "beacon_sink_size": 1}', encoding="utf-8")
    planned = planned_model("qwen2.5-7b-instruct", str(tmp_path))
    assert (planned.config.beacon_window, planned.compression) == (512, "beacon")


def test_the_score_is_that_of_one_reading_where_the_adapter_has_a_probe(tmp_path: Path) -> None:
    assert [planned_model(name).score for name in (None, "qwen2.5-7b-instruct")] == ["expected", "repeat"]
    copied = tmp_path / "adapter"
    shutil.copytree(default_adapter(), copied)
    assert planned_model(None, str(copied)).score == "expected"
    (copied / PROBE).unlink()
    assert planned_model(None, str(copied)).score == "repeat"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        planned_model(str(tmp_path))
