"""Planned bytes are those that a store writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory.config import BeaconConfig
from beacon_memory.documents import Precision
from beacon_memory.hot import _size_of
from beacon_memory.kv.prefix import Section
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.memory import BeaconMemory
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.planning.estimates import Bounds
from beacon_memory.planning.lengths import PlannedText, by_tokenizer, planned
from beacon_memory.planning.measure import shape_of
from beacon_memory.planning.sizes import MemorySize, Way, window_sizes
from beacon_memory.storage.files.kv_file import read_kv_file

CONFIG = BeaconConfig(beacon_window=160)
# A paragraph that is cut into passages, with letters of two bytes; and one of a few words.
TEXTS = {
    "long.txt": "The mill stands by the brook. Its wheel turned until märz 1987, Ada Flint says.\n\n" * 11,
    "short.txt": "Owls nest in the hayloft.",
    "full.txt": "x" * 320,
}


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    return tiny_model("llama", CONFIG, tokenizer=tiny_tokenizer(), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PlannedText]:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    measure = by_tokenizer(folder / "tokenizer.json")
    return {id: planned(id, text, measure) for id, text in TEXTS.items()}


@pytest.mark.parametrize("ratio", [0, 1, 2, 3, 8, 32])
@pytest.mark.parametrize(("compression", "dense"), [("select", 0), ("beacon", 0), ("beacon", 2), ("hybrid", 0)])
def test_bytes_are_those_of_the_store_in_every_precision(
    model: BeaconModel,
    measured: dict[str, PlannedText],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compression: str,
    dense: int,
    ratio: int,
) -> None:
    config = replace(CONFIG, beacon_dense_ratio=dense)
    monkeypatch.setattr(model, "config", config)
    way = Way(compression, "repeat", ratio, config)
    with BeaconMemory(tmp_path, model) as memory:
        for id, text in TEXTS.items():
            memory.add(id, text, ratio=ratio, compression=compression, precision="float32")
            for precision in Precision:  # each holds no more than the one before
                memory.store.convert(id, precision)
                row, size = memory.store.row(id), MemorySize(measured[id], shape_of(model), way)
                assert (size.text.tokens, size.slots) == (row.tokens, row.slots)
                file = (memory.store.folder / row.file).stat().st_size
                for planned_bytes, there in ((size.stored(precision), row.bytes), (size.file(precision), file)):
                    assert planned_bytes.low <= there <= planned_bytes.high
                    assert planned_bytes.exact or (precision.quantized and way.chooses)


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.INT8, Precision.INT4])
def test_bytes_of_a_ready_memory_are_those_that_are_kept(
    model: BeaconModel, measured: dict[str, PlannedText], tmp_path: Path, precision: Precision
) -> None:
    size = MemorySize(measured["long.txt"], shape_of(model), Way("select", "repeat", 4, CONFIG))
    with BeaconMemory(tmp_path, model) as memory:
        memory.add("long.txt", TEXTS["long.txt"], ratio=4, compression="select", precision=precision)
        kv = read_kv_file(memory.store.folder / memory.store.row("long.txt").file).kv
    ready = kv if isinstance(kv, QuantizedKV) else Section.of(kv, model.rope)
    bounds = size.ready(precision)
    assert bounds.low <= _size_of(ready) <= bounds.high
    assert bounds.exact is not precision.quantized


def test_bounds_of_groups_are_reached_by_the_most_even_and_the_most_ragged_heads() -> None:
    (window,) = window_sizes(128, Way("select", "repeat", 2, BeaconConfig()))
    assert window.chosen == 64
    # 256 entries of 4 heads: 64 in each, or 65, 65, 65 and 61
    assert window.groups(4) == Bounds(4, 7)


def test_beacons_are_as_many_in_every_head_so_quantized_bytes_are_exact() -> None:
    windows = window_sizes(3000, Way("beacon", "", 8, BeaconConfig()))
    assert [window.slots for window in windows] == [128, 128, 119]
    assert all(window.groups(90).exact for window in windows)
