from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from compressor_samples import assert_same
from evaluation_samples import TEXT, baseline, ids_of, saved_model

from beacon_memory.errors import InputError
from beacon_memory.evaluation.baseline_names import baselines
from beacon_memory.evaluation.baselines import Compressed, NoText, Retrieved, Truncated, Zoomed
from beacon_memory.evaluation.low_rank import LowRank
from beacon_memory.evaluation.presses import Selected
from beacon_memory.evaluation.untouched import Untouched
from beacon_memory.kv.memory_kv import MemoryKV

KINDS = {
    "full": Truncated,
    "none": NoText,
    "base": Untouched,
    "truncated:8": Truncated,
    "bm25": Retrieved,
    "bm25:2": Retrieved,
    "beacon:4": Compressed,
    "beacon:4:3": Compressed,
    "select:4": Compressed,
    "select:4:3": Compressed,
    "hybrid:4": Compressed,
    "hybrid:4:3": Compressed,
    "select-expected:4": Compressed,
    "select-expected:4:3": Compressed,
    "expected:4": Selected,
    "snapkv:4": Selected,
    "kvzip:4": Selected,
    "beacon:4@int8": Compressed,
    "select:4:3@int4": Compressed,
    "hybrid:4@int4": Compressed,
    "select-expected:4@int8": Compressed,
    "zoom:8": Zoomed,
    "zoom:8:3": Zoomed,
    "look:16": Zoomed,
    "slice:4": Zoomed,
    "nested:4": Zoomed,
    "cskv:8": LowRank,
}


def test_every_name_has_its_baseline_in_order() -> None:
    found = baselines(list(KINDS), saved_model())
    assert {one.name: type(one) for one in found} == KINDS
    assert [one.name for one in found] == list(KINDS)
    assert vars(found[4])["ratio"] == 4
    parts = [tuple(vars(one)[name] for name in ("compression", "ratio", "documents")) for one in found[6:14]]
    assert parts == [(name, 4, documents) for name in ("beacon", "select", "hybrid", "select") for documents in (1, 3)]
    assert [vars(one)["compressor"].score for one in found[6:14]] == ["repeat"] * 6 + ["expected"] * 2
    assert [vars(one)["bits"] for one in (*found[6:14], *found[17:21])] == [None] * 8 + [8, 4, 4, 8]
    assert (vars(found[18])["documents"], vars(found[20])["compressor"].score) == (3, "expected")
    settings = [tuple(vars(one)[name] for name in ("ratio", "budget", "documents")) for one in found[21:26]]
    assert settings == [(2, 8, 1), (2, 8, 3), (2, 16, 1), (1, 4, 1), (2, 4, 1)]
    assert [one.asks_first for one in found[21:26]] == [True, True, True, True, False]


def test_presses_share_one_stock_model() -> None:
    found = baselines(["expected:4", "full", "kvzip:4"], saved_model())
    assert vars(found[0])["stock"] is vars(found[2])["stock"]


UNKNOWN = ("", "fulll", "Beacon:4", "auto:4", "full:2", "none:1", "base:1", "bm25:4:2", "beacon:4:2:1", "select:4:2:1")
MALFORMED = ("beacon", "beacon:", "beacon:x", "beacon:0", "beacon:-2", "beacon:4.5", "beacon:²", "select", "hybrid:0:2",
             "truncated", "kvzip")  # fmt: skip
UNQUANTIZED = ("full@int8", "bm25:4@int4", "kvzip:4@int8", "select:4@int2", "select:4@", "select@int8:4", "@int8",
               "zoom:4@int8", "beacon:4@int8@int4", "beacon@int8")  # fmt: skip
REPEATED = (["full", "full"], ["full", "beacon:4", "beacon:4"])


@pytest.mark.parametrize("names", [[], *([name] for name in UNKNOWN + MALFORMED + UNQUANTIZED), *REPEATED])
def test_other_names_are_refused_with_those_that_there_are(names: list[str]) -> None:
    known = "bm25, bm25:R, cskv:R, beacon:R, beacon:R:N, select:R, select:R:N, hybrid:R, hybrid:R:N, "
    known += "select-expected:R, "
    with pytest.raises(InputError, match=rf"full, none, base, truncated:R, {known}"):
        baselines(names, saved_model())


SELECTED = ("nested:4", "select:2", "select:8", "select:4@int8", "select:3")
BEACONS = ("beacon:2", "beacon:8", "beacon:4@int8", "beacon:3")


@pytest.mark.parametrize("names", [SELECTED, BEACONS])
@pytest.mark.parametrize(("tokens", "read"), [(30, [2, 3]), (80, [2, 8, 4, 3])])
def test_a_text_of_one_window_is_read_once_for_all_ratios_that_double(
    names: Sequence[str], tokens: int, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_model(), "config", replace(saved_model().config, beacon_dense_ratio=2))
    passages = (ids_of(TEXT)[:tokens],)
    alone = [baseline(name).read(passages, "Where?") for name in names]
    ratios, memories = [], Compressed.memories

    def counted(one: Compressed, documents: Any, ratio: int, compression: str) -> list[MemoryKV]:
        ratios.append(ratio)
        return memories(one, documents, ratio, compression)

    monkeypatch.setattr(Compressed, "memories", counted)
    for one, expected in zip(baselines(list(names), saved_model()), alone, strict=True):
        shared = cast(Compressed, one).read(passages, "Where?")
        assert_same(shared.kv, expected.kv)
        assert shared.kv_bytes == expected.kv_bytes
    assert ratios == read
