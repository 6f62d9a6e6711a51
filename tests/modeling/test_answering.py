"""A LoRA of answers changes how what follows a memory is read, and nothing else."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from tiny_models import some_ids, tiny_base
from torch import Tensor
from training_samples import LORA, a_model, files_with_answers, with_answers

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.errors import AdapterError
from beacon_memory.generation.decode_loop import DecodeLoop
from beacon_memory.generation.generate import Request, generate
from beacon_memory.generation.options import generation_config
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling import answering
from beacon_memory.modeling.cache import MemoryCache
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.training.lora import answering_parameters

DOCUMENT, QUESTION = some_ids(21, seed=1), some_ids(6, seed=2)


def memory(model: BeaconModel, compression: str = "select") -> MemoryKV:
    compressor = BeaconCompressor(model)
    document = compressor.compress_one(Work(DOCUMENT, [2, 2, 2]), compression=compression)
    return MemoryKV.concat([MemoryKV.of(compressor.sink), document.kv])


def answer(model: BeaconModel, prefix: MemoryKV) -> Tensor:
    """The logits of a question behind a memory."""
    cache = MemoryCache([model.prefix(prefix)], config=model.base.config)
    with torch.no_grad():
        return model.base(torch.tensor([QUESTION]), past_key_values=cache).logits[0]  # type: ignore[no-any-return]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and an adapter with a LoRA of answers."""
    return files_with_answers(tmp_path)


def load(base: Path, adapter: Path) -> BeaconModel:
    return BeaconModel.from_pretrained(base, adapter, device="cpu")


@pytest.mark.parametrize("compression", ["select", "beacon", "hybrid"])
def test_documents_are_read_as_without_it(compression: str) -> None:
    plain = a_model()
    ours, expected = memory(with_answers(a_model()), compression), memory(plain, compression)
    assert torch.equal(ours.keys, expected.keys)
    assert torch.equal(ours.values, expected.values)
    assert with_answers(a_model()).fingerprint == plain.fingerprint


@pytest.mark.parametrize("small", [0, 2**23], ids=["apart", "added"])
def test_what_follows_is_read_as_by_a_model_that_has_it_in_its_weights(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is that of the plain model in both cases."""
    monkeypatch.setattr(answering, "_SMALL", small)
    model, merged = with_answers(a_model()), with_answers(a_model())
    prefix = memory(model)
    changed = dict(answering_parameters(merged.base))
    base = merged.detach()
    with torch.no_grad():
        for name in {name.rpartition(".")[0] for name in changed}:
            layer = base.get_submodule(name)
            layer.weight += (changed[f"{name}.up"] @ changed[f"{name}.down"]) * (LORA.alpha / LORA.rank)  # type: ignore[operator]
    expected = BeaconModel(base, model.config)
    torch.testing.assert_close(answer(model, prefix), answer(expected, prefix), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(answer(model, prefix), answer(a_model(), prefix), atol=0.1)


def test_a_pass_of_rows_and_generation_agree() -> None:
    model = with_answers(a_model())
    prefix = memory(model)
    layout = BeaconLayout.build([Piece(Cursor(), [Window.behind(0, QUESTION)])], model.config)
    with torch.no_grad():
        passes = {
            answers: model.head(
                model.run(layout, model.empty_kv(), [], prefixes=[model.prefix(prefix)], answers=answers).hidden
            )
            for answers in (True, False)
        }
    torch.testing.assert_close(passes[True], answer(model, prefix), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(passes[False], answer(a_model(), prefix), atol=1e-4, rtol=1e-4)


def test_requests_decoded_together_get_what_each_gets_alone() -> None:
    model = with_answers(a_model())
    config = generation_config(model, None, {"max_new_tokens": 8, "do_sample": False})
    requests = [Request(memory(model), some_ids(3 + number, seed=number)) for number in range(4)]
    loop = DecodeLoop(model)
    tickets = [loop.submit(request, config) for request in requests]
    together = [ticket.result().tokens for ticket in tickets]
    assert together == [generate(model, [request], config)[0][0].tokens for request in requests]
    plain = a_model()
    assert together != [generate(plain, [request], config)[0][0].tokens for request in requests]


def test_a_document_read_in_another_thread_meanwhile_is_read_without_it() -> None:
    model = with_answers(a_model())
    expected, prefix = memory(a_model()), memory(model)
    done = threading.Event()

    def keep_answering() -> None:
        while not done.is_set():
            answer(model, prefix)

    thread = threading.Thread(target=keep_answering)
    thread.start()
    try:
        for _ in range(10):
            assert torch.equal(memory(model).keys, expected.keys)
    finally:
        done.set()
        thread.join()


def test_an_adapter_brings_it(files: tuple[Path, Path]) -> None:
    model, loaded = with_answers(a_model()), load(*files)
    prefix = memory(model)
    torch.testing.assert_close(answer(loaded, prefix), answer(model, prefix), atol=1e-4, rtol=1e-4)
    assert json.loads((files[1] / "answers" / "adapter_config.json").read_text())["r"] == LORA.rank


def test_it_is_saved_again_with_the_adapter(files: tuple[Path, Path], tmp_path: Path) -> None:
    load(*files).save_adapter(tmp_path / "again")
    kept = [folder / "answers" / "adapter_model.safetensors" for folder in (files[1], tmp_path / "again")]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_a_model_without_its_beacons_is_the_stock_model(files: tuple[Path, Path]) -> None:
    base = load(*files).detach()
    stock = tiny_base("llama")
    assert [name for name, _ in base.named_modules()] == [name for name, _ in stock.named_modules()]
    ids = torch.tensor([DOCUMENT])
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, stock(ids).logits, atol=1e-5, rtol=1e-5)


def test_an_adapter_with_another_is_not_taken_up(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="another LoRA"):
        a_model().load_adapter(files[1])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", b"{}"),
        ("adapter_config.json", b"no JSON"),
        ("adapter_model.safetensors", b"no tensors"),
        ("adapter_model.safetensors", None),
    ],
)
def test_one_that_cannot_be_used_is_named(files: tuple[Path, Path], file: str, content: bytes | None) -> None:
    path = files[1] / "answers" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AdapterError, match="the LoRA of answers in"):
        load(*files)
