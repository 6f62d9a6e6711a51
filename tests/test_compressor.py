from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    BOS,
    FAMILIES,
    ReferenceRead,
    reference_read,
    some_ids,
    tiny_base,
    tiny_model,
    tiny_tokenizer,
    train,
)
from torch import Tensor

from beacon_memory.compressor import BeaconCompressor, CompressedDocument, CompressedWindow
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import CapacityError, ConfigError, InputError
from beacon_memory.kv import BeaconKV
from beacon_memory.modeling import BeaconModel

WINDOW = 8
# lengths below a unit, of a window, one more, and of several windows; ratios that differ from window to window
RATIOS = {1: [4], 3: [4], 8: [2], 9: [4, 2], 21: [2, 4, 3], 18: [0, 99, 1]}
DOCUMENTS = [(some_ids(tokens, seed=tokens), ratios) for tokens, ratios in RATIOS.items()]

every_method = pytest.mark.parametrize(
    ("attn", "embed", "placement", "sink"),
    list(product(["hidden", "full-coverage"], ["last-token", "learned"], ["end", "salient", "salient-words"], [0, 1])),
)


@cache
def model_of(
    family: str = "llama",
    attn: str = "hidden",
    embed: str = "last-token",
    placement: str = "end",
    sink: int = 1,
    param: tuple[str, ...] = ("q", "k", "v"),
) -> BeaconModel:
    config = BeaconConfig(
        beacon_window=WINDOW,
        beacon_ratio=(2, 4),
        beacon_param=param,
        beacon_attn=attn,
        beacon_embed=embed,
        beacon_placement=placement,
        beacon_sink_size=sink,
    )
    return tiny_model(family, config, tokenizer=tiny_tokenizer())


def compress(model: BeaconModel, documents: Any = tuple(DOCUMENTS), **options: Any) -> list[CompressedDocument]:
    return list(BeaconCompressor(model, **options).compress(documents))


def assert_same(ours: BeaconKV, theirs: BeaconKV | ReferenceRead) -> None:
    torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@every_method
def test_one_packed_pass_is_the_method_window_by_window(
    family: str, attn: str, embed: str, placement: str, sink: int
) -> None:
    model = model_of(family, attn, embed, placement, sink)
    for (ids, ratios), compressed in zip(DOCUMENTS, compress(model), strict=True):
        assert_same(compressed.kv, reference_read(model, ids, ratios))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("param", [(), ("o",), ("k",), ("q", "v"), ("q", "k", "v", "o")], ids="".join)
def test_beacons_have_projections_of_their_own_for_any_of_qkvo(family: str, param: tuple[str, ...]) -> None:
    model = model_of(family, param=param)
    for (ids, ratios), compressed in zip(DOCUMENTS, compress(model), strict=True):
        assert_same(compressed.kv, reference_read(model, ids, ratios))


def test_biases_of_all_projections_are_used() -> None:
    config = BeaconConfig(beacon_window=WINDOW, beacon_ratio=(2,), beacon_param=("q", "k", "v", "o"))
    model = tiny_model("llama", config, attention_bias=True)
    assert any(name.endswith("beacon_o_proj.bias") for name, _ in model.named_beacon_parameters())
    for (ids, ratios), compressed in zip(DOCUMENTS, compress(model), strict=True):
        assert_same(compressed.kv, reference_read(model, ids, ratios))


@pytest.mark.parametrize("attn", ["hidden", "full-coverage"])
def test_packing_documents_changes_nothing(attn: str) -> None:
    model = model_of(attn=attn)
    for document, together in zip(DOCUMENTS, compress(model), strict=True):
        (alone,) = compress(model, [document])
        assert_same(together.kv, alone.kv)
        assert together.windows == alone.windows


@pytest.mark.parametrize("attn", ["hidden", "full-coverage"])
@pytest.mark.parametrize("rows", [1, 13, 20, 33])
def test_the_size_of_a_pass_changes_nothing(rows: int, attn: str) -> None:
    model = model_of(attn=attn)
    for whole, parts in zip(compress(model), compress(model, rows_per_pass=rows), strict=True):
        assert_same(parts.kv, whole.kv)
        assert parts.windows == whole.windows


def test_a_document_says_how_its_windows_were_compressed() -> None:
    document = compress(model_of())[4]
    assert document.tokens == 21
    assert document.kv.slots == 4 + 2 + 2
    assert document.windows == (CompressedWindow(0, 8, 2), CompressedWindow(8, 8, 4), CompressedWindow(16, 5, 3))


@pytest.mark.parametrize("rows", [1, 24, 4096])
def test_documents_come_in_order_and_as_soon_as_they_are_read(rows: int) -> None:
    model, events = model_of(), []

    def documents() -> Iterator[tuple[list[int], list[int]]]:
        for number in range(4):
            events.append(f"take {number}")
            yield some_ids(8, seed=number), [2]  # 12 rows

    for number, compressed in enumerate(BeaconCompressor(model, rows_per_pass=rows).compress(documents())):
        events.append(f"give {number}")
        assert_same(compressed.kv, reference_read(model, some_ids(8, seed=number), [2]))
    expected = {
        1: "take 0, take 1, give 0, take 2, give 1, take 3, give 2, give 3",
        24: "take 0, take 1, take 2, give 0, give 1, take 3, give 2, give 3",
        4096: "take 0, take 1, take 2, take 3, give 0, give 1, give 2, give 3",
    }
    assert ", ".join(events) == expected[rows]


@pytest.mark.parametrize("rows", [1, 20, 4096])
def test_progress_adds_up_to_all_tokens(rows: int) -> None:
    steps: list[int] = []
    list(BeaconCompressor(model_of(), rows_per_pass=rows).compress(DOCUMENTS, steps.append))
    assert sum(steps) == sum(len(ids) for ids, _ in DOCUMENTS)
    assert all(step > 0 for step in steps)
    assert len(steps) == {1: 11, 20: 6, 4096: 1}[rows]


def test_the_language_model_head_is_never_run() -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the language-model head was run")

    model = model_of()
    hook = model.base.lm_head.register_forward_hook(refuse)
    try:
        assert len(compress(model)) == len(DOCUMENTS)
    finally:
        hook.remove()


def test_compressing_needs_no_gradient() -> None:
    assert not any(document.kv.keys.requires_grad for document in compress(model_of()))


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_close_to_float32(family: str, tmp_path: Path) -> None:
    config = BeaconConfig(beacon_window=WINDOW, beacon_ratio=(2,))
    tiny_base(family).save_pretrained(tmp_path)
    kv: dict[torch.dtype, list[Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = train(BeaconModel.from_pretrained(tmp_path, config=config, dtype=dtype, device="cpu"))
        kv[dtype] = [part for document in compress(model) for part in (document.kv.keys, document.kv.values)]
        assert {part.dtype for part in kv[dtype]} == {dtype}
    for exact, rounded in zip(kv[torch.float32], kv[torch.bfloat16], strict=True):
        assert float((rounded.float() - exact).norm() / exact.norm()) < 0.05


def test_an_empty_document_is_refused() -> None:
    compressor = BeaconCompressor(model_of())
    ratio: Any
    for ratio in (4, "auto", []):
        with pytest.raises(InputError, match="empty"):
            compressor.ratios(0, ratio)
    with pytest.raises(InputError):
        list(compressor.compress([([], [])]))


class TestRatios:
    def test_a_number_a_list_or_auto(self) -> None:
        compressor = BeaconCompressor(model_of(), reserve=100)
        assert compressor.ratios(20, 4) == [4, 4, 4]
        assert compressor.ratios(20, [2, 0, 99]) == [2, 0, 99]
        assert compressor.ratios(20, "auto") == [2, 2, 2]
        assert compressor.ratios(1000, "auto") == [4] * 125

    @pytest.mark.parametrize("ratio", ["4", "automatic", "", 2.0, None, -1])
    def test_another_value_is_refused(self, ratio: Any) -> None:
        with pytest.raises(ConfigError, match=f"ratio={ratio!r}"):
            BeaconCompressor(model_of(), reserve=100).ratios(20, ratio)

    @pytest.mark.parametrize("ratio", [2, 8, "auto", [2] * 1250])
    def test_a_document_that_does_not_fit_is_refused_with_the_numbers(self, ratio: Any) -> None:
        with pytest.raises(CapacityError, match=r"10000 tokens.* 512"):
            BeaconCompressor(model_of(), reserve=100).ratios(10_000, ratio)


class TestSink:
    def test_it_is_the_kv_that_the_stock_model_has_for_bos(self) -> None:
        stock = tiny_base("llama")
        cache = stock(torch.tensor([[BOS]])).past_key_values  # position 0: not rotated
        keys, values = (torch.stack([getattr(layer, part)[0] for layer in cache.layers]) for part in ("keys", "values"))
        assert_same(BeaconCompressor(model_of()).sink, BeaconKV(keys, values))

    def test_without_one_it_has_no_slots(self) -> None:
        assert BeaconCompressor(model_of(sink=0)).sink.slots == 0

    def test_without_a_bos_it_is_the_eos(self) -> None:
        config = BeaconConfig(beacon_window=WINDOW, beacon_ratio=(2,))
        assert tiny_model("llama", config, bos_token_id=None, eos_token_id=[7, 8]).sink_ids == [7]
        assert tiny_model("llama", config).sink_ids == [BOS]

    @pytest.mark.parametrize(("sink", "tokens"), [(2, {}), (1, {"bos_token_id": None, "eos_token_id": None})])
    def test_one_that_documents_cannot_share_is_refused(self, sink: int, tokens: dict[str, Any]) -> None:
        config = BeaconConfig(beacon_window=WINDOW, beacon_ratio=(2,), beacon_sink_size=sink)
        with pytest.raises(ConfigError, match=f"beacon_sink_size={sink}"):
            _ = BeaconCompressor(tiny_model("llama", config, **tokens)).sink


class TestTokenize:
    def test_offsets_say_where_tokens_lie_in_the_text(self) -> None:
        text = "über </s> all"
        read = BeaconCompressor(model_of()).tokenize(text)
        assert BOS not in read.ids
        assert "".join(text[start:stop] for start, stop in dict.fromkeys(read.offsets)) == text

    def test_a_bos_leads_where_there_is_no_sink(self) -> None:
        read = BeaconCompressor(model_of(sink=0)).tokenize("ab")
        assert (read.ids[0], read.offsets) == (BOS, [(0, 0), (0, 1), (1, 2)])

    @pytest.mark.parametrize("sink", [0, 1])
    def test_an_empty_text_has_no_tokens(self, sink: int) -> None:
        assert BeaconCompressor(model_of(sink=sink)).tokenize("").ids == []
