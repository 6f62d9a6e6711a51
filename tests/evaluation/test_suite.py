from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_samples import Fake, saved_model, write_data

from beacon_memory.errors import InputError
from beacon_memory.evaluation.baseline_names import _parse
from beacon_memory.evaluation.report import read_result
from beacon_memory.evaluation.suite import run_suite
from beacon_memory.evaluation.tasks import Evaluation

TASKS = ("qa-squad", "qa-others", "qa-composed", "qa-fairytale", "ppl", "retention", "articles", "locomo", "leval",
         "longbench", "kv", "needle", "needle-other-words")  # fmt: skip


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The fields of baselines that took part, in place of whom fakes answer."""
    fields: list[tuple[str, ...]] = []

    def fakes(names: Any, _: object) -> list[Fake]:
        assert all(_parse(name) for name in names)  # raises for who does not exist
        fields.append(tuple(names))
        return [Fake(name, nll=defaultdict(lambda name=name: 1.0 if name == "full" else 2.0)) for name in names]

    monkeypatch.setattr("beacon_memory.evaluation.tasks.baselines", fakes)
    return fields


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(saved_model(), [])


def run(evaluation: Evaluation, data: Path, output: Path, limit: int = 4, only: tuple[str, ...] = ()) -> list[str]:
    said: list[str] = []
    run_suite(evaluation, data, output, limit, said.append, only)
    return said


def test_every_task_is_run_and_written(ran: list[tuple[str, ...]], evaluation: Evaluation, tmp_path: Path) -> None:
    said = run(evaluation, write_data(tmp_path / "data"), tmp_path / "out")
    assert [line.split(":")[0] for line in said] == list(TASKS)
    assert all(line.endswith(" baselines") for line in said)
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for task in TASKS:
        result = read_result(tmp_path / "out" / f"{task}.json")
        assert (result.task, result.settings["limit"], result.settings["seed"]) == (task, 4, 0)
        assert result.settings["baselines"] == list(dict.fromkeys(record.baseline for record in result.records))
        assert f"## {task}\n" in page
        assert (tmp_path / "out" / f"{task}.png").exists() == (task != "retention")
    assert f"`beacon-memory eval report DATA {(tmp_path / 'out').as_posix()}`" in page


def test_what_is_there_is_not_run_again(ran: list[tuple[str, ...]], evaluation: Evaluation, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", "squad_articles", "longbench")
    run(evaluation, data, tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert len(ran) == 2
    said = run(evaluation, data, tmp_path / "out")
    assert len(ran) == 2
    assert [line for line in said if "left out" not in line] == ["articles: kept", "longbench: kept"]
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == page


@pytest.mark.parametrize("change", ["limit", "seed", "model", "settings", "probe", "dtype", "baselines"])
def test_what_was_run_otherwise_is_run_again(
    change: str, ran: list[tuple[str, ...]], evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path / "data", "squad_articles")
    run(evaluation, data, tmp_path / "out")
    file = tmp_path / "out" / "articles.json"
    kept, limit = json.loads(file.read_text(encoding="utf-8")), 4
    if change == "limit":
        limit = 5
    elif change == "seed":
        evaluation = replace(evaluation, seed=1)
    elif change == "model":
        kept["provenance"]["adapter"] = "another"
    elif change in ("settings", "probe"):
        kept["provenance"][change] = "another"
    elif change == "dtype":
        kept["provenance"]["dtype"] = "bfloat16"
    else:
        kept["settings"]["baselines"].pop()
    file.write_text(json.dumps(kept), encoding="utf-8")
    assert f"articles: {len(ran[0])} baselines" in run(evaluation, data, tmp_path / "out", limit)
    assert len(ran) == 2
    run(evaluation, data, tmp_path / "out", limit)
    assert len(ran) == 2


def test_what_has_no_data_is_left_out(ran: list[tuple[str, ...]], evaluation: Evaluation, tmp_path: Path) -> None:
    said = run(evaluation, write_data(tmp_path / "data", "kv_retrieval"), tmp_path / "out")
    assert f"kv: {len(ran[0])} baselines" in said
    assert "locomo: left out, locomo.jsonl.gz is not there" in said
    assert sum("left out" in line for line in said) == len(TASKS) - 1


def test_only_some_are_run_and_others_kept(ran: list[tuple[str, ...]], evaluation: Evaluation, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    run(evaluation, data, tmp_path / "out", only=("kv", "leval"))
    assert len(ran) == 2
    said = run(evaluation, data, tmp_path / "out", only=("longbench",))
    assert len(ran) == 3
    assert [line for line in said if not line.endswith("left out")] == [
        "leval: kept", f"longbench: {len(ran[2])} baselines", "kv: kept"
    ]  # fmt: skip
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert all(f"## {task}\n" in page for task in ("kv", "leval", "longbench"))


def test_a_task_that_is_not_known_is_refused(evaluation: Evaluation, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no task ppls, qa; name one of qa-squad, qa-others, .*needle"):
        run(evaluation, write_data(tmp_path / "data", "locomo"), tmp_path / "out", only=("qa", "ppl", "ppls"))


@pytest.mark.parametrize(("only", "missing"), [((), "kv_retrieval.jsonl.gz, leval"), (("ppl",), "paul_graham_essays")])
def test_nothing_to_run_is_an_error(
    only: tuple[str, ...], missing: str, evaluation: Evaluation, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=rf"there is nothing to report: .*data holds none of {missing}"):
        run(evaluation, tmp_path / "data", tmp_path / "out", only=only)
    assert not (tmp_path / "out").exists()


def test_what_was_finished_before_an_error_is_kept(
    ran: list[tuple[str, ...]], evaluation: Evaluation, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", "squad_articles", "kv_retrieval")
    (data / "kv_retrieval.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"kv_retrieval.jsonl.gz, line 1"):
        run(evaluation, data, tmp_path / "out")
    write_data(data, "kv_retrieval")
    assert "articles: kept" in run(evaluation, data, tmp_path / "out")
