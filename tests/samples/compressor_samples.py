"""Documents of all lengths and settings of all kinds to compress them with."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from tiny_models import ReferenceRead, some_ids, tiny_model, tiny_tokenizer

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.compression.work import CompressedDocument, Work
from beacon_memory.config import BeaconConfig
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.modeling.model import BeaconModel

WINDOW = 8
# lengths below a unit, of a window, one more, and of several windows; ratios that differ from window to window
RATIOS = {1: [4], 3: [4], 8: [2], 9: [4, 2], 21: [2, 4, 3], 18: [0, 99, 1]}
DOCUMENTS = [Work(some_ids(tokens, seed=tokens), ratios) for tokens, ratios in RATIOS.items()]

every_method = pytest.mark.parametrize(
    ("attn", "embed", "placement", "sink"),
    list(product(["hidden", "full-coverage"], ["last-token", "learned"], ["end", "salient", "salient-words"], [0, 1])),
)
every_compression = pytest.mark.parametrize("compression", list(BUILT_IN))
by_choice = pytest.mark.parametrize("compression", ["select", "hybrid"])
every_score = pytest.mark.parametrize("score", ["repeat", "expected"])


@cache
def model_of(
    family: str = "llama",
    attn: str = "hidden",
    embed: str = "last-token",
    placement: str = "end",
    sink: int = 1,
    param: tuple[str, ...] = ("q", "k", "v"),
) -> BeaconModel:
    config = BeaconConfig(
        beacon_window=WINDOW,
        beacon_ratio=(2, 4),
        beacon_param=param,
        beacon_attn=attn,
        beacon_embed=embed,
        beacon_placement=placement,
        beacon_sink_size=sink,
    )
    return tiny_model(family, config, tokenizer=tiny_tokenizer())


def compress(
    model: BeaconModel, documents: Iterable[Work] = tuple(DOCUMENTS), compression: str = "beacon", **options: Any
) -> list[CompressedDocument]:
    compressor = BeaconCompressor(model, **options)
    compressed = list(compressor.compress(enumerate(documents), compression=compression))
    assert [number for number, _ in compressed] == list(range(len(compressed)))
    return [document for _, document in compressed]


def assert_same(ours: MemoryKV, theirs: MemoryKV | ReferenceRead) -> None:
    """Equal, with numbers that are close; what is read of beacons has the same slots in every head."""
    if isinstance(theirs, ReferenceRead):
        theirs = MemoryKV.of(BeaconKV(theirs.keys, theirs.values))
    assert torch.equal(ours.counts, theirs.counts)
    assert torch.equal(ours.positions, theirs.positions)
    assert ours.span == theirs.span
    torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=0)
