from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from tiny_models import some_ids, tiny_model, tiny_tokenizer
from torch import Tensor

from beacon_memory.compression.sequence import BeaconSequence
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import ConfigError
from beacon_memory.modeling.model import BeaconModel

IDS = some_ids(27)


def model_of(attn: str, placement: str, sink: int, mix: str = "sequence") -> BeaconModel:
    config = BeaconConfig(
        beacon_window=8,
        beacon_ratio=(2, 4),
        beacon_ratio_mix=mix,
        beacon_attn=attn,
        beacon_placement=placement,
        beacon_sink_size=sink,
    )
    return tiny_model("llama", config, tokenizer=tiny_tokenizer())


def read(model: BeaconModel, bounds: list[int]) -> tuple[BeaconSequence, Tensor]:
    sequence = BeaconSequence(model)
    return sequence, torch.cat([sequence.read(IDS[start:stop]) for start, stop in pairwise(bounds)])


def assert_same(ours: tuple[BeaconSequence, Tensor], theirs: tuple[BeaconSequence, Tensor]) -> None:
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-4, rtol=0)
    assert ours[0].state.cursor == theirs[0].state.cursor
    for part in ("sink", "beacons", "unfinished"):
        a, b = (getattr(sequence, part) for sequence, _ in (ours, theirs))
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=0)
        torch.testing.assert_close(a.values, b.values, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("attn", "placement", "sink"),
    [
        one
        for one in product(["hidden", "full-coverage"], ["end", "salient", "salient-words"], [0, 1, 3])
        if one[0] == "hidden" or one[1] == "end"
    ],
)
@pytest.mark.parametrize("bounds", [list(range(28)), [0, 5, 6, 19, 27]], ids=["single tokens", "pieces"])
def test_how_the_input_is_cut_changes_nothing(attn: str, placement: str, sink: int, bounds: list[int]) -> None:
    model = model_of(attn, placement, sink)
    assert_same(read(model, bounds), read(model, [0, 27]))


@pytest.mark.parametrize("placement", ["salient", "salient-words"])
def test_full_coverage_with_salient_beacons_is_read_a_window_at_a_time(placement: str) -> None:
    model = model_of("full-coverage", placement, 1)
    assert_same(read(model, [0, 8, 24]), read(model, [0, 24]))
    with pytest.raises(ConfigError, match=f"beacon_placement='{placement}'"):
        read(model, list(range(28)))


def test_reading_without_finishing_a_window_is_the_stock_model_reading() -> None:
    model = model_of("hidden", "end", 1)
    stock = model.base(torch.tensor([IDS[:7]])).logits[0]
    torch.testing.assert_close(read(model, [0, 3, 7])[1], stock, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sink", [0, 1, 3])
def test_the_sink_stands_before_the_beacons(sink: int) -> None:
    sequence, _ = read(model_of("hidden", "end", sink), [0, 5, 27])
    assert (sequence.sink.slots, sequence.beacons.slots, sequence.unfinished.slots) == (sink, 4 + 2 + 4, 3)
    early, _ = read(model_of("hidden", "end", sink), [0, 5])
    assert (early.sink.slots, early.beacons.slots, early.unfinished.slots) == (sink, 0, 5 + 2)
    torch.testing.assert_close(early.sink.keys, sequence.sink.keys, atol=1e-4, rtol=0)


def test_the_first_call_decides_what_adapt_takes() -> None:
    model = model_of("hidden", "end", 0, mix="adapt-4")
    model.max_positions = 10
    sequence = BeaconSequence(model)
    sequence.read(IDS[:5])  # 9 of 10 positions: even ratio 2 reaches 12
    sequence.read(IDS[5:])
    assert sequence.beacons.slots == 3 * 4
