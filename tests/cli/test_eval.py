"""`beacon-memory eval` as its users see it: tables, JSON, exit codes. A tiny model answers, on a few rows of data."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_samples import TEXT, saved_base, write_data
from typer.testing import CliRunner, Result

from beacon_memory.cli.main import app
from beacon_memory.evaluation.report import markdown, read_result

COMMANDS = ("qa", "long", "longbench", "kv", "needle", "support", "ppl", "retention", "report")
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("BEACON_MEMORY_MODEL", str(saved_base()))
    monkeypatch.chdir(tmp_path)
    write_data(Path("data"))

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["eval", *arguments])

    return invoke


def file(name: str) -> str:
    return str(Path("data", f"{name}.jsonl.gz"))


def written(result: Result, name: str = "out.json") -> dict[str, Any]:
    """The JSON that a command wrote, whose table it printed."""
    assert result.exit_code == 0, result.output
    assert result.stdout == markdown(read_result(Path(name))) + "\n"
    read: dict[str, Any] = json.loads(Path(name).read_text(encoding="utf-8"))
    return read


def test_qa_asks_each_baseline_and_writes_every_answer(run: Run) -> None:
    result = run("qa", "--data", file("qa_dev"), "--context-tokens", "200", "--limit", "4", "--seed", "3", "--where",
                 "source=squad_v1.1", "--baselines", "full, none,beacon:4", "--json", "out.json")  # fmt: skip
    read = written(result)
    assert list(read) == ["task", "settings", "provenance", "rows", "records"]
    assert read["task"] == "qa"
    assert read["settings"] == {
        "data": "qa_dev.jsonl.gz",
        "context_tokens": 200,
        "limit": 4,
        "where": {"source": "squad_v1.1"},
        "max_new_tokens": 48,
        "seed": 3,
        "baselines": ["full", "none", "beacon:4"],
    }
    assert [(row["baseline"], row["items"]) for row in read["rows"]] == [("full", 4), ("none", 4), ("beacon:4", 4)]
    assert [record["baseline"] for record in read["records"]] == ["full"] * 4 + ["none"] * 4 + ["beacon:4"] * 4
    assert list(read["records"][0]["scores"]) == ["score", "f1", "exact_match", "contains"]
    full, none, beacon = read["rows"]
    assert none["kv_bytes"] == 0
    assert beacon["kv_bytes"] == pytest.approx(full["kv_bytes"] / 4, rel=0.02)


def test_long_asks_many_questions_and_counts_what_was_left_out(run: Run) -> None:
    result = run("long", "--data", file("locomo"), "--limit", "1", "--questions", "3", "--baselines", "none,bm25:4",
                 "--json", "out.json")  # fmt: skip
    read = written(result)
    assert read["settings"]["left_out"] == {"no answer": 1}
    assert (read["settings"]["documents"], read["settings"]["questions"]) == (1, 3)
    assert len(read["records"]) == 6


def test_longbench_has_a_score_for_each_data_set(run: Run) -> None:
    read = written(run("longbench", "--data", file("longbench"), "--baselines", "none", "--json", "out.json"))
    assert [row["group"] for row in read["rows"]] == ["", "hotpotqa", "qasper"]


def test_kv_has_a_score_for_each_place(run: Run) -> None:
    read = written(run("kv", "--data", file("kv_retrieval"), "--baselines", "truncated:2", "--json", "out.json"))
    assert [row["group"] for row in read["rows"][1:]] == [f"{n}-{n + 20} %" for n in range(0, 100, 20)]


def test_needle_has_a_score_for_each_length_and_depth(run: Run) -> None:
    result = run("needle", "--data", file("paul_graham_essays"), "--lengths", "400,200", "--depths", "0,0.5",
                 "--repeats", "2", "--baselines", "beacon:8", "--json", "out.json")  # fmt: skip
    read = written(result)
    assert [row["group"] for row in read["rows"][1:]] == ["200 0.0", "200 0.5", "400 0.0", "400 0.5"]
    assert len(read["records"]) == 8
    assert (read["settings"]["lengths"], read["settings"]["depths"]) == ([400, 200], [0.0, 0.5])


def test_support_compares_ways_to_tell_what_is_not_in_memory(run: Run) -> None:
    result = run("support", "--data", file("locomo"), "--limit", "3", "--budget", "x4", "--json", "out.json")
    read = written(result)
    assert [(row["baseline"], row["items"]) for row in read["rows"]] == [("words", 4), ("likelihood", 4), ("both", 4)]
    words = [record["scores"] for record in read["records"] if record["baseline"] == "words"]
    assert [("recall" in scores, "right" in scores) for scores in words] == [(False, True)] * 3 + [(True, False)]
    assert all(0 <= scores["likelihood"] <= 1 for scores in words)
    known = [scores for scores in words if "right" in scores]
    assert {scores["words"] for scores in known} == {1.0}  # the river, and that it rises
    assert {scores["false alarm"] for scores in known} == {0.0}


def test_ppl_says_how_much_of_the_gap_is_closed(run: Run) -> None:
    result = run("ppl", "--data", file("paul_graham_essays"), "--context-tokens", "100", "--continuation-tokens", "20",
                 "--baselines", "full,none,beacon:4,select:4,hybrid:4:2", "--limit", "1",
                 "--json", "out.json")  # fmt: skip
    read = written(result)
    assert [record["item"] for record in read["records"]] == ["essay 0"] * 5
    assert all("nll" in row["scores"] for row in read["rows"])
    assert len({record["scores"]["nll"] for record in read["records"]}) == 5


def test_retention_compares_with_the_base_to_the_last_bit(run: Run) -> None:
    read = written(run("retention", "--data", file("paul_graham_essays"), "--json", "out.json"))
    base, full = read["rows"]
    assert (base["baseline"], full["baseline"]) == ("base", "full")
    assert base["scores"] == full["scores"]


def test_report_writes_a_page_with_plots_and_goes_on_where_it_stopped(run: Run) -> None:
    arguments = ["report", "data", "results", "--limit", "2", "--only", "qa-fairytale", "--only", "kv"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{Path('results/README.md')}\n"
    assert {path.name for path in Path("results").iterdir()} == {
        "README.md", "qa-fairytale.json", "qa-fairytale.png", "kv.json", "kv.png"
    }  # fmt: skip
    assert re.search(r"^kv: \d+ baselines$", result.stderr, re.MULTILINE)
    assert "locomo: left out" in result.stderr
    again = run(*arguments)
    assert "kv: kept" in again.stderr
    assert "baselines" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qa", "--data", "bad.jsonl"], "bad.jsonl, line 1: not JSON"),
        (["qa", "--data", file("qa_dev"), "--where", "source=nowhere"], "has no row with"),
        (["qa", "--data", file("qa_dev"), "--where", "task=any"], "'task' is missing"),
        (["qa", "--data", file("qa_dev"), "--baselines", "full,fuller"], "baseline 'fuller' must be one of full"),
        (["qa", "--data", file("qa_dev"), "--baselines", ""], "name one or more"),
        (["kv", "--data", file("kv_retrieval"), "--model", "absent/folder/of/a/model"], "cannot be loaded"),
        (["longbench", "--data", "empty.jsonl"], "task 'longbench' has no items"),
        (["needle", "--data", file("paul_graham_essays"), "--depths", "2"], "depths=[2.0]"),
        (["needle", "--data", file("paul_graham_essays"), "--lengths", "90000"], "too short; give more texts"),
        (["ppl", "--data", file("paul_graham_essays"), "--baselines", "bm25:4"], "bm25:4 must know"),
        (["ppl", "--data", file("paul_graham_essays"), "--context-tokens", "9000"], "none is as long as"),
        (["ppl", "--data", "long.jsonl", "--context-tokens", "3500", "--baselines", "full"], "4096 positions whole"),
        (["support", "--data", file("qa_dev")], "must have questions with answers and without"),
        (["report", "data", "results", "--only", "quality"], "there is no task quality; name one of qa-squad"),
        (["report", "nothing", "results"], "nothing holds none of"),
        (["ppl", "--data", "long.jsonl", "--baselines", "none", "--json", "bad.jsonl/out"], "name another file"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_exit_with_1(run: Run, arguments: list[str], message: str) -> None:
    Path("bad.jsonl").write_text('{"text": ')
    Path("empty.jsonl").touch()
    Path("long.jsonl").write_text(json.dumps({"text": TEXT * 20}))
    Path("nothing").mkdir()
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qa"], "--data"),
        (["qa", "--data", "absent.jsonl"], "does not exist"),
        (["qa", "--data", file("qa_dev"), "--where", "source"], "must each be KEY=VALUE"),
        (["qa", "--data", file("qa_dev"), "--where", "=squad"], "must each be KEY=VALUE"),
        (["qa", "--data", file("qa_dev"), "--limit", "0"], "--limit"),
        (["needle", "--data", file("paul_graham_essays"), "--lengths", "1000,many"], "must be numbers"),
        (["needle", "--data", file("paul_graham_essays"), "--depths", ""], "must be numbers"),
        (["ppl", "--data", file("paul_graham_essays"), "--continuation-tokens", "1"], "--continuation-tokens"),
        (["report", "absent"], "does not exist"),
    ],
)
def test_wrong_usage_exits_with_2_before_a_model_is_loaded(
    run: Run, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEACON_MEMORY_MODEL", "absent/folder/of/a/model")
    monkeypatch.setenv("COLUMNS", "200")
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_without_the_extra_it_says_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    result = run("qa", "--data", file("qa_dev"), "--baselines", "bm25:4")
    assert result.exit_code == 1
    assert "bm25 needs the package bm25s: pip install 'beacon-memory[eval]'" in result.stderr


def test_after_ctrl_c_it_says_what_is_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("beacon_memory.evaluation.tasks.run_items", interrupt)
    asked = run("kv", "--data", file("kv_retrieval"))
    assert (asked.exit_code, asked.stderr.strip()) == (130, "interrupted; nothing was written")
    asked = run("kv", "--data", file("kv_retrieval"), "--json", "out.json")
    assert (asked.exit_code, asked.stderr.strip()) == (130, "interrupted; repeat the command to go on")
    reported = run("report", "data")
    assert reported.exit_code == 130
    assert "interrupted; repeat the command to go on" in reported.stderr


def test_in_a_file_progress_is_lines(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beacon_memory.cli.eval._SAID_EVERY", 0.0)
    asked = run("kv", "--data", file("kv_retrieval"), "--baselines", "none", "--limit", "2")
    assert asked.stderr.splitlines() == ["none: 1 of 2", "none: 2 of 2"]


def test_plain_json_lines_are_read_too(run: Run) -> None:
    Path("plain.jsonl").write_bytes(gzip.decompress(Path(file("kv_retrieval")).read_bytes()))
    assert run("kv", "--data", "plain.jsonl", "--baselines", "none").stdout.startswith("| baseline | items |")


def test_help_shows_every_command_and_its_brackets(run: Run) -> None:
    shown = run("--help").stdout
    assert all(command in shown for command in COMMANDS)
    assert "pip install 'beacon-memory[eval]'" in shown
    for name in ("full", "none", "base", "truncated:R", "bm25:R", "beacon:R", "select:R", "select-expected:R",
                 "hybrid:R", "beacon:R:N", "select:R:N", "expected:R", "snapkv:R", "kvzip:R"):  # fmt: skip
        assert re.search(rf"(^|, ) *{re.escape(name)}(,| )", shown, re.MULTILINE), name
    assert "[bold]" not in shown
    assert "\\" not in shown
    for command in COMMANDS:
        assert run(command, "--help").exit_code == 0


@pytest.mark.parametrize("arguments", [["--help"], ["qa", "--help"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    script = f"import sys; from beacon_memory.cli.main import app; app({['eval', *arguments]}, standalone_mode=False)"
    check = f"{script}; sys.exit(bool({{'torch', 'transformers', 'numpy', 'matplotlib'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)
