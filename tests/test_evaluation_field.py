from __future__ import annotations

import pytest
from evaluation_samples import saved_model

from beacon_memory.errors import InputError
from beacon_memory.evaluation.contestants import Beacons, NoText, Retrieved, Truncated
from beacon_memory.evaluation.field import contestants
from beacon_memory.evaluation.selection import Selected
from beacon_memory.evaluation.untouched import Untouched

KINDS = {
    "full": Truncated,
    "none": NoText,
    "base": Untouched,
    "truncated:8": Truncated,
    "bm25": Retrieved,
    "bm25:2": Retrieved,
    "beacon:4": Beacons,
    "beacon:4:3": Beacons,
    "expected:4": Selected,
    "snapkv:4": Selected,
    "kvzip:4": Selected,
}


def test_every_name_has_its_contestant_in_order() -> None:
    field = contestants(list(KINDS), saved_model())
    assert {one.name: type(one) for one in field} == KINDS
    assert [one.name for one in field] == list(KINDS)
    assert (vars(field[7])["ratio"], vars(field[7])["documents"]) == (4, 3)
    assert vars(field[4])["ratio"] == 4


def test_presses_share_one_stock_model() -> None:
    field = contestants(["expected:4", "full", "kvzip:4"], saved_model())
    assert vars(field[0])["stock"] is vars(field[2])["stock"]


UNKNOWN = ("", "fulll", "Beacon:4", "full:2", "none:1", "base:1", "bm25:4:2", "beacon:4:2:1")
MALFORMED = ("beacon", "beacon:", "beacon:x", "beacon:0", "beacon:-2", "beacon:4.5", "beacon:²", "truncated", "kvzip")
REPEATED = (["full", "full"], ["full", "beacon:4", "beacon:4"])


@pytest.mark.parametrize("names", [[], *([name] for name in UNKNOWN + MALFORMED), *REPEATED])
def test_other_names_are_refused_with_those_that_there_are(names: list[str]) -> None:
    with pytest.raises(
        InputError, match=r"full, none, base, truncated:R, bm25, bm25:R, beacon:R, beacon:R:N, expected:R"
    ):
        contestants(names, saved_model())
