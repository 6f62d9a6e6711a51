"""A probe that is fitted to texts, by a real model; and what it is said to be worth, against counting it again."""

from __future__ import annotations

from random import Random

import pytest
import torch
from compressor_samples import model_of
from some_prose import some_prose
from tiny_models import tiny_base, tiny_tokenizer

from beacon_memory.compression.calibration import calibrate
from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.methods.select import Select
from beacon_memory.compression.selection import prefix_of
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import InputError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.model import BeaconModel


def a_compressor() -> BeaconCompressor:
    model = BeaconModel(tiny_base("llama", seed=7), BeaconConfig(beacon_window=64), tokenizer=tiny_tokenizer())
    return BeaconCompressor(model, score="expected")


def test_it_keeps_more_of_what_repeat_keeps() -> None:
    compressor, seen = a_compressor(), []
    found = calibrate(compressor, some_prose(60, 90), 80, lambda *counts: seen.append(counts))
    assert (found.windows, found.compared) == (70, 10)
    assert seen == [(number, 80) for number in range(1, 81)]
    assert found.share > found.before > 1 / 8
    assert compressor.model.probe is None  # a calibration changes nothing by itself


@torch.no_grad()
def test_shares_are_counted_of_windows_that_are_drawn_and_not_fitted_to() -> None:
    compressor = a_compressor()
    whole = [compressor.tokenize(text).ids for text in some_prose(9, 90)]
    pieces = [ids[start : start + 64] for ids in whole for start in range(0, len(ids) - 63, 64)]
    (held, *_) = Random(0).sample(pieces, 8)
    found = calibrate(compressor, some_prose(9, 90), 8)
    assert found.compared == 1
    kept = {}
    for name, probe in (("repeat", None), ("expected", found.probe), ("before", None)):
        compressor.score, compressor.model.probe = "repeat" if name == "repeat" else "expected", probe
        method = Select(compressor)
        prefix = prefix_of(compressor.model, [MemoryKV.of(compressor.sink)], len(held))
        (memory,) = method.read_windows([(prefix, held, 8)])
        kept[name] = {
            (layer, head, int(position))
            for layer in range(3)
            for head, (_, _, positions) in enumerate(memory.layer(layer))
            for position in positions
        }
    for name, share in (("expected", found.share), ("before", found.before)):
        assert share == pytest.approx(len(kept[name] & kept["repeat"]) / len(kept["repeat"]))


def test_the_same_texts_give_the_same_probe() -> None:
    first, again = (calibrate(a_compressor(), some_prose(20, 90), 12).probe for _ in range(2))
    assert torch.equal(first.weights, again.weights)
    assert torch.equal(first.bias, again.bias)
    assert first.digest == again.digest


@pytest.mark.parametrize(("texts", "windows", "told"), [([], 300, "0 windows"), (["a b c"] * 9, 7, "7 may be read")])
def test_too_little_text_is_refused(texts: list[str], windows: int, told: str) -> None:
    with pytest.raises(InputError, match=f"{told}.* needs 8 at least"):
        calibrate(BeaconCompressor(model_of()), texts, windows)
