"""A device that is really there gives what the processor gives: BEACON_MEMORY_TEST_DEVICE=cuda, for example."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from tiny_models import some_ids, tiny_model, tiny_tokenizer

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.config import BeaconConfig
from beacon_memory.generation.generate import Request, generate
from beacon_memory.generation.options import generation_config
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import quantized
from beacon_memory.modeling.model import BeaconModel

DEVICE = os.environ.get("BEACON_MEMORY_TEST_DEVICE", "cpu")
CONFIG = BeaconConfig(beacon_window=32, beacon_sink_size=1)


def a_model(device: str, config: BeaconConfig = CONFIG) -> BeaconModel:
    model = tiny_model("llama", config, tokenizer=tiny_tokenizer(), max_position_embeddings=2048)
    return model.to(device)


def compressed(model: BeaconModel, compression: str, score: str = "repeat") -> MemoryKV:
    compressor = BeaconCompressor(model, score=score)
    work = Work(some_ids(80), compressor.ratios(80, 4))
    return compressor.compress_one(work, compression=compression).kv


@pytest.mark.parametrize("dense", [0, 2])
@pytest.mark.parametrize("score", ["repeat", "expected"])
@pytest.mark.parametrize("compression", ["beacon", "select", "hybrid"])
def test_compressing(compression: str, score: str, dense: int) -> None:
    config = replace(CONFIG, beacon_dense_ratio=dense)
    there, here = (compressed(a_model(device, config), compression, score) for device in (DEVICE, "cpu"))
    assert there.keys.device.type == torch.device(DEVICE).type
    assert torch.allclose(there.keys.cpu(), here.keys, atol=1e-3)
    assert torch.allclose(there.values.cpu(), here.values, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_loading_what_was_quantized(bits: int) -> None:
    stored = quantized(compressed(a_model("cpu"), "select"), bits)
    assert torch.allclose(stored.to(DEVICE).dequantized().keys.cpu(), stored.dequantized().keys, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generating_for_many_requests_gives_what_each_gets_alone(dtype: torch.dtype) -> None:
    model = a_model(DEVICE).to(dtype)
    config = generation_config(model, None, {"max_new_tokens": 4})
    memories = [compressed(model, "select"), compressed(model, "beacon")]
    requests = [Request(memories[number % 2], some_ids(4 + number)) for number in range(5)]
    together = generate(model, requests, config)
    if dtype == torch.float32:  # in 16 bits, two tokens may be as likely
        assert [one[0].tokens for one in together] == [generate(model, [r], config)[0][0].tokens for r in requests]
    assert len(together) == len(requests)
