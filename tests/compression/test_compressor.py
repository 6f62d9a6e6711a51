"""Documents compressed in packed passes, each as if it were read alone, window by window."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressor_samples import DOCUMENTS, WINDOW, assert_same, compress, every_compression, every_method, model_of
from tiny_models import BOS, EOS, FAMILIES, reference_read, some_ids, tiny_base, tiny_model, train
from torch import Tensor

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.compression.work import CompressedWindow, Work
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import CapacityError, ConfigError, InputError
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.modeling import attention
from beacon_memory.modeling.model import BeaconModel


@pytest.mark.parametrize("family", FAMILIES)
@every_method
def test_one_packed_pass_is_the_method_window_by_window(
    family: str, attn: str, embed: str, placement: str, sink: int
) -> None:
    model = model_of(family, attn, embed, placement, sink)
    for work, compressed in zip(DOCUMENTS, compress(model), strict=True):
        assert_same(compressed.kv, reference_read(model, work.ids, work.ratios))


@pytest.mark.parametrize("attn", ["hidden", "full-coverage"])
@pytest.mark.parametrize("placement", ["end", "salient-words"])
def test_how_many_rows_attend_at_a_time_changes_nothing(
    attn: str, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_ROWS_ON_CPU", 3)
    model = model_of("llama", attn, placement=placement)
    for work, compressed in zip(DOCUMENTS, compress(model), strict=True):
        assert_same(compressed.kv, reference_read(model, work.ids, work.ratios))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("param", [(), ("o",), ("k",), ("q", "v"), ("q", "k", "v", "o")], ids="".join)
def test_beacons_have_projections_of_their_own_for_any_of_qkvo(family: str, param: tuple[str, ...]) -> None:
    model = model_of(family, param=param)
    for work, compressed in zip(DOCUMENTS, compress(model), strict=True):
        assert_same(compressed.kv, reference_read(model, work.ids, work.ratios))


def test_biases_of_all_projections_are_used() -> None:
    config = BeaconConfig(beacon_window=WINDOW, beacon_ratio=(2,), beacon_param=("q", "k", "v", "o"))
    model = tiny_model("llama", config, attention_bias=True)
    assert any(name.endswith("beacon_o_proj.bias") for name, _ in model.named_beacon_parameters())
    for work, compressed in zip(DOCUMENTS, compress(model), strict=True):
        assert_same(compressed.kv, reference_read(model, work.ids, work.ratios))


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


@pytest.mark.parametrize(("compression", "span"), [("beacon", 8), ("select", 21), ("hybrid", 21 + 1 + 1 + 1)])
def test_a_document_says_how_its_windows_were_compressed(compression: str, span: int) -> None:
    document = compress(model_of(), compression=compression)[4]
    assert document.tokens == 21
    assert (document.kv.slots, document.kv.span) == (4 + 2 + 2, span)
    windows = [(0, 8, 2), (8, 8, 4), (16, 5, 3)]
    spans = {"beacon": (4, 2, 2), "select": (8, 8, 5), "hybrid": (9, 9, 6)}[compression]
    assert document.windows == tuple(CompressedWindow(*one, span) for one, span in zip(windows, spans, strict=True))


@every_compression
def test_a_window_s_span_is_where_its_slots_stand_in_the_memory(compression: str) -> None:
    for document in compress(model_of(), compression=compression):
        start = 0
        for window in document.windows:
            part = document.kv.between(start, start := start + window.span)
            assert part.slots == (-(-window.tokens // window.ratio) if window.ratio else window.tokens)
        assert start == document.kv.span


@pytest.mark.parametrize("rows", [1, 24, 4096])
def test_documents_come_in_order_and_as_soon_as_they_are_read(rows: int) -> None:
    model, events = model_of(), []

    def documents() -> Iterator[Work]:
        for number in range(4):
            events.append(f"take {number}")
            yield Work(some_ids(8, seed=number), [2])  # 12 rows

    compressor = BeaconCompressor(model, rows_per_pass=rows)
    for number, compressed in compressor.compress(enumerate(documents()), compression="beacon"):
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
    compressor = BeaconCompressor(model_of(), rows_per_pass=rows)
    list(compressor.compress(enumerate(DOCUMENTS), steps.append, compression="beacon"))
    assert sum(steps) == sum(len(work.ids) for work in DOCUMENTS)
    assert all(step > 0 for step in steps)
    assert len(steps) == {1: 11, 20: 6, 4096: 1}[rows]


@every_compression
def test_the_language_model_head_is_never_run(compression: str) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the language-model head was run")

    model = model_of()
    hook = model.base.lm_head.register_forward_hook(refuse)
    try:
        assert len(compress(model, compression=compression)) == len(DOCUMENTS)
    finally:
        hook.remove()


@every_compression
def test_compressing_needs_no_gradient(compression: str) -> None:
    assert not any(document.kv.keys.requires_grad for document in compress(model_of(), compression=compression))


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
    for compression in BUILT_IN:
        with pytest.raises(InputError):
            compressor.compress_one(Work([], []), compression=compression)


@pytest.mark.parametrize("compression", ["beacons", "none", "", None])
def test_an_unknown_compression_is_refused_before_any_document_is_taken(compression: Any) -> None:
    def documents() -> Iterator[Any]:
        raise AssertionError("a document was taken")
        yield

    with pytest.raises(
        ConfigError,
        match=f"compression={compression!r} must be 'auto' or one of the methods .*: 'beacon', 'select'",
    ):
        BeaconCompressor(model_of()).compress(documents(), compression=compression)


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
            BeaconCompressor(model_of(), reserve=100).ratios(10_000, ratio, "beacon")

    def test_a_document_of_any_length_fits_a_method_that_need_not_see_all_of_its_memory(self) -> None:
        compressor = BeaconCompressor(model_of(), reserve=100)
        for method in ("select", "hybrid"):
            assert compressor.ratios(10_000, "auto", method) == compressor.ratios(10_000, 2, method) == [2] * 1250


class TestSink:
    def test_it_is_the_kv_that_the_stock_model_has_for_bos(self) -> None:
        stock = tiny_base("llama")
        cache = stock(torch.tensor([[BOS]])).past_key_values  # position 0: not rotated
        keys, values = (torch.stack([getattr(layer, part)[0] for layer in cache.layers]) for part in ("keys", "values"))
        assert_same(MemoryKV.of(BeaconCompressor(model_of()).sink), MemoryKV.of(BeaconKV(keys, values)))

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
        text = "über </s> <s>all"
        read = BeaconCompressor(model_of()).tokenize(text)
        assert not {BOS, EOS}.intersection(read.ids)  # a document neither begins nor ends anything
        assert "".join(text[start:stop] for start, stop in dict.fromkeys(read.offsets)) == text

    def test_a_bos_leads_where_there_is_no_sink(self) -> None:
        read = BeaconCompressor(model_of(sink=0)).tokenize("ab")
        assert (read.ids[0], read.offsets) == (BOS, [(0, 0), (0, 1), (1, 2)])

    @pytest.mark.parametrize("sink", [0, 1])
    def test_an_empty_text_has_no_tokens(self, sink: int) -> None:
        assert BeaconCompressor(model_of(sink=sink)).tokenize("").ids == []


class TestParameters:
    @pytest.mark.parametrize("score", ["repeat", "expected"])
    def test_they_are_what_else_decides(self, score: str) -> None:
        compressor = BeaconCompressor(model_of(), score=score)
        assert compressor.parameters("beacon") == {}
        assert compressor.parameters("select") == {"score": score}
        assert compressor.parameters("hybrid") == {"score": score, "hybrid_factor": 4}

    @pytest.mark.parametrize("compression", ["auto", "beacons", None])
    def test_it_must_be_known_which_compression(self, compression: Any) -> None:
        with pytest.raises(ConfigError, match=f"compression={compression!r} must be 'auto' or one of the methods"):
            BeaconCompressor(model_of()).parameters(compression)
