"""Calibrating from the command line: what comes of it is an adapter that adds documents, to the same stores."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_samples import Run, lines, runner
from some_prose import some_prose
from tiny_models import tiny_base, tiny_checkpoint, tiny_model, tiny_tokenizer, train

from beacon_memory.config import BeaconConfig
from beacon_memory.modeling.adapter import read_adapter


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(some_prose(9, 400)):
        (tmp_path / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    return runner(tmp_path / "store", tiny_checkpoint(tmp_path / "model", tiny_base("llama")), monkeypatch)


def test_a_calibrated_adapter_chooses_by_its_probe(run: Run) -> None:
    assert run("add", "texts/0.txt", "--score", "expected").exit_code == 0
    said = run("calibrate", "texts", "--output", "own", "--windows", "8")
    assert said.exit_code == 0, said.output
    assert "of what repeat keeps at ratio 8, expected keeps" in said.stdout
    assert said.stdout.splitlines()[-1] == "own"
    assert read_adapter("own").tensors == {}  # beacons that nobody trained stay untrained
    said = run("ask", "Who pays?", "--doc", "texts/0.txt", "--adapter", "own", "--json")
    assert said.exit_code == 0, said.output
    (asked,) = lines(said)
    assert asked["answer"]  # what was stored before can be used with it
    (again,) = lines(run("add", "texts/0.txt", "--score", "expected", "--adapter", "own", "--json"))
    (same,) = lines(run("add", "texts/0.txt", "--score", "expected", "--adapter", "own", "--json"))
    assert (again["status"], again["compression"], same["status"]) == ("replaced", "select", "unchanged")


def test_it_keeps_what_the_adapter_had(run: Run, tmp_path: Path) -> None:
    model = train(tiny_model("llama", BeaconConfig(), tokenizer=tiny_tokenizer()), seed=3)
    model.save_adapter(tmp_path / "trained")
    (said,) = lines(run("calibrate", "texts", "--output", "own", "--adapter", "trained", "--windows", "9", "--json"))
    assert {name: said[name] for name in ("adapter", "windows", "compared")} == {
        "adapter": "own",
        "windows": 8,
        "compared": 1,
    }
    before, after = read_adapter("trained"), read_adapter("own")
    assert after.config == before.config
    assert after.tensors.keys() == before.tensors.keys()
    assert (before.probe, after.probe is None) == (None, False)
    assert (before.lookup_heads, len(after.lookup_heads)) == ((), 5)


def test_a_model_that_cannot_be_asked_can_be_calibrated(run: Run, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path / "model")
    said = run("calibrate", "texts", "--output", "own", "--windows", "8")
    assert said.exit_code == 0, said.output
    assert read_adapter("own").lookup_heads == ()


def test_bad_input_is_told_and_nothing_is_written(run: Run, tmp_path: Path) -> None:
    for paths, told in (["texts/0.txt"], "needs 8 at least"), (["nothing.txt"], "nothing.txt"):
        said = run("calibrate", *paths, "--output", "own")
        assert said.exit_code == 1
        assert told in said.stderr
    assert not (tmp_path / "own").exists()
    said = run("calibrate", "texts", "--output", "texts/0.txt")
    assert said.exit_code == 1
    assert "texts/0.txt is a file" in said.stderr
