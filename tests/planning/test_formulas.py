"""FLOPs are compared with those that torch counts while the real code runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import some_ids, tiny_model, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.config import BeaconConfig
from beacon_memory.planning import formulas
from beacon_memory.planning.formulas import (
    break_even,
    compression_work,
    first_token_seconds,
    prefill_work,
    token_seconds,
)
from beacon_memory.planning.hardware import Speed
from beacon_memory.planning.measure import shape_of
from beacon_memory.planning.sizes import Way, window_sizes

CONFIG = BeaconConfig(beacon_window=512)
TOKENS = 1200
SPEED = Speed(linear=1e12, attention=5e11, repeated=1e11, moving=1e10, bandwidth=1e11, layer=1e-4, load=1e9)


def test_numbers_of_passes_are_those_of_the_code() -> None:
    from beacon_memory.compression import selection
    from beacon_memory.modeling import repetition

    assert (formulas.PIECE, formulas.VIEW) == (repetition.PIECE, selection._VIEW)


@pytest.mark.parametrize(
    ("compression", "score", "config"),
    [
        ("select", "repeat", CONFIG),
        ("hybrid", "repeat", CONFIG),
        ("beacon", "repeat", CONFIG),
        ("beacon", "repeat", replace(CONFIG, beacon_dense_ratio=2)),
    ],
)
def test_products_with_weights_are_those_that_torch_counts(compression: str, score: str, config: BeaconConfig) -> None:
    model = tiny_model("llama", config, tokenizer=tiny_tokenizer(), max_position_embeddings=4096)
    compressor = BeaconCompressor(model, score=score)
    compressor.sink  # noqa: B018  # read once for all documents
    work = Work(some_ids(TOKENS), compressor.ratios(TOKENS, 8, compression))
    with FlopCounterMode(display=False) as counter:
        compressor.compress_one(work, compression=compression)
    counts = counter.get_flop_counts()["Global"]
    linear = sum(flops for operation, flops in counts.items() if str(operation) in ("aten.mm", "aten.addmm"))
    way = Way(compression, score, 8, config)
    expected = compression_work(shape_of(model), window_sizes(TOKENS, way), way)
    assert linear == pytest.approx(expected.linear, rel=0.02)
    if compression == "select" or config.beacon_dense_ratio:
        # attention of the repetition is made of batched products, and nothing else is
        repeated = sum(flops for operation, flops in counts.items() if "bmm" in str(operation))
        assert repeated == pytest.approx(expected.repeated, rel=0.1)


def test_a_prompt_takes_the_flops_that_torch_counts() -> None:
    model = tiny_model("llama", CONFIG, max_position_embeddings=4096)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.base(torch.tensor([some_ids(300)]), use_cache=False, logits_to_keep=1)
    counts = counter.get_flop_counts()["Global"]
    linear = sum(flops for operation, flops in counts.items() if str(operation) in ("aten.mm", "aten.addmm"))
    assert linear == pytest.approx(prefill_work(shape_of(model), 300).linear, rel=0.001)


def test_choosing_by_expectation_takes_about_half_of_the_work_of_repeating() -> None:
    model = tiny_model("llama", CONFIG)
    expected, repeated = (
        compression_work(shape_of(model), window_sizes(TOKENS, way), way).linear
        for way in (Way("select", score, 8, CONFIG) for score in ("expected", "repeat"))
    )
    assert expected == repeated / 2


def test_a_first_token_takes_no_less_than_reading_the_weights() -> None:
    shape = shape_of(tiny_model("llama", CONFIG))
    seconds = first_token_seconds(shape, prefill_work(shape, 1), 0.0, SPEED, 2)
    assert seconds == pytest.approx(token_seconds(shape, 0.0, SPEED, 2))
    assert first_token_seconds(shape, prefill_work(shape, 9000), 0.0, SPEED, 2) > 2 * seconds


def test_a_memory_that_saves_nothing_never_pays() -> None:
    assert break_even(10.0, 2.0, 1.0) == 10
    assert break_even(10.0, 1.0, 1.0) == float("inf")
