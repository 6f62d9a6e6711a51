from __future__ import annotations

from dataclasses import astuple

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory.config import BeaconConfig
from beacon_memory.planning import measure
from beacon_memory.planning.hardware import Speed
from beacon_memory.planning.models import ModelShape, planned_model

SPEED = Speed(linear=9e11, attention=4e11, repeated=1e11, moving=2e9, bandwidth=9e9, layer=5e-4, load=1e9)


def seconds_at(speed: Speed, shape: ModelShape) -> dict[str, float]:
    """What pieces take where the formulas are right."""
    width = measure._WIDTHS[0] * measure._WIDTHS[1]
    product, stream = measure._PRODUCT / speed.linear, 2 * measure._MATRICES * width / speed.bandwidth
    return {**measure.predicted(shape, speed, 2), "product": product, "stream": stream}


def test_the_speeds_that_are_solved_for_are_those_that_things_took() -> None:
    shape = planned_model(None).shape
    solved = measure.solved(shape, seconds_at(SPEED, shape), 2, SPEED.load)
    assert astuple(solved) == pytest.approx(astuple(SPEED), rel=1e-6)


@pytest.mark.parametrize("piece", ["short", "long", "compress", "step", "product", "stream"])
@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_measurement_that_is_far_off_gives_speeds_that_can_be(piece: str, factor: float) -> None:
    shape = planned_model(None).shape
    seconds = seconds_at(SPEED, shape)
    seconds[piece] *= factor
    assert all(0 < one < float("inf") for one in astuple(measure.solved(shape, seconds, 2, 1e9)))


def test_all_pieces_can_be_timed_and_what_is_quick_is_timed_too() -> None:
    model = tiny_model("llama", BeaconConfig(), tokenizer=tiny_tokenizer(), max_position_embeddings=4096)
    rounds = measure.timed(measure.pieces(model), model.device, limit=0)
    assert len(rounds) == 1
    assert min(measure.best(rounds).values()) > 0
    named = {"product", "stream", *measure.predicted(measure.shape_of(model), SPEED, 4)}
    assert rounds[0].keys() == named
    assert measure._load_speed(model) > 0
