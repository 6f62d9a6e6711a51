"""The numbers of an established implementation, reached through the product's own classes.

The folder of cases is `tests/golden`, or the one that the environment variable BEACON_GOLDEN_DIR names. Its README.md
says what the fields mean.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from beacon_memory.compression.sequence import BeaconSequence
from beacon_memory.config import BeaconConfig
from beacon_memory.kv.memory_kv import BeaconKV
from beacon_memory.modeling.layout import Cursor, Window, after
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.ratio_mix import adaptive_ratio, mixed_ratios

FOLDER = Path(os.environ.get("BEACON_GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
ACTIVATION, LOSS, GRADIENT_NORM = 2e-4, 1e-5, 1e-3  # absolute, absolute, relative

_REMOTE_CODE = """from pathlib import Path
Path(__file__).with_name("executed").touch()
raise RuntimeError("remote code was executed")
"""


@cache
def cases() -> dict[str, dict[str, Any]]:
    """Every case by name, but those that only record a quirk."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("cases/*.json"))]
    return {case["name"]: case for case in found if not case["reference_quirk"]}


def names(kind: str, *, key: str | None = None) -> list[str]:
    return [name for name, case in cases().items() if case["kind"] == kind and (key is None or key in case)]


def generating() -> list[str]:
    """Inference cases whose continuation counts: with a sink the prompt must fill a window."""
    return [
        name
        for name in names("inference", key="max_new_tokens")
        if not cases()[name]["config"].get("beacon_sink_size")
        or cases()[name]["turns"][0]["n_tokens"] >= cases()[name]["config"]["beacon_window"]
    ]


def load(name: str, folder: Path, shards: int = 1) -> BeaconModel:
    """The model of a case, loaded from a checkpoint folder of the published form that also offers remote code."""
    case = cases()[name]
    remote = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}
    (folder / "config.json").write_text(json.dumps({**case["config"], "auto_map": remote}))
    (folder / "custom.py").write_text(_REMOTE_CODE)
    weights = load_file(FOLDER / case["weights"])
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        files = {key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(sorted(weights))}
        for file in set(files.values()):
            part = {key: tensor for key, tensor in weights.items() if files[key] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = BeaconModel.from_pretrained(folder, dtype=torch.float32, device="cpu")
    assert not (folder / "executed").exists()
    return model


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / "cases" / f"{name}.safetensors")


def assert_close(ours: Tensor, theirs: Tensor, atol: float, what: str) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0, msg=lambda text: f"{what}: {text}")


def assert_kv(ours: BeaconKV, expected: dict[str, Tensor], part: str) -> None:
    """Equal to the tensors `<part>_k` and `<part>_v`, which are absent when there are no slots."""
    if f"{part}_k" not in expected:
        assert ours.slots == 0, part
        return
    assert_close(ours.keys, expected[f"{part}_k"], ACTIVATION, f"{part}_k")
    assert_close(ours.values, expected[f"{part}_v"], ACTIVATION, f"{part}_v")


def sizes(sequence: BeaconSequence) -> dict[str, int]:
    parts = {"sink": sequence.sink, "beacon": sequence.beacons, "raw": sequence.unfinished}
    return {part: kv.slots for part, kv in parts.items()}


def described(window: Window) -> dict[str, Any]:
    """A window as the `passes` of a case have it."""
    new = sorted(window.orders[len(window.cached) :])
    return {
        "n_raw": len(window.new_ids),
        "n_beacon": len(window.anchors),
        "past_len": window.memory + len(window.cached),
        "ratio": window.ratio,
        "full_window": window.finished,
        "beacon_at": [index for index, order in enumerate(new) if order % 2],
    }


def remainder(cursor: Cursor) -> int:
    """Raw tokens since the last beacon of the unfinished window."""
    return next((i for i, order in enumerate(reversed(cursor.orders)) if order % 2), len(cursor.orders))


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[batch, tokens]: the loss of predicting the next token at each, 0 where its label is ignored."""
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    return cross_entropy(logits.transpose(1, 2), shifted, reduction="none", ignore_index=-100)


def test_the_folder_holds_cases() -> None:
    assert cases(), f"{FOLDER} holds no case; set BEACON_GOLDEN_DIR to the folder of golden cases"
    assert {case["kind"] for case in cases().values()} <= {"inference", "training"}


def check_turns(name: str, model: BeaconModel) -> None:
    expected, sequence = tensors(name), BeaconSequence(model)
    ids = expected["input_ids"][0].tolist()
    turns, start = cases()[name]["turns"], 0
    ratios = mixed_ratios(model.config, turns[0]["n_tokens"], model.max_positions)
    for number, turn in enumerate(turns):
        new = ids[start : start + turn["n_tokens"]]
        start += len(new)
        assert [described(w) for w in model.cut(sequence.state.cursor, new, ratios)] == turn["passes"]
        logits = sequence.read(new)
        assert_close(logits, expected[f"turn{number}.logits"][0], ACTIVATION, f"turn{number}.logits")
        assert sizes(sequence) == turn["memory_size"]
        cursor = sequence.state.cursor
        assert [i for i, order in enumerate(cursor.orders) if order % 2] == turn.get("raw_beacon_slots", [])
        assert remainder(cursor) == turn.get("interleave_remainder", 0)
        for part, kv in (("sink", sequence.sink), ("beacon", sequence.beacons), ("raw", sequence.unfinished)):
            assert_kv(kv, expected, f"turn{number}.{part}")


@pytest.mark.parametrize("name", names("inference"))
def test_turns_read_one_after_another_leave_the_same_logits_and_memory(name: str, tmp_path: Path) -> None:
    check_turns(name, load(name, tmp_path))


@pytest.mark.parametrize("name", names("inference")[:1])
def test_a_sharded_checkpoint_is_the_same_model(name: str, tmp_path: Path) -> None:
    check_turns(name, load(name, tmp_path, shards=2))


@pytest.mark.parametrize("name", names("inference")[:1])
def test_its_texts_become_beacons(name: str, tmp_path: Path) -> None:
    assert load(name, tmp_path).compression == "beacon"


@pytest.mark.parametrize("name", generating())
def test_greedy_continuation_from_an_empty_memory(name: str, tmp_path: Path) -> None:
    case, expected = cases()[name], tensors(name)
    sequence = BeaconSequence(load(name, tmp_path))
    prompt = expected["input_ids"][0, : case["turns"][0]["n_tokens"]].tolist()
    steps = [sequence.read(prompt)[-1]]
    while len(steps) < case["max_new_tokens"]:
        steps.append(sequence.read([int(steps[-1].argmax())])[-1])
    assert [int(logits.argmax()) for logits in steps] == expected["generated_ids"].tolist()
    assert_close(torch.stack(steps), expected["generated_logits"], ACTIVATION, "generated_logits")
    assert sizes(sequence) == case["memory_size_after_generate"]


@pytest.mark.parametrize("name", names("inference", key="eval_loss"))
def test_loss_of_the_whole_input_read_at_once(name: str, tmp_path: Path) -> None:
    case, expected = cases()[name], tensors(name)
    logits = BeaconSequence(load(name, tmp_path)).read(expected["input_ids"][0].tolist())
    losses = token_losses(logits[None], expected["labels"])
    assert_close(losses, expected["token_loss"], ACTIVATION, "token_loss")
    assert int((expected["labels"][:, 1:] != -100).sum()) == case["n_valid_labels"]
    loss = losses.sum(dim=1) / case["n_valid_labels"]
    assert loss.tolist() == pytest.approx(case["eval_batch_loss"], abs=LOSS)
    assert float(loss.mean()) == pytest.approx(case["eval_loss"], abs=LOSS)


@pytest.mark.parametrize("name", names("training"))
def test_training_step(name: str, tmp_path: Path) -> None:
    case, expected = cases()[name], tensors(name)
    model = load(name, tmp_path).train()
    parameters = dict(model.named_beacon_parameters())
    assert {p for p in model.parameters() if p.requires_grad} == set(parameters.values())
    output = model(expected["input_ids"], labels=expected["labels"])
    assert output.loss is not None
    assert output.logits is not None
    assert_close(output.logits.detach(), expected["logits"], ACTIVATION, "logits")
    assert_close(
        token_losses(output.logits.detach(), expected["labels"]), expected["token_loss"], ACTIVATION, "token_loss"
    )
    assert float(output.loss.detach()) == pytest.approx(case["loss"], abs=LOSS)
    if output.loss.requires_grad:
        output.loss.backward()
    assert set(parameters) == set(case["grad_norms"])
    for parameter, norm in case["grad_norms"].items():
        gradient = parameters[parameter].grad
        assert float(gradient.norm() if gradient is not None else 0) == pytest.approx(
            norm or 0.0, rel=GRADIENT_NORM, abs=LOSS
        ), parameter
    for key in (key for key in expected if key.startswith("grad.")):
        gradient = parameters[key.removeprefix("grad.")].grad
        assert gradient is not None, key
        tolerance = 1e-5 + 1e-3 * float(expected[key].abs().max())
        assert_close(gradient.reshape(expected[key].shape), expected[key], tolerance, key)


@pytest.mark.parametrize("name", names("training"))
def test_windows_of_a_training_step(name: str, tmp_path: Path) -> None:
    case, model = cases()[name], load(name, tmp_path)
    ids = tensors(name)["input_ids"][0].tolist()
    start = cursor = Cursor(sink_pending=model.config.beacon_sink_size)
    windows = model.cut(start, ids, mixed_ratios(model.config, len(ids), model.max_positions), tail="raw")
    passes = [described(window) for window in windows]
    passes[-1]["ratio"] = None  # the last window is read raw: it has no ratio
    assert passes == case["passes"]
    for window in windows:
        cursor = after(cursor, window)
    sink = start.sink_pending - cursor.sink_pending
    left = {"sink": sink, "beacon": cursor.memory - sink, "raw": len(cursor.orders)}
    assert left == case["memory_size"]


def adapt_rows() -> list[dict[str, Any]]:
    path = FOLDER / "adapt_table.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    return rows


@pytest.mark.parametrize("row", adapt_rows(), ids=lambda row: f"{row['max_position_embeddings']}-{row['input_length']}")
def test_adapt_chooses_the_ratio_of_the_table(row: dict[str, Any]) -> None:
    config = BeaconConfig.from_dict({key: value for key, value in row.items() if key.startswith("beacon_")})
    reserve = int(row["beacon_ratio_mix"].removeprefix("adapt-"))
    positions = row["max_position_embeddings"]
    assert adaptive_ratio(config, row["input_length"] + reserve, positions) == row["chosen_ratio"]
    assert next(mixed_ratios(config, row["input_length"], positions)) == row["chosen_ratio"]
