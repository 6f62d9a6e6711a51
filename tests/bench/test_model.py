"""The benchmark measures what it says, here on a tiny model and short texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_base, tiny_checkpoint

from beacon_memory.bench import model as bench
from beacon_memory.bench.measuring import table
from beacon_memory.modeling.model import BeaconModel

_ANSWERING = (
    "time to first token",
    "time to first token",
    "bytes",
    "a token behind 100 slots, even",
    "a token behind 100 slots, ragged",
    "answers to 8 requests behind 8 memories",
    "an answer to one request",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), tiny_base("llama", max_position_embeddings=16384))


def test_figures_of_a_run_are_ratios_with_bounds_and_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_PEAK_TOKENS", (1000, 2000))
    monkeypatch.setattr(bench, "_SLOTS", (100,))
    monkeypatch.setattr(bench, "_ANSWER", 4)
    figures = bench.run(str(folder), None, "cpu", "auto", tokens=1200, ratio=8)
    assert [figure.name.split(":")[0] for figure in figures] == [
        *_ANSWERING,
        "throughput",
        "throughput",
        "throughput",
        f"a sentence behind {bench._GROWN} tokens",
        f"a sentence behind {bench._GROWN} tokens",
        "peak memory",
    ]
    assert all(figure.value > 0 for figure in figures)
    shown = table(figures)
    for figure in figures:
        assert f"| {figure.name} | {figure.value:.3g} | {figure.bound} | {figure.detail} |" in shown


def test_answering_is_measured_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_SLOTS", (100,))
    monkeypatch.setattr(bench, "_ANSWER", 4)
    figures = bench.answering(str(folder), None, "cpu", "auto", tokens=1200, ratio=8)
    assert [figure.name.split(":")[0] for figure in figures] == [*_ANSWERING]


def test_reading_is_measured_for_a_short_and_a_long_text_by_each_score(folder: Path) -> None:
    figures = bench.reading(str(folder), None, "cpu", "auto", tokens=2100, ratio=4)
    assert [figure.name.split(":")[0] for figure in figures] == [
        f"reading {tokens} tokens, score {score}" for tokens in ("1,000", "2,100") for score in ("repeat", "expected")
    ]
    for figure in figures:
        ours, stock = (float(part.replace(",", "")) for part in figure.detail.removesuffix(" tokens/s").split(" / "))
        assert figure.value == pytest.approx(ours / stock, rel=0.01)


def test_beacons_are_those_of_the_paper(folder: Path, tmp_path: Path) -> None:
    model = BeaconModel.from_pretrained(folder)
    model.config = replace(model.config, beacon_dense_ratio=2)
    model.save_adapter(tmp_path)
    assert BeaconModel.from_pretrained(folder, tmp_path).config.beacon_dense_ratio == 2
    assert bench.load(str(folder), str(tmp_path), "cpu", "auto").config.beacon_dense_ratio == 0


def test_bytes_are_those_of_an_eighth_of_the_tokens(folder: Path) -> None:
    model = BeaconModel.from_pretrained(folder)
    *_, size = bench._beginning(model, 1000, 8)
    place = 1 / (2 * model.kv_shape[-1] * 4)  # beside the key and value of a slot of a head, in float32
    assert size.value == pytest.approx((1 + place) / 8, rel=0.01)  # but for the last unit, which need not be full


def test_peak_memory_counts_what_compressing_takes(folder: Path) -> None:
    few, many = (bench._peak_of(tokens, str(folder), None, "cpu", "auto") for tokens in (1000, 60_000))
    assert 50e6 < few < many
