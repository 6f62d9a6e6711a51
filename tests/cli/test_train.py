"""`beacon-memory train` as its users see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_samples import ROOF, Run, lines


class TestTrain:
    @pytest.fixture
    def recipe(self, model: Path, data: Path) -> Path:
        """A recipe of two steps, beside its data."""
        stage = 'name = "first"\nsteps = 2\ntokens = [12, 40]\ncontinuation = 8'
        beacon = "beacon = { beacon_window = 8, beacon_ratio = [2, 4] }"
        source = '[[stage.data]]\npath = "text.jsonl"\nkind = "text"'
        file = data / "mine.toml"
        file.write_text(f'base = "{model}"\ndtype = "float32"\n{beacon}\n[[stage]]\n{stage}\n{source}\n')
        return file

    def test_prints_the_folder_of_an_adapter_that_can_be_used(self, run: Run, recipe: Path) -> None:
        result = run("train", str(recipe), "run")
        assert result.exit_code == 0
        assert result.stdout == f"{Path('run/adapter')}\n"
        assert lines(run("train", str(recipe), "run", "--json")) == [{"adapter": "run/adapter"}]
        shown = json.loads(run("info", "--adapter", "run/adapter", "--json").stdout)
        assert (shown["adapter"], shown["window"]) == (str(Path("run/adapter").absolute()), 8)
        assert shown["compression"] == "beacon"
        Path("roof.txt").write_text(ROOF, encoding="utf-8")
        assert lines(run("add", "roof.txt", "--adapter", "run/adapter", "--json"))[0]["compression"] == "beacon"

    def test_an_adapter_may_ask_for_a_compression(self, run: Run, recipe: Path) -> None:
        asking = recipe.read_text().replace("beacon = { ", 'beacon = { beacon_compression = "hybrid", ')
        recipe.write_text(asking)
        assert run("train", str(recipe), "run").exit_code == 0
        assert json.loads(run("info", "--adapter", "run/adapter", "--json").stdout)["compression"] == "hybrid"
        Path("roof.txt").write_text(ROOF, encoding="utf-8")
        assert lines(run("add", "roof.txt", "--adapter", "run/adapter", "--json"))[0]["compression"] == "hybrid"

    def test_data_may_lie_elsewhere(self, run: Run, recipe: Path, data: Path, tmp_path: Path) -> None:
        moved = recipe.rename(tmp_path / "moved.toml")
        refused = run("train", str(moved), "run")
        assert refused.exit_code == 1
        assert "text.jsonl does not exist" in refused.stderr
        assert run("train", str(moved), "run", "--data", str(data)).exit_code == 0

    def test_after_ctrl_c_it_says_how_to_go_on(self, run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("beacon_memory.training.losses.TrainingModel.forward", interrupt)
            result = run("train", str(recipe), "run")
        assert result.exit_code == 130
        assert "interrupted; repeat the command to go on from the last checkpoint" in result.stderr
        assert run("train", str(recipe), "run").exit_code == 0

    def test_several_processes_train_one_adapter(self, run: Run, recipe: Path, tmp_path: Path) -> None:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = ["-m", "beacon_memory", "train", str(recipe), "run", "--device", "cpu"]
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        subprocess.run(launch + command, env=environment, check=True, capture_output=True)
        assert not list(Path("run").rglob("*.tmp"))
        assert len(list(Path("run").rglob("rng_state_*.pth"))) == 2
        assert run("info", "--adapter", "run/adapter").exit_code == 0

    def test_a_shipped_recipe_needs_the_folder_of_its_data(self, run: Run) -> None:
        result = run("train", "default", "run")
        assert result.exit_code == 1
        assert "the recipe 'default' is shipped without its data; name their folder with --data" in result.stderr

    def test_without_the_extra_it_says_how_to_get_it(
        self, run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from beacon_memory import training

        monkeypatch.delitem(vars(training), "train", raising=False)
        monkeypatch.setattr(training, "find_spec", dict[str, object]().get)
        result = run("train", str(recipe), "run")
        assert result.exit_code == 1
        assert "needs accelerate, bm25s, datasets, tensorboard; run: pip install" in result.stderr
        assert "'beacon-memory[train]'" in result.stderr

    def test_a_mistake_in_the_recipe_is_an_error_in_one_line(self, run: Run, recipe: Path) -> None:
        recipe.write_text(recipe.read_text().replace("steps = 2", "steps = 'two'"))
        result = run("train", str(recipe), "run")
        assert result.exit_code == 1
        assert "mine.toml cannot be used: stage 1: steps='two' must be a whole number" in result.stderr

    def test_help_names_every_shipped_recipe(self, run: Run) -> None:
        from beacon_memory.training import shipped_recipes

        shown = " ".join(run("train", "--help").stdout.split())
        assert f"a shipped recipe's name: {', '.join(shipped_recipes())}." in shown.replace("│ │ ", "")
