"""`beacon-memory plan`."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_samples import lines, runner
from command_page import json_fields
from repository import ROOT
from tiny_models import tiny_base, tiny_checkpoint
from typer.testing import CliRunner, Result

from beacon_memory.cli.main import app
from beacon_memory.cli.plan import note_calibration, numbers_given
from beacon_memory.errors import InputError
from beacon_memory.planning import calibration
from beacon_memory.planning.hardware import Speed

PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(calibration.platformdirs, "user_cache_path", lambda _: tmp_path / "cache")
    monkeypatch.delenv("BEACON_MEMORY_MODEL", raising=False)
    return


SHOWN = re.findall(r"    beacon-memory (plan [^\n]*)\n\n```text\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("command", "output"), SHOWN)
def test_the_page_shows_what_the_command_prints(command: str, output: str) -> None:
    result = plan(*shlex.split(command)[1:])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == output


def test_the_page_shows_a_million_documents_on_a_7b_and_an_8b() -> None:
    shown = re.findall(r"^model +(\S+),.*\ndocuments +(\S+) of (\S+) tokens", PAGE, re.MULTILINE)
    assert ("Qwen/Qwen2.5-7B-Instruct", "1,000,000", "4,000") in shown
    assert ("meta-llama/Llama-3.1-8B-Instruct", "1,000,000", "4,000") in shown


def test_a_plan_imports_no_torch() -> None:
    code = (
        "import sys; from beacon_memory.cli.main import app; "
        "app(['plan', '--model', 'qwen2.5-7b-instruct', '--hardware', 'l4'], standalone_mode=False); "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_json_has_the_fields_of_the_page() -> None:
    (told,) = lines(plan("--hardware", "l4", "--json"))
    assert list(told) == json_fields("plan")


def test_texts_are_counted_by_the_tokenizer_of_the_folder_or_by_characters(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", tiny_base("llama"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("The mill has two wheels. " * 8, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"id": "b", "text": "The well is deep."}\n\n', encoding="utf-8")
    paths = ["--texts", str(tmp_path / "notes"), "--texts", str(tmp_path / "rows.jsonl")]
    common = ["--model", str(checkpoint), "--hardware", "l4", "--json", *paths]
    (counted,) = lines(plan(*common))
    assert (counted["counted"], counted["complete"], counted["documents"]) == ("tokenizer", True, 2)
    assert counted["tokens"] == 25 * 8 + 17
    (guessed,) = lines(plan(*common, "--chars-per-token", "5"))
    assert (guessed["counted"], guessed["complete"], guessed["tokens"]) == ("characters", False, 40 + 4)
    (many,) = lines(plan(*common, "--documents", "1000"))
    assert (many["complete"], many["documents"], many["tokens"]) == (False, 1000, 500 * (25 * 8 + 17))


def test_bytes_are_those_of_the_store_for_texts_that_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", tiny_base("llama"))
    run = runner(tmp_path / "store", checkpoint, monkeypatch)
    Path("notes").mkdir()
    for name, times in {"a.txt": 3, "b.txt": 9}.items():
        Path("notes", name).write_text("The mill has two wheels, both of öak.\n\n" * times, encoding="utf-8")
    (told,) = lines(run("plan", "--texts", "notes", "--ratio", "4", "--hardware", "l4", "--json"))
    for kept in told["kept"]:
        run("add", "notes", "--ratio", "4", "--precision", kept["precision"])
        rows = lines(run("list", "--json"))
        assert (told["documents"], told["tokens"]) == (len(rows), sum(row["tokens"] for row in rows))
        files = sum(file.stat().st_size for file in (tmp_path / "store" / "kv").rglob("*.safetensors"))
        for bounds, there in ((kept["stored"], sum(row["bytes"] for row in rows)), (kept["files"], files)):
            assert bounds["low"] <= there <= bounds["high"]
            assert (bounds["low"] == bounds["high"]) is (kept["precision"] == "bfloat16")


def test_texts_that_no_prompt_can_hold_are_counted() -> None:
    (told,) = lines(plan("--lengths", "4000:3,9000:1", "--hardware", "l4", "--json"))  # the embedded model has 8,192
    assert told["too_long"] == 250
    assert "texts too long for a prompt" in plan("--lengths", "9000", "--hardware", "l4").stdout
    assert "texts too long" not in plan("--lengths", "4000", "--hardware", "l4").stdout


def test_a_device_too_small_for_the_weights_holds_no_memory() -> None:
    (told,) = lines(plan("--model", "llama-3.1-70b-instruct", "--hardware", "l4", "--json"))
    assert [kept["fitting"] for kept in told["kept"]] == [None] * 3
    assert "the weights do not fit" in plan("--model", "llama-3.1-70b-instruct", "--hardware", "l4").stdout


def test_bytes_are_called_exact_only_where_lengths_are_known(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", tiny_base("llama"))
    (tmp_path / "a.txt").write_text("The mill has two wheels. " * 8, encoding="utf-8")
    common = ["--model", str(checkpoint), "--hardware", "l4"]
    texts = [*common, "--texts", str(tmp_path / "a.txt")]
    for arguments, kv, file in (
        (common, "exact for these lengths", "estimate: texts made up"),
        (texts, "exact", "exact"),
        ([*texts, "--documents", "9"], "estimate: from a sample", "estimate: from a sample"),
        ([*texts, "--chars-per-token", "4"], "estimate: by characters", "estimate: by characters"),
    ):
        shown = plan(*arguments).stdout.splitlines()
        (row,) = [line for line in shown if line.startswith("K/V on disk, bfloat16")]
        (of_file,) = [line for line in shown if line.startswith("files with text, bfloat16")]
        assert [re.split(" {2,}", line)[-1] for line in (row, of_file)] == [kv, file], arguments


def test_prices_and_devices_can_be_given(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('[mine]\nkind = "gpu"\nflops = 1e14\nbandwidth = 1e12\nmemory = 4e10\n', encoding="utf-8")
    own = ["--hardware", "mine", "--hardware-file", str(file), "--json"]
    (unpriced,) = lines(plan(*own))
    assert unpriced["money"] is None
    cheap, dear = (json.loads(plan(*own, "--price", price).stdout)["money"]["compressing"] for price in ("1", "3"))
    assert dear["likely"] == pytest.approx(3 * cheap["likely"])
    assert "mine" in plan("--hardware", "list", "--hardware-file", str(file)).stdout
    file.write_text('[mine]\nkind = "abacus"\nflops = 1e14\nbandwidth = 1e12\nmemory = 4e10\n', encoding="utf-8")
    assert "kind='abacus' of 'mine' must be one of gpu, cpu" in plan(*own).stderr


def calibrated(waited: float) -> calibration.Calibration:
    speed = Speed(linear=4e11, attention=3e11, repeated=1e11, moving=1e10, bandwidth=9e9, layer=1e-3, load=1e9)
    return calibration.Calibration(
        speed=speed,
        machine="a",
        device="cpu",
        memory=1e10,
        weight_bytes=4,
        waited=waited,
        seconds=40.0,
        measured_at="b",
    )


@pytest.mark.parametrize(("waited", "warned"), [(1.0, False), (3.0, True)])
def test_a_calibration_of_a_busy_machine_says_so(
    capsys: pytest.CaptureFixture[str], waited: float, warned: bool
) -> None:
    note_calibration(calibrated(waited))
    said = capsys.readouterr().err
    assert "400 GFLOP/s reading" in said
    assert ("others were using the machine: it took 3.0 times as long" in said) is warned


def test_a_measured_machine_is_what_plans_are_for_by_default() -> None:
    refused = plan()
    assert refused.exit_code == 1
    assert "run `beacon-memory plan --calibrate`, or name a device with --hardware" in refused.stderr
    measured = calibrated(waited=1.0)
    calibration.write_calibration(measured)
    assert calibration.read_calibration() == measured
    (told,) = lines(plan("--json"))
    assert told["calibrated"] is True
    (half,) = lines(plan("--json", "--hardware", "l4"))  # which computes in 16 bits, and so are ready memories
    plain, wide = half["kept"][0], told["kept"][0]
    assert (wide["stored"], wide["ready"]["low"]) == (plain["stored"], 2 * plain["ready"]["low"])
    calibration.calibration_file().write_text("{}", encoding="utf-8")
    assert "`beacon-memory plan --calibrate` writes it anew" in plan().stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "abacus"], "--hardware is 'abacus', but must be 'this' or one of b200, h200"),
        (["--lengths", "long"], "--lengths is 'long', but must be tokens"),
        (["--lengths", "4000:0"], "lengths and weights must be above 0"),
        (["--shape", "layers"], "--shape must be numbers under names"),
        (["--shape", "layers=2"], "the numbers of a model are layers, hidden"),
        (["--shape", "layers=0", "--model", "qwen2.5-7b-instruct"], "layers=0 of the model must be a whole number"),
        (["--texts", "absent"], "'absent' does not exist"),
        (["--ratio", "half"], "ratio='half' must be 'auto' or a whole number"),
        (["--chars-per-token", "-1", "--texts", "."], "--chars-per-token is -1.0"),
        (
            ["--model", "qwen2.5-7b-instruct", "--compression", "beacon", "--ratio", "2", "--lengths", "900000"],
            "900000 tokens at ratio 2 need",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_reason(arguments: list[str], message: str) -> None:
    hardware = [] if "--hardware" in arguments else ["--hardware", "l4"]
    result = plan(*hardware, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr


def test_numbers_of_a_model_are_read_from_a_text() -> None:
    assert numbers_given("layers=2, hidden=64") == {"layers": 2, "hidden": 64}
    with pytest.raises(InputError, match="--shape must be numbers under names"):
        numbers_given("layers=x")
