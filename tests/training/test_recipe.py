from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_samples import LORA, TEXT, a_recipe, a_stage

from beacon_memory import training
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import ConfigError, MissingDependencyError
from beacon_memory.training import DataSource, LoraRecipe, Recipe, SalienceRecipe, read_recipe, shipped_recipes

SMALL = """
[[stage]]
name = "first"
steps = 10

[[stage.data]]
path = "text.jsonl"
kind = "text"
"""


def read(tmp_path: Path, text: str) -> Recipe:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    recipe, found = read_recipe(file)
    assert found == file
    return recipe


class TestReading:
    def test_what_is_left_out_has_a_default(self, tmp_path: Path) -> None:
        recipe = read(tmp_path, SMALL)
        (stage,) = recipe.stages
        assert (stage.name, stage.steps, stage.ratio_per) == ("first", 10, "window")
        assert stage.data == (DataSource(path="text.jsonl", kind="text"),)
        assert (recipe.adapter, recipe.lora, recipe.dtype, recipe.seed) == (None, None, "bfloat16", 0)

    def test_what_is_given_is_taken(self, tmp_path: Path) -> None:
        lora = "lora = { rank = 2, targets = ['o_proj'] }"
        head = f"seed = 7\nbase = 'some/model'\nbeacon = {{ beacon_window = 64 }}\n{lora}"
        second = SMALL.replace("first", "second").replace("steps", "learning_rate = 1\nsteps")
        recipe = read(tmp_path, f"{head}\n{SMALL}where = {{ source = 'a', year = 3 }}\nweight = 2\n{second}")
        assert (recipe.seed, recipe.base, recipe.beacon) == (7, "some/model", {"beacon_window": 64})
        assert recipe.lora == LoraRecipe(rank=2, targets=("o_proj",))
        assert [(stage.name, stage.learning_rate) for stage in recipe.stages] == [("first", 5e-5), ("second", 1)]
        assert recipe.stages[0].data[0].where == {"source": "a", "year": 3}
        assert recipe.stages[0].data[0].weight == 2

    def test_beacons_begin_with_the_adapter_s_settings_where_the_recipe_has_none(self) -> None:
        start = BeaconConfig(beacon_window=256, beacon_placement="salient")
        config = a_recipe(beacon={"beacon_window": 16, "beacon_ratio": [4]}).beacon_config(start)
        assert config == BeaconConfig(beacon_window=16, beacon_ratio=(4,), beacon_placement="salient")

    def test_salience_may_have_data_of_its_own(self, tmp_path: Path) -> None:
        recipe = read(tmp_path, SMALL + "[salience]\nanswer_weight = 2\n[[salience.data]]\npath = 'a'\nkind = 'qa'")
        assert recipe.salience == SalienceRecipe(data=(DataSource(path="a", kind="qa"),), answer_weight=2)

    def test_its_dict_survives_json(self) -> None:
        settings = a_recipe(lora=LoraRecipe()).to_dict()
        assert json.loads(json.dumps(settings)) == settings
        assert settings["stages"][0]["tokens"] == [12, 40]


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("seeds = 1\n" + SMALL, "recipe: unknown key 'seeds'; known are stage, adapter"),
            (SMALL.replace("stage", "stages"), r"unknown key 'stages'; write each stage as \[\[stage\]\]"),
            ("", r"stages=\[\] must be at least one"),
            (SMALL + SMALL, r"stages=\['first', 'first'\].*its own name"),
            (SMALL.replace("[[stage]]", "[stage]"), r"stage must be written as tables, each under \[\[...\]\]"),
            ("stage = 3", "stage must be written as tables"),
            (SMALL.partition("[[stage.data]]")[0], r"stage 1: data=\(\) must be at least one source"),
            (SMALL.replace("[[stage.data]]", "[stage.data]"), "stage 1: data must be written as tables"),
            (SMALL.replace("steps", "step"), "stage 1: unknown key 'step'"),
            (SMALL.replace("steps = 10", ""), "stage 1: 'steps' is missing"),
            (SMALL.replace("10", "'10'"), "stage 1: steps='10' must be a whole number"),
            (SMALL.replace("10", "10.0"), "stage 1: steps=10.0 must be a whole number"),
            (SMALL.replace("10", "true"), "stage 1: steps=True must be a whole number"),
            (SMALL.replace("10", "0"), "stage 1: steps=0 must be at least 1"),
            (SMALL.replace('"first"', "1"), "stage 1: name=1 must be a text"),
            (SMALL.replace('"first"', '"a/b"'), "stage 1: name='a/b' must be letters, digits and -"),
            (SMALL.replace('"first"', '"adapter"'), "stage 1: name='adapter' must be another one"),
            (SMALL.replace('"text"', '"prose"'), "stage 1, data 1: kind='prose' must be 'text' or 'qa'"),
            (SMALL + "weight = 0", "stage 1, data 1: weight=0 must be above 0"),
            (SMALL + "weight = inf", "stage 1, data 1: weight=inf must be above 0"),
            (SMALL + "weight = '2'", "stage 1, data 1: weight='2' must be a number"),
            (SMALL + "where = 'a'", "stage 1, data 1: where='a' must be a table"),
            ("lora = true\n" + SMALL, "lora=True must be a table"),
            ("lora = { rank = 0 }\n" + SMALL, "lora: rank=0 must be above 0"),
            ("lora = { targets = 'o_proj' }\n" + SMALL, "lora: targets='o_proj' must be a list of texts"),
            ("salience = 3\n" + SMALL, "salience=3 must be a table"),
            ("salience = { answer_weight = 1 }\n" + SMALL, r"salience: data=\(\) must be at least one source"),
            (SMALL + "[salience]\ndata = 'a'", "salience: data must be written as tables"),
            (SMALL + "[salience]\nanswer_weight = -1\n[[salience.data]]\npath = 'a'\nkind = 'qa'", "answer_weight=-1"),
            (SMALL + "[[salience.data]]\npath = 'a'", "salience, data 1: 'kind' is missing"),
            ("beacon = 3\n" + SMALL, "recipe: beacon=3 must be a table"),
            ("beacon = { window = 3 }\n" + SMALL, "beacon: unknown key 'window'"),
            ("beacon = { beacon_window = '3' }\n" + SMALL, "beacon_window='3' must be a whole number"),
            ("dtype = 'int8'\n" + SMALL, "dtype='int8' must be bfloat16, float16 or float32"),
            ("seed = -1\n" + SMALL, "seed=-1 must be from 0"),
            ("save_steps = 0\n" + SMALL, "save_steps=0 must be at least 1"),
            ("seed =\n" + SMALL, "is not TOML"),
        ],
    )
    def test_they_name_file_and_key(self, tmp_path: Path, text: str, complaint: str) -> None:
        with pytest.raises(ConfigError, match=rf"the recipe .*mine\.toml .*{complaint}"):
            read(tmp_path, text)

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"tokens": (40, 12)}, r"tokens=\(40, 12\) must be \[least, most\]"),
            ({"tokens": (12,)}, r"tokens=\(12,\) must be a list of 2 whole numbers"),
            ({"tokens": (0, 4)}, r"tokens=\(0, 4\)"),
            ({"tokens": 12}, "tokens=12 must be a list"),
            ({"parts": ()}, r"parts=\(\)"),
            ({"parts": (1, "2")}, "must be a list of whole numbers"),
            ({"ratios": (2, -4)}, r"ratios=\(2, -4\)"),
            ({"ratio_per": "token"}, "ratio_per='token' must be 'window' or 'document'"),
            ({"compression": "raw"}, "compression='raw' must be 'beacon', 'hybrid' or 'select'"),
            ({"compression": "select", "label_text": True}, "label_text=True must be false with"),
            ({"compression": "select", "zoomed": 1.5}, "zoomed=1.5 must be a share"),
            ({"compression": "select", "zoomed": 0.5, "ratios": (0, 2)}, r"ratios=\(0, 2\) must be some above 2"),
            ({"zoomed": 0.5}, "zoomed=0.5 must be 0 without"),
            ({"compression": "hybrid", "ratios": (2, 0)}, r"ratios=\(2, 0\) must be above 0 with"),
            ({"continuation": 1}, "continuation=1 must be at least 2"),
            ({"label_text": 1}, "label_text=1 must be true or false"),
            ({"label_weight": 0}, "label_weight=0 must be above 0, or distill"),
            ({"distill_weight": -1}, "distill_weight=-1 must be at least 0"),
            ({"label_text": True, "distill_weight": 1, "parts": (1, 2)}, r"parts=\(1, 2\) must be \[1\]"),
            ({"learning_rate": 0}, "learning_rate=0 must be above 0"),
            ({"learning_rate": float("nan")}, "learning_rate=nan must be above 0"),
            ({"warmup": 1}, "warmup=1 must be a share"),
            ({"data": ({"path": "a", "kind": "text"},)}, "data=.*must be a list of tables"),
        ],
    )
    def test_values_of_a_stage_are_checked_where_it_is_made(self, settings: dict[str, Any], complaint: str) -> None:
        with pytest.raises(ConfigError, match=complaint):
            a_stage(**settings)

    def test_all_text_may_be_labelled_without_a_continuation(self) -> None:
        assert a_stage(label_text=True, continuation=0, data=(TEXT,)).continuation == 0

    def test_a_file_that_is_not_there_is_named_with_the_shipped_recipes(self) -> None:
        with pytest.raises(
            ConfigError, match=r"'absent\.toml' cannot be read.*shipped recipes: answers, default, paper"
        ):
            read_recipe("absent.toml")


class TestShipped:
    def test_each_can_be_read_by_its_name(self) -> None:
        assert shipped_recipes() == ["answers", "default", "paper"]
        for name in shipped_recipes():
            recipe, file = read_recipe(name)
            assert recipe.stages
            assert file.name == f"{name}.toml"

    def test_the_default_one_goes_on_with_the_shipped_adapter(self) -> None:
        recipe, _ = read_recipe("default")
        assert (recipe.base, recipe.adapter) == (None, "default")
        assert recipe.lora is not None

    def test_that_of_answers_leaves_what_reads_documents_as_it_is(self) -> None:
        recipe, _ = read_recipe("answers")
        assert (recipe.base, recipe.adapter, recipe.lora) == (None, "default", None)
        assert recipe.answers is not None

    def test_answers_are_trained_alone_behind_selected_memories(self) -> None:
        with pytest.raises(ConfigError, match=r"lora=.* must be left out with \[answers\]"):
            a_recipe(None, a_stage(compression="select"), lora=LORA, answers=LORA)
        with pytest.raises(
            ConfigError, match=r"compression of stage 'first'='beacon' must be 'select' with \[answers\]"
        ):
            a_recipe(None, a_stage(), answers=LORA)
        with pytest.raises(ConfigError, match="compression of stage 'first'='select'"):
            a_recipe(None, a_stage(compression="select"))

    def test_the_paper_s_has_the_published_settings(self) -> None:
        recipe, _ = read_recipe("paper")
        published = BeaconConfig.from_dict(
            {"beacon_window": 2048, "beacon_ratio": [2, 4, 8, 16, 32], "beacon_param": ["q", "k", "v"]}
        )
        assert recipe.beacon_config(BeaconConfig()) == published
        assert (recipe.adapter, recipe.lora) == (None, None)
        assert [stage.learning_rate for stage in recipe.stages] == [5e-5, 1e-5]
        assert {stage.ratio_per for stage in recipe.stages} == {"window"}


class TestPackage:
    def test_public_names_are_exactly_these(self) -> None:
        settings = {"DataSource", "LoraRecipe", "Recipe", "SalienceRecipe", "Stage"}
        assert set(training.__all__) == settings | {"read_recipe", "shipped_recipes", "train"}
        for name in training.__all__:
            assert getattr(training, name) is not None
        with pytest.raises(AttributeError, match="nothing_of_the_kind"):
            training.nothing_of_the_kind  # noqa: B018

    def test_reading_a_recipe_imports_no_torch(self) -> None:
        script = "from beacon_memory.training import read_recipe; read_recipe('default'); import sys"
        check = f"{script}; sys.exit(bool({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
        assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0

    def test_without_the_extra_training_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(vars(training), "train", raising=False)
        monkeypatch.setattr(training, "find_spec", lambda name: None if name == "datasets" else name)
        with pytest.raises(MissingDependencyError, match=r"needs datasets; run: pip install 'beacon-memory\[train\]'"):
            training.train  # noqa: B018
