"""Windows read into K/V of chosen tokens, against the method written out with a stock model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from stock_behind import best, eager, slow_repeated, some_kept, stock_reading
from tiny_models import MODELS, reference_read, some_ids, some_probe, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.methods.hybrid import Hybrid
from beacon_memory.compression.methods.select import Select
from beacon_memory.compression.scoring import ExpectedAttention
from beacon_memory.compression.selection import read_raw
from beacon_memory.config import BeaconConfig
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window
from beacon_memory.modeling.model import BeaconModel

every_model = pytest.mark.parametrize("name", MODELS)


def both(name: str = "llama", **settings: Any) -> tuple[PreTrainedModel, BeaconModel]:
    family, overrides = MODELS[name]
    config = BeaconConfig(beacon_sink_size=0, **settings)
    return eager(name), tiny_model(family, config, tokenizer=tiny_tokenizer(), **overrides)


def in_front(stock: PreTrainedModel) -> MemoryKV:
    kv = stock_reading(stock, some_ids(30, seed=7)).kv
    return MemoryKV.chosen(kv, some_kept((3, 2), 30))


@torch.no_grad()
def read(
    model: BeaconModel,
    prefix: MemoryKV,
    ids: Sequence[int],
    ratio: int,
    *,
    hybrid: bool = False,
    score: str = "repeat",
) -> MemoryKV:
    compressor = BeaconCompressor(model, score=score)
    method = Hybrid(compressor) if hybrid else Select(compressor)
    (memory,) = method.read_windows([(model.prefix(prefix), ids, ratio)])
    return memory


def nothing(model: BeaconModel) -> MemoryKV:
    return MemoryKV.of(model.empty_kv())


def kept_of(memory: MemoryKV) -> Tensor:
    """The positions that each head keeps, [layers, kv_heads, span] bool."""
    kept = torch.zeros(*memory.counts.shape, memory.span, dtype=torch.bool)
    for layer in range(len(kept)):
        for head, (_, _, positions) in enumerate(memory.layer(layer)):
            kept[layer, head, positions.long()] = True
    return kept


def assert_same(ours: MemoryKV, theirs: MemoryKV) -> None:
    assert torch.equal(ours.counts, theirs.counts)
    assert torch.equal(ours.positions, theirs.positions)
    assert ours.span == theirs.span
    torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["select", "hybrid", "expected"])
@pytest.mark.parametrize(("tokens", "ratio"), [(n, r) for n in (1, 2, 15, 64, 70) for r in (0, 1, 2, 3, 8, 99)])
def test_slots_are_tokens_over_ratio_rounded_up_in_the_mean(tokens: int, ratio: int, how: str) -> None:
    _, model = both()
    score = "expected" if how == "expected" else "repeat"
    memory = read(model, nothing(model), some_ids(tokens), ratio, hybrid=how == "hybrid", score=score)
    slots = -(-tokens // ratio) if ratio else tokens
    assert int(memory.counts.sum()) == len(memory.keys) == slots * 6
    beacons = -(-tokens // (4 * ratio)) if how == "hybrid" and ratio else 0
    assert (memory.slots, memory.span) == (slots, tokens + beacons)


@every_model
@pytest.mark.parametrize(("ratio", "hybrid"), [(0, False), (1, False), (0, True)])
def test_without_beacons_ratios_0_and_1_keep_every_token(name: str, ratio: int, hybrid: bool) -> None:
    stock, model = both(name)
    prefix, ids = in_front(stock), some_ids(21, seed=1)
    expected = MemoryKV.of(stock_reading(stock, ids, prefix).kv)
    assert_same(read(model, prefix, ids, ratio, hybrid=hybrid), expected)


@every_model
@pytest.mark.parametrize(("tokens", "ratio"), [(21, 2), (90, 4), (90, 13)])
def test_heads_compete_for_one_budget_by_what_they_look_up(name: str, tokens: int, ratio: int) -> None:
    stock, model = both(name)
    prefix, ids = in_front(stock), some_ids(tokens, seed=1)
    window = stock_reading(stock, ids, prefix).kv
    kept = best(slow_repeated(stock, prefix, window, ids), -(-tokens // ratio))
    memory = read(model, prefix, ids, ratio)
    assert_same(memory, MemoryKV.chosen(window, kept))
    assert len(set(memory.counts.flatten().tolist())) > 1


@pytest.mark.parametrize("attn", ["hidden", "full-coverage"])
def test_chosen_tokens_do_not_depend_on_how_beacons_are_read(attn: str) -> None:
    stock, model = both(beacon_attn=attn, beacon_param=("q", "k", "v", "o"))
    plain = tiny_model("llama", BeaconConfig(beacon_sink_size=0, beacon_param=()), trained=False)
    prefix, ids = in_front(stock), some_ids(40, seed=1)
    assert_same(read(model, prefix, ids, 4), read(plain, prefix, ids, 4))


@every_model
@pytest.mark.parametrize("hybrid", [False, True])
def test_a_probe_saves_the_second_pass(name: str, hybrid: bool) -> None:
    stock, model = both(name)
    model.probe = some_probe(model)
    prefix, ids, passes = in_front(stock), some_ids(40, seed=1), []
    with torch.no_grad():
        heard = ExpectedAttention(model.rope, 40)
        layout = BeaconLayout.build([Piece(Cursor(), [Window.behind(0, ids)])], model.config)
        kv = model.run(layout, model.empty_kv(), layout.windows[0].own, prefixes=[model.prefix(prefix)], watch=heard)
    hook = model.base.model.register_forward_pre_hook(lambda *_: passes.append(1))
    memory = read(model, prefix, ids, 4, score="expected", hybrid=hybrid)
    hook.remove()
    assert len(passes) == 1
    chosen = best(model.probe(kv.kept, heard.scores), 10 - (3 if hybrid else 0))
    assert torch.equal(kept_of(memory)[..., :40], chosen)
    assert memory.counts.tolist() == (chosen.sum(-1) + (3 if hybrid else 0)).tolist()


@every_model
def test_all_of_a_window_can_be_read_behind_a_memory_or_behind_nothing(name: str) -> None:
    stock, model = both(name)
    ids = some_ids(21, seed=1)
    for memory in (in_front(stock), None):
        with torch.no_grad():
            ours = read_raw(model, None if memory is None else model.prefix(memory), ids)
        assert_same(MemoryKV.of(ours), MemoryKV.of(stock_reading(stock, ids, memory).kv))


class TestHybrid:
    @every_model
    @pytest.mark.parametrize(("tokens", "ratio", "factor"), [(40, 2, 4), (43, 4, 2), (43, 8, 4), (5, 9, 3)])
    @pytest.mark.parametrize("placement", ["end", "salient-words"])
    def test_it_is_the_best_tokens_and_beacons_behind_them(
        self, name: str, tokens: int, ratio: int, factor: int, placement: str
    ) -> None:
        stock, model = both(name, beacon_hybrid_factor=factor, beacon_placement=placement)
        prefix, ids = in_front(stock), some_ids(tokens, seed=1)
        memory, beacons = read(model, prefix, ids, ratio, hybrid=True), -(-tokens // (ratio * factor))
        window = stock_reading(stock, ids, prefix).kv
        kept = best(slow_repeated(stock, prefix, window, ids), -(-tokens // ratio) - beacons)
        chosen = MemoryKV.chosen(window, kept)
        assert memory.span == tokens + beacons
        for layer in range(3):
            for all_of_head, its_tokens in zip(memory.layer(layer), chosen.layer(layer), strict=True):
                keys, values, positions = all_of_head
                assert positions.tolist() == [*its_tokens[2].tolist(), *range(tokens, tokens + beacons)]
                torch.testing.assert_close(keys[:-beacons], its_tokens[0], atol=1e-4, rtol=0)
                torch.testing.assert_close(values[:-beacons], its_tokens[1], atol=1e-4, rtol=0)

    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
    @pytest.mark.parametrize("placement", ["end", "salient-words"])
    def test_its_beacons_are_those_of_the_method(self, family: str, placement: str) -> None:
        _, model = both(family, beacon_placement=placement)
        ids = some_ids(43, seed=1)
        memory, expected = read(model, nothing(model), ids, 4, hybrid=True), reference_read(model, ids, [16])
        for layer in range(3):
            for head, (keys, values, _) in enumerate(memory.layer(layer)):
                torch.testing.assert_close(keys[-3:], expected.keys[layer, head], atol=1e-4, rtol=0)
                torch.testing.assert_close(values[-3:], expected.values[layer, head], atol=1e-4, rtol=0)

    def test_its_beacons_have_read_the_memory_in_front_too(self) -> None:
        stock, model = both()
        alone, behind = (
            read(model, prefix, some_ids(16, seed=1), 4, hybrid=True) for prefix in (nothing(model), in_front(stock))
        )
        assert not torch.allclose(alone.layer(2)[0][1][-1], behind.layer(2)[0][1][-1], atol=1e-2)
