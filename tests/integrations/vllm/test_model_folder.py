"""The folder of a model for vLLM: a stock checkpoint, and whose memories it can use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import some_ids
from training_samples import files_with_answers
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_beacon_memory import write_model_folder
from vllm_beacon_memory.__main__ import main
from vllm_beacon_memory.model_folder import ModelFolder

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.errors import ConfigError, CorruptFileError, InputError
from beacon_memory.modeling.answering import in_answers
from beacon_memory.modeling.model import BeaconModel


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return files_with_answers(tmp_path_factory.mktemp("files"))


@pytest.fixture
def written(files: tuple[Path, Path], tmp_path: Path) -> Path:
    write_model_folder(tmp_path / "model", *files, dtype="float32")
    return tmp_path / "model"


def test_it_is_a_stock_model_that_answers_with_both_loras(files: tuple[Path, Path], written: Path) -> None:
    ours = BeaconModel.from_pretrained(*files, device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(written)
    ids = torch.tensor([some_ids(9)])
    with torch.no_grad(), in_answers():
        expected = ours.base(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(ours.base(ids).logits, expected, atol=0.1)
    assert AutoTokenizer.from_pretrained(written).chat_template == ours.tokenizer.chat_template


def test_it_says_whose_memories_it_can_use(files: tuple[Path, Path], written: Path) -> None:
    ours, folder = BeaconModel.from_pretrained(*files, device="cpu"), ModelFolder.read(written)
    assert folder.fingerprint == ours.fingerprint
    assert folder.kv_shape == ours.kv_shape
    sink = BeaconCompressor(ours).sink
    assert torch.equal(folder.sink.keys, sink.keys)
    assert torch.equal(folder.sink.values, sink.values)
    assert torch.equal(folder.rope.inv_freq, ours.rope.inv_freq)


def test_the_command_writes_it(files: tuple[Path, Path], tmp_path: Path) -> None:
    main(str(tmp_path / "model"), *map(str, files))
    assert ModelFolder.read(tmp_path / "model").kv_shape == (3, 2, 8)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        write_model_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_failure_leaves_no_folder(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_beacon_memory.model_folder.save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_model_folder(tmp_path / "model", *files)
    assert not [*tmp_path.iterdir()]


def test_another_folder_is_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="is no folder of a model for vLLM"):
        ModelFolder.read(files[0])


def test_other_weights_are_refused(written: Path) -> None:
    weights = load_file(written / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, written / "model.safetensors")
    with pytest.raises(ConfigError, match="are not those that were written"):
        ModelFolder.read(written)


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100])
def test_a_damaged_file_is_refused(written: Path, damage: bytes) -> None:
    (written / "beacon_memory" / "model.safetensors").write_bytes(damage)
    with pytest.raises(CorruptFileError, match="cannot be read"):
        ModelFolder.read(written)


def test_one_of_another_format_is_refused(written: Path) -> None:
    path = written / "beacon_memory" / "model.safetensors"
    save_file(load_file(path), path, metadata={"beacon_memory": '{"format": 99}'})
    with pytest.raises(ConfigError, match="is of format 99"):
        ModelFolder.read(written)
