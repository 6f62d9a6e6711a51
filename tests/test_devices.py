"""All that runs on a device runs there to its end, mixes it with no other, and gives what the processor gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from devices import Computed, IndexedAnywhere, move, numbers
from tiny_models import some_ids, tiny_model, tiny_tokenizer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode
from training_samples import a_sample

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.selection import read_raw, read_sink
from beacon_memory.compression.work import Work
from beacon_memory.config import BeaconConfig
from beacon_memory.generation.decode_loop import DecodeLoop
from beacon_memory.generation.generate import Request, generate
from beacon_memory.generation.options import generation_config
from beacon_memory.hot import HotMemories
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.prefix import Prefix, Section
from beacon_memory.kv.prefix import _blocks as blocks_of
from beacon_memory.kv.quantize import QuantizedKV, quantized
from beacon_memory.kv.rope import Rope
from beacon_memory.lookup import Lookup
from beacon_memory.modeling import prefix_attention
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.prefix_attention import PrefixBatch, attend_behind
from beacon_memory.training.losses import TrainingModel

CONFIG = BeaconConfig(beacon_window=32, beacon_sink_size=1)
WINDOWS = (0, 32, 64)  # where those of 80 tokens begin


def a_model(config: BeaconConfig = CONFIG, **settings: Any) -> BeaconModel:
    return tiny_model("llama", config, tokenizer=tiny_tokenizer(), max_position_embeddings=2048, **settings)


@contextmanager
def device(*models: BeaconModel, name: str = "cuda") -> Iterator[Computed]:
    with Computed() as computed, IndexedAnywhere():
        for model in models:
            move(model, name)
        yield computed


def compressed(model: BeaconModel, compression: str, score: str = "repeat", tokens: int = 80) -> MemoryKV:
    compressor = BeaconCompressor(model, score=score)
    work = Work(some_ids(tokens), compressor.ratios(tokens, 4))
    ((_, document),) = compressor.compress([("document", work)], compression=compression)
    return document.kv


def same(on_device: Tensor, on_cpu: Tensor) -> bool:
    assert on_device.device.type != "cpu"
    return torch.allclose(numbers(on_device), on_cpu, atol=1e-5)


def test_devices_are_not_mixed() -> None:
    with device(), pytest.raises(FakeTensorDeviceMismatchError):
        torch.ones(2, device="cuda") + torch.ones(2)


@pytest.mark.parametrize(
    ("compression", "score", "dense"),
    [
        ("beacon", "repeat", 0),
        ("beacon", "repeat", 2),
        ("select", "repeat", 0),
        ("select", "expected", 0),
        ("hybrid", "repeat", 0),
        ("hybrid", "expected", 0),
    ],
)
def test_compressing(compression: str, score: str, dense: int) -> None:
    config = replace(CONFIG, beacon_dense_ratio=dense)
    expected = compressed(a_model(config), compression, score)
    with device(model := a_model(config)):
        kv = compressed(model, compression, score)
        assert all(same(getattr(kv, part), getattr(expected, part)) for part in ("keys", "values", "positions"))


@torch.inference_mode()
def looked_up(model: BeaconModel) -> list[float]:
    lookup, sink = Lookup(model), MemoryKV.of(read_sink(model))
    read = MemoryKV.of(read_raw(model, model.prefix(sink), some_ids(40)))
    sections = dict.fromkeys(range(3), [torch.cat((torch.tensor([-1]), torch.arange(40) // 11))] * 2)
    return lookup.relevance("Who rows?", model.prefix(sink, read), sections, 4)


def test_looking_up() -> None:
    expected = looked_up(a_model())
    with device(model := a_model()):
        assert looked_up(model) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("compression", ["select", "beacon"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing(bits: int, compression: str) -> None:
    expected = quantized(compressed(a_model(), compression), bits, WINDOWS)
    with device(model := a_model()):
        on_device = quantized(compressed(model, compression), bits, WINDOWS)
        for part in ("key_scales", "key_zeros", "value_scales", "value_zeros", "groups"):
            assert same(getattr(on_device, part).float(), getattr(expected, part).float())
        for part in ("keys", "values"):  # a number that is half way between two codes may get either
            its, others = (numbers(getattr(one, part)).int() for one in (on_device, expected))
            assert (its == others).float().mean() > 0.99
        assert same(on_device.dequantized().keys, expected.dequantized().keys)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_memory_grows_on_its_device(bits: int) -> None:
    def grown(kv: MemoryKV) -> QuantizedKV:
        return quantized(kv, bits, WINDOWS).grown(64, kv.between(64, 80))

    expected = grown(compressed(a_model(), "select")).dequantized()
    with device(model := a_model()):
        on_device = grown(compressed(model, "select")).dequantized()
        assert same(on_device.keys, expected.keys)
        assert same(on_device.positions.float(), expected.positions.float())


@pytest.mark.parametrize("bits", [8, 4])
def test_loading_what_was_quantized(bits: int) -> None:
    stored = quantized(compressed(a_model(), "select"), bits)
    loaded = stored.dequantized()
    with device():
        on_device = stored.to("cuda").dequantized()
        assert same(on_device.keys, loaded.keys)
        assert same(on_device.values, loaded.values)


@pytest.mark.parametrize("bits", [16, 8])
def test_a_memory_that_has_to_leave_the_device_waits_in_pinned_memory(bits: int) -> None:
    kv = compressed(a_model(), "select")
    stored = kv if bits == 16 else quantized(kv, bits)
    model, nothing = a_model(), pytest.fail
    _ = model.fingerprint
    with device(model) as computed:
        hot = HotMemories(int(1.5 * Section.of(kv, model.rope).nbytes * min(bits, 12) / 16))
        ((first, _),) = hot.sections(model, [("first", lambda: stored)], 2000)
        keys = numbers(first.keys).clone()
        hot.sections(model, [("second", lambda: stored)], 2000)
        assert computed.pinned == 2 if bits == 16 else computed.pinned > 2
        ((again, place),) = hot.sections(model, [("first", lambda: nothing("it was loaded again"))], 2000)
        assert place == "ram"
        assert same(again.keys, keys)


@pytest.mark.parametrize("bits", [8, 4])
def test_asking_a_quantized_memory_that_is_kept(bits: int) -> None:
    kv = quantized(compressed(a_model(), "select"), bits)

    def section(model: BeaconModel) -> Section:
        hot = HotMemories(10**6)
        ((_, first),) = hot.sections(model, [("kept", lambda: kv)], 2000)
        ((found, place),) = hot.sections(model, [("kept", lambda: pytest.fail("it was loaded again"))], 2000)
        assert (first, place) == ("cold", "ram" if model.device.type == "cpu" else "device")
        assert hot._places[model.device].used < 0.7 * found.nbytes
        return found

    expected, model = section(a_model()), a_model()
    _ = model.fingerprint  # which is told by the numbers of its weights
    with device(model):
        found = section(model)
        assert same(found.keys, expected.keys)
        assert same(found.values, expected.values)


def requests(model: BeaconModel) -> list[Request]:
    """Requests of different lengths behind memories of different kinds, one of them shared, and behind none."""
    select, beacon = compressed(model, "select"), compressed(model, "beacon", tokens=50)
    memories = [select, beacon, select, MemoryKV.of(model.empty_kv()), MemoryKV.concat([beacon, select])]
    return [Request(memory, some_ids(3 + 2 * number)) for number, memory in enumerate(memories)]


def test_generating_behind_memories() -> None:
    def tokens(model: BeaconModel) -> list[tuple[int, ...]]:
        config = generation_config(model, None, {"max_new_tokens": 5, "min_new_tokens": 5})
        return [texts[0].tokens for texts in generate(model, requests(model), config)]

    expected = tokens(a_model())
    with device(model := a_model()):
        assert tokens(model) == expected


def test_decoding_requests_together() -> None:
    def tokens(model: BeaconModel) -> list[tuple[int, ...]]:
        config = generation_config(model, None, {"max_new_tokens": 5, "min_new_tokens": 5})
        loop = DecodeLoop(model)
        return [ticket.result().tokens for ticket in [loop.submit(one, config) for one in requests(model)]]

    expected = tokens(a_model())
    with device(model := a_model()):
        assert tokens(model) == expected


@pytest.mark.parametrize("compression", ["beacon", "hybrid"])
def test_a_step_of_training(compression: str) -> None:
    samples = [a_sample([some_ids(30)], [[4]], (some_ids(9), 4), (some_ids(7), 2))] * 2

    def stepped(model: BeaconModel) -> tuple[Tensor, dict[str, Tensor]]:
        trained = dict(model.named_beacon_parameters())
        optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
        loss = TrainingModel(model, distill_weight=0.5, compression=compression)(samples).loss
        loss.backward()
        optimizer.step()
        return loss.detach(), trained

    loss, trained = stepped(a_model())
    before = dict(a_model().named_beacon_parameters())
    assert not torch.equal(trained["beacon_embed_offset"], before["beacon_embed_offset"])
    # for a gradient, a torch without CUDA asks its device for streams; this one has none
    with device(model := a_model(), name="meta"):
        its_loss, its_trained = stepped(model)
        assert same(its_loss, loss)
        assert all(same(its_trained[name].detach(), parameter.detach()) for name, parameter in trained.items())


class Counted(FakeTensorMode):
    """Tensors without data, and how many operators were called with them."""

    operators = 0

    def dispatch(self, *called: Any) -> Any:
        self.operators += 1
        return super().dispatch(*called)


def operators_behind(counts: tuple[int, ...], requests: int) -> int:
    """Return the operators of attention to a memory with so many entries in each head."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda")

    with Counted() as mode, IndexedAnywhere():
        keys, values = (empty(sum(counts), 8) for _ in "kv")
        section = Section(keys, values, (counts,), 40, (blocks_of(counts, keys, values),))
        prefix = Prefix([section], Rope(torch.empty(4, device="cuda"), scaling=1.0))
        batch = PrefixBatch([prefix] * requests)
        query, (key, value) = empty(requests, 2 * len(counts), 1, 8), (empty(requests, len(counts), 3, 8) for _ in "kv")
        attend_behind(batch, 0, query, key, value, None, None, 0.0)  # makes what all layers share
        mode.operators = 0
        attend_behind(batch, 0, query, key, value, None, None, 0.0)
    return mode.operators


@pytest.mark.parametrize("layout", [prefix_attention._Packed, prefix_attention._Padded])
def test_attention_to_memories_takes_as_many_operators_for_more_heads_and_requests(
    monkeypatch: pytest.MonkeyPatch, layout: type
) -> None:
    monkeypatch.setattr(prefix_attention, "_layout", lambda *_: layout)
    few = operators_behind((9, 17, 3, 20), requests=2)
    assert operators_behind((9, 17, 3, 20, 5, 11, 30, 8), requests=2) == few
    assert operators_behind((9, 17, 3, 20), requests=6) == few
