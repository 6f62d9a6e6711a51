"""A model of small windows, a text of many of them, and what is kept of it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory import BeaconMemory
from beacon_memory.config import BeaconConfig
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.model import BeaconModel

TEXT = "".join(f"In the year {year} the miller of Wend sold {year % 97} sacks of flour. " for year in range(1700, 1708))
WINDOW = 32


def make_model(**overrides: Any) -> BeaconModel:
    return tiny_model(
        "llama",
        BeaconConfig(beacon_window=WINDOW),
        tokenizer=tiny_tokenizer(),
        **{"max_position_embeddings": 1024} | overrides,
    )


def kv_of(memory: BeaconMemory, id: str) -> MemoryKV:
    return memory.store.get(id).kv


def assert_same(ours: MemoryKV, theirs: MemoryKV, *, exact: bool = False) -> None:
    assert (ours.span, ours.counts.tolist()) == (theirs.span, theirs.counts.tolist())
    assert torch.equal(ours.positions, theirs.positions)
    assert not exact or (torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values))
    torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)
