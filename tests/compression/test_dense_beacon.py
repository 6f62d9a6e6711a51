"""Beacons of which each head keeps its own, against the method written out with a stock model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from compressor_samples import assert_same
from stock_behind import best, eager, slow_repeated
from tiny_models import reference_read, some_ids, tiny_model, tiny_tokenizer

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import ConfigError
from beacon_memory.kv.levels import level_of
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.modeling.model import BeaconModel


def a_model(**settings: Any) -> BeaconModel:
    config = BeaconConfig(**{"beacon_dense_ratio": 2, "beacon_sink_size": 0, "beacon_window": 64} | settings)
    return tiny_model("llama", config, tokenizer=tiny_tokenizer())


def read(model: BeaconModel, ids: Sequence[int], ratio: int) -> MemoryKV:
    compressor = BeaconCompressor(model)
    ratios = compressor.ratios(len(ids), ratio, "beacon")
    return compressor.compress_one(Work(list(ids), ratios), compression="beacon").kv


@pytest.mark.parametrize("dense", [1, 2, 3])
@pytest.mark.parametrize(("tokens", "ratio"), [(21, 3), (64, 4), (61, 13)])
def test_heads_keep_the_beacons_that_they_look_up_while_the_window_is_repeated(
    tokens: int, ratio: int, dense: int
) -> None:
    model, ids = a_model(beacon_dense_ratio=dense), some_ids(tokens, seed=1)
    all_of_them = reference_read(model, ids, [dense])
    beacons = BeaconKV(all_of_them.keys, all_of_them.values)
    nothing = MemoryKV.of(model.empty_kv())
    kept = best(slow_repeated(eager("llama"), nothing, beacons, ids), -(-tokens // ratio))
    memory = read(model, ids, ratio)
    assert_same(memory, MemoryKV.chosen(beacons, kept))
    assert memory.span == beacons.slots


@pytest.mark.parametrize("placement", ["end", "salient-words"])
@pytest.mark.parametrize("tokens", [1, 40, 64, 150])
def test_up_to_the_dense_ratio_it_is_the_memory_of_the_paper(tokens: int, placement: str) -> None:
    model, ids = a_model(beacon_sink_size=1, beacon_placement=placement), some_ids(tokens)
    for ratio in (1, 2):
        assert_same(read(model, ids, ratio), reference_read(model, ids, [ratio] * -(-tokens // 64)))


def test_a_richer_memory_holds_every_poorer_one() -> None:
    model, ids = a_model(), some_ids(64, seed=3)
    rich = read(model, ids, 2)
    for ratio in (4, 8, 16):
        assert_same(rich.from_level(level_of(ratio)), read(model, ids, ratio))


def test_texts_may_have_any_length_and_ratio_0_keeps_the_tokens() -> None:
    model, ids = a_model(beacon_sink_size=1), some_ids(300)
    compressor = BeaconCompressor(model)
    assert compressor.ratios(10_000, "auto", "beacon") == [2] * 157
    assert compressor.fits(10**6, "beacon")
    assert compressor.parameters("beacon") == {"dense_ratio": 2}
    whole = read(model, ids, 0)
    assert (whole.slots, whole.span) == (300, 300)
    mixed = compressor.compress_one(Work(ids, [0, 2, 8, 4, 99]), compression="beacon")
    assert [window.span for window in mixed.windows] == [64, 32, 32, 32, 22]
    assert mixed.kv.slots == 64 + 32 + 8 + 16 + 1


def test_raw_tokens_that_see_beacons_are_refused() -> None:
    model = a_model(beacon_attn="full-coverage")
    with pytest.raises(ConfigError, match="beacon_dense_ratio needs beacon_attn='hidden'"):
        BeaconCompressor(model).parameters("beacon")
    with pytest.raises(ConfigError, match="beacon_dense_ratio=-1 must be a whole number of at least 0"):
        BeaconConfig(beacon_dense_ratio=-1)


def test_it_changes_no_fingerprint() -> None:
    one, other = (a_model(beacon_dense_ratio=dense).fingerprint for dense in (0, 2))
    assert one == other
