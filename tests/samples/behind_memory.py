"""Tiny models behind a memory, and greedy options for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiny_models import MODELS, tiny_model, tiny_tokenizer

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.config import BeaconConfig
from beacon_memory.generation.options import generation_config
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.results import Answer


def make_model(name: str = "llama", window: int = 16, **overrides: Any) -> BeaconModel:
    family, settings = MODELS[name]
    config = BeaconConfig(beacon_window=window)
    return tiny_model(family, config, tokenizer=tiny_tokenizer(), **settings, **overrides)


def compressed(model: BeaconModel, ids: list[int], ratio: int, compression: str = "select") -> MemoryKV:
    """Sink and document, as they are loaded."""
    compressor = BeaconCompressor(model, reserve=0)
    document = compressor.compress_one(Work(ids, compressor.ratios(len(ids), ratio)), compression=compression)
    return MemoryKV.concat([MemoryKV.of(compressor.sink), document.kv])


def no_memory(model: BeaconModel) -> MemoryKV:
    return MemoryKV.of(model.empty_kv())


def greedy(model: BeaconModel, stop: str | None = None, **options: Any) -> Any:
    return generation_config(model, stop, {"max_new_tokens": 12, "eos_token_id": None, **options})


def printable_part(model: BeaconModel, tokens: Sequence[int]) -> str:
    """A character from the middle of a text that is whole by itself, as a single byte need not be."""
    characters = [model.tokenizer.decode([token]) for token in tokens]
    return next(c for c in characters[1:-1] if c.isascii() and c.isprintable() and c != characters[0])


def places(answer: Answer) -> tuple[str, ...]:
    """Where the memories of an answer's documents were."""
    assert answer.ids == tuple(one.id for one in answer.usage.documents)
    return tuple(one.place for one in answer.usage.documents)
