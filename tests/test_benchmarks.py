"""The prepared script for a card runs here, on the processor and in a short form."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

SCRIPT = ROOT / "benchmarks" / "cuda.sh"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with this python, as it is."""
    given = {"PYTHON": sys.executable, "INSTALL": "0", "DEVICE": "cpu", **environment}
    return subprocess.run([SCRIPT, *arguments], env=os.environ | given, capture_output=True, text=True, check=False)


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    done = run("--dry-run", str(tmp_path / "out"), INSTALL="1")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "venv", "install", "machine", "tests", "start", "model"
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_steps_leave_what_they_printed(tmp_path: Path) -> None:
    done = run(str(tmp_path), STEPS="machine tests")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "summary.txt").read_text() == done.stdout
    assert "passed" in (tmp_path / "tests.log").read_text()
    assert "cpu" in (tmp_path / "machine.log").read_text()


def test_a_step_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    done = run(str(tmp_path), STEPS="machine start", DEVICE="nowhere", MODEL=str(tmp_path))
    assert done.returncode == 1
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["machine", "FAILED"], ["start", "FAILED"]]


@pytest.mark.slow
def test_needles_are_hidden_in_one_long_document_and_asked_for(tmp_path: Path) -> None:
    story = (ROOT / "examples" / "treasure_island_chapter_1.txt").read_text()
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": story}))
    command = [sys.executable, str(ROOT / "benchmarks" / "needles.py"), str(tmp_path / "data.jsonl"), str(tmp_path)]
    for status in ("added", "unchanged"):
        done = subprocess.run(
            [*command, "--tokens", "2000", "--ratio", "8", "--budgets", "100", "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        told = json.loads(done.stdout)
        assert told["added"]["status"] == status
        assert 1900 < told["added"]["tokens"] <= 2000
        answers = told["asked"]["100"]
        assert [one["depth"] for one in answers] == [f"0.{number}5" for number in range(10)]
        assert all(one["loaded"] for one in answers)
        assert any(one["found"] for one in answers)


def test_it_needs_a_folder() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")


@pytest.mark.parametrize("arguments", [[], ["somewhere", "nothing"]])
def test_the_script_for_vllm_says_how_it_is_used(tmp_path: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [ROOT / "benchmarks" / "vllm" / "run.sh", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")
    assert not [*tmp_path.iterdir()]


def test_the_facts_of_a_conversation_can_be_told_apart() -> None:
    spec = importlib.util.spec_from_file_location("conversation", ROOT / "benchmarks" / "conversation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for it
    spec.loader.exec_module(module)
    facts = module.facts(100, seed=0)
    assert facts == module.facts(100, seed=0) != module.facts(100, seed=1)
    assert len({fact.question for fact in facts}) == len({fact.said for fact in facts}) == 100
    for fact in facts:
        assert fact.value in fact.said
        assert fact.value not in fact.question
        assert len({*fact.said.split()} & {*fact.question.split()}) >= 2
