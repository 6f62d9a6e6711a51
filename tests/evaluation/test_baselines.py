from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from evaluation_samples import (
    CONTEXT,
    QUESTION,
    RIVERS,
    TEXT,
    an_item,
    answer,
    baseline,
    ids_of,
    nll_behind,
    saved_model,
    stock,
    stock_answer,
    stock_nll,
)
from tiny_models import some_ids
from transformers import DynamicCache

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.compression.work import Work
from beacon_memory.errors import CapacityError, InputError
from beacon_memory.evaluation.baselines import Baseline
from beacon_memory.evaluation.pieces import cut_middle, passage_ids
from beacon_memory.generation.generate import Request, generate
from beacon_memory.generation.options import generation_config
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import quantized
from beacon_memory.kv.rope import apply_rotation

TOKENS = len(TEXT)  # every byte is one
CONTINUATION = some_ids(40, seed=7)
HEADS = 6  # of all layers of the tiny model
PLACE = 4  # bytes, beside the K/V of each slot of a head

every_compression = pytest.mark.parametrize("compression", list(BUILT_IN))


def prefix_of(one: Any, question: str | None = QUESTION, text: tuple[str, ...] = CONTEXT) -> MemoryKV:
    prefix: MemoryKV = one.read(passage_ids(one.model.tokenizer, text), question).kv
    return prefix


def by_hand(
    documents: list[list[int]],
    ratio: int,
    compression: str = "beacon",
    keep: Callable[[MemoryKV], MemoryKV] = lambda kv: kv,
) -> MemoryKV:
    """The sink and documents, compressed one after another, and what is kept of them."""
    compressor = BeaconCompressor(saved_model())
    work = [Work(ids, compressor.ratios(len(ids), ratio)) for ids in documents]
    memories = [keep(compressor.compress_one(one, compression=compression).kv) for one in work]
    return MemoryKV.concat([MemoryKV.of(compressor.sink), *memories])


def generated(prefix: MemoryKV) -> str:
    model = saved_model()
    config = generation_config(model, None, {"max_new_tokens": 12, "do_sample": False})
    ((answered,),) = generate(model, [Request(prefix, chat_prompt(model, QUESTION, behind_memory=True))], config)
    return answered.text


def same(first: MemoryKV, second: MemoryKV) -> bool:
    alike = first.span == second.span and torch.equal(first.counts, second.counts)
    return (
        alike and torch.equal(first.positions, second.positions) and torch.allclose(first.keys, second.keys, atol=1e-5)
    )


def slots_in(kv_bytes: int) -> float:
    """Return how many slots, a mean over heads, take these bytes."""
    return kv_bytes / (saved_model().slot_bytes + HEADS * PLACE)


class TestFull:
    def test_it_answers_as_the_stock_model_that_reads_sink_text_and_question(self) -> None:
        assert answer(baseline("full")).text == stock_answer(ids_of(TEXT))

    def test_answers_are_greedy_whatever_the_model_itself_is_set_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = saved_model().base.generation_config
        for name, value in {"repetition_penalty": 1.8, "do_sample": True, "num_beams": 3}.items():
            monkeypatch.setattr(settings, name, value)
        assert answer(baseline("full")).text == stock_answer(ids_of(TEXT))

    def test_it_scores_as_the_stock_model_does(self) -> None:
        nll = baseline("full").score(ids_of(TEXT), CONTINUATION)
        assert nll == pytest.approx(stock_nll(ids_of(TEXT), CONTINUATION), abs=1e-4)

    def test_without_a_sink_a_bos_leads_the_text_once(self) -> None:
        model = saved_model(sink=0)
        full = baseline("full", model)
        assert answer(full).text == stock_answer(ids_of(TEXT))
        assert full.score(ids_of(TEXT), CONTINUATION) == pytest.approx(stock_nll(ids_of(TEXT), CONTINUATION), abs=1e-4)
        assert prefix_of(full).slots == 1 + TOKENS


class TestNoText:
    def test_it_depends_on_the_question_alone(self) -> None:
        none = baseline("none")
        assert answer(none).text == answer(none, an_item(context=("Something else.",))).text == stock_answer([])
        assert answer(none).text != answer(none, an_item("How long is the Fern?")).text
        assert answer(none).kv_bytes == 0

    def test_its_score_is_that_of_the_continuation_alone(self) -> None:
        none = baseline("none")
        assert none.score(ids_of(TEXT), CONTINUATION) == none.score(ids_of("Other."), CONTINUATION)
        assert none.score(ids_of(TEXT), CONTINUATION) == pytest.approx(stock_nll([], CONTINUATION), abs=1e-4)


class TestTruncated:
    @pytest.mark.parametrize("ratio", [2, 3, 7])
    def test_it_keeps_the_first_tokens_for_a_question(self, ratio: int) -> None:
        truncated = baseline(f"truncated:{ratio}")
        kept = ids_of(TEXT)[: math.ceil(TOKENS / ratio)]
        assert same(prefix_of(truncated), by_hand([kept], 0))
        assert answer(truncated).text == stock_answer(kept)

    def test_it_keeps_the_last_tokens_for_a_continuation(self) -> None:
        kept = ids_of(TEXT)[-math.ceil(TOKENS / 3) :]
        nll = baseline("truncated:3").score(ids_of(TEXT), CONTINUATION)
        assert nll == pytest.approx(stock_nll(kept, CONTINUATION), abs=1e-4)


class TestTextsThatDoNotFit:
    """1,200 positions, of which 1,024 are kept free for question and answer, and one is the sink's."""

    POSITIONS, ROOM = 1200, 175

    def baseline(self, name: str) -> Any:
        return baseline(name, saved_model(self.POSITIONS))

    @pytest.mark.parametrize(("name", "room"), [("full", ROOM), ("truncated:2", ROOM)])
    def test_uncompressed_they_are_cut_in_the_middle(self, name: str, room: int) -> None:
        one = self.baseline(name)
        outcome = answer(one)
        size = math.ceil(TOKENS / getattr(one, "ratio", 1))
        assert outcome.cut
        assert slots_in(outcome.kv_bytes) == room
        assert outcome.text == stock_answer(cut_middle(ids_of(TEXT)[:size], room), base=stock(self.POSITIONS))

    def test_what_fits_is_not_cut(self) -> None:
        assert not answer(self.baseline("truncated:3")).cut
        assert not any(answer(self.baseline(f"{compression}:4")).cut for compression in BUILT_IN)
        assert not answer(self.baseline("bm25:1")).cut  # it takes what fits

    @pytest.mark.parametrize("name", ["beacon:2", "beacon:2:3", "select:2", "select:2:3", "hybrid:2"])
    def test_compressed_they_are_cut_to_what_fits_compressed(self, name: str) -> None:
        one, item = self.baseline(name), an_item(context=CONTEXT * 2)
        outcome = answer(one, item)
        assert outcome.cut
        assert self.ROOM - 3 * 16 - 3 < slots_in(outcome.kv_bytes) <= self.ROOM  # but for windows that are not full

    def test_a_memory_whose_span_does_not_fit_is_interpolated_and_nothing_of_it_lost(self) -> None:
        one = self.baseline("select:4")
        prefix, alone = prefix_of(one), by_hand([ids_of(TEXT)], 4, "select")
        assert self.ROOM - 1 <= prefix.span <= 1 + self.ROOM < alone.span == 1 + TOKENS
        assert int(prefix.counts.sum()) == int(alone.counts.sum())
        assert 0 <= float(prefix.positions.min()) <= float(prefix.positions.max()) < prefix.span
        assert not answer(one).cut

    @pytest.mark.parametrize("name", ["zoom:8", "slice:8", "nested:8"])
    def test_what_is_loaded_of_a_text_must_fit_and_not_the_text(self, name: str) -> None:
        context = CONTEXT * (self.POSITIONS // TOKENS + 1)
        one = self.baseline(name)
        assert not answer(one, an_item(context=context)).cut
        prefix = prefix_of(one, "Where does the Fern rise?", context)
        assert math.ceil(len(TEXT) * len(context) / len(CONTEXT) / 8) - 16 < prefix.slots <= 1 + self.ROOM

    @pytest.mark.parametrize("name", ["full", "beacon:2", "select:2", "hybrid:2"])
    def test_a_score_of_a_part_would_not_be_comparable(self, name: str) -> None:
        with pytest.raises(CapacityError, match=rf"{name}: a text of {2 * TOKENS} tokens .* 1200 positions whole"):
            self.baseline(name).score(ids_of(TEXT) * 2, CONTINUATION)

    def test_more_documents_than_the_model_could_ever_hold_are_refused(self) -> None:
        with pytest.raises(CapacityError, match=r"beacon:2:50: .*name fewer"):
            answer(self.baseline("beacon:2:50"), an_item(context=CONTEXT * 2))

    def test_a_model_without_positions_to_spare_is_refused(self) -> None:
        with pytest.raises(CapacityError, match="the model has 1024 positions, 1024 of which are kept free"):
            answer(baseline("full", saved_model(1024)))


class TestRetrieved:
    def test_it_reads_the_passage_with_the_words_of_the_question(self) -> None:
        bm25 = baseline("bm25:9")  # less than one line
        for number, name in enumerate(RIVERS):
            found = ("\n" * bool(number) + CONTEXT[number])[: math.ceil(TOKENS / 9)]
            assert same(prefix_of(bm25, f"Where does the {name} rise?"), by_hand([ids_of(found)], 0))

    @pytest.mark.parametrize("ratio", [1, 2, 5, 9])
    def test_it_fills_its_budget_in_the_order_of_the_text(self, ratio: int) -> None:
        bm25 = baseline(f"bm25:{ratio}")
        assert prefix_of(bm25).slots == 1 + math.ceil(TOKENS / ratio)
        if ratio == 1:
            assert same(prefix_of(bm25), prefix_of(baseline("full")))

    def test_long_passages_are_searched_in_pieces(self) -> None:
        prefix = prefix_of(baseline("bm25:9"), "What is near lezaH?", (TEXT,))
        read = ids_of(TEXT)[6 * TOKENS // 7 :][: math.ceil(TOKENS / 9)]  # the last of seven pieces of about 64 tokens
        assert same(prefix, by_hand([read], 0))

    def test_it_has_no_score_without_a_question(self) -> None:
        with pytest.raises(InputError, match="bm25:4 needs a question"):
            baseline("bm25:4").score(ids_of(TEXT), CONTINUATION)


@every_compression
class TestCompressed:
    @pytest.mark.parametrize("ratio", [2, 4, 8])
    def test_its_memory_is_what_the_compressor_makes(self, compression: str, ratio: int) -> None:
        one, prefix = baseline(f"{compression}:{ratio}"), by_hand([ids_of(TEXT)], ratio, compression)
        assert same(prefix_of(one), prefix)
        assert answer(one).text == generated(prefix)

    def test_documents_are_compressed_alone_and_composed_cut_between_passages(self, compression: str) -> None:
        ends = [0, *(sum(map(len, CONTEXT[:n])) + n - 1 for n in (2, 4, 6)), TOKENS]
        parts = [ids_of(TEXT[start:stop]) for start, stop in pairwise(ends)]
        prefix = by_hand(parts, 4, compression)
        composed = baseline(f"{compression}:4:4")
        assert same(prefix_of(composed), prefix)
        assert answer(composed).text == generated(prefix)
        assert not same(prefix_of(composed), prefix_of(baseline(f"{compression}:4")))

    def test_one_document_is_the_text(self, compression: str) -> None:
        whole = prefix_of(baseline(f"{compression}:4"))
        assert torch.equal(prefix_of(baseline(f"{compression}:4:1")).keys, whole.keys)

    def test_the_question_is_never_seen(self, compression: str) -> None:
        one = baseline(f"{compression}:4")
        assert torch.equal(prefix_of(one).keys, prefix_of(one, "How long is the Fern?").keys)

    @pytest.mark.parametrize("numbers", ["4", "2:3"])
    def test_it_scores_as_the_stock_model_does_behind_its_prefix(self, compression: str, numbers: str) -> None:
        one = baseline(f"{compression}:{numbers}")
        naive = nll_behind(prefix_of(one, None, (TEXT,)), CONTINUATION)
        assert one.score(ids_of(TEXT), CONTINUATION) == pytest.approx(naive, abs=1e-4)

    def test_without_a_sink_a_bos_leads_the_text(self, compression: str) -> None:
        one = baseline(f"{compression}:4", saved_model(sink=0))
        slots = sum(math.ceil(min(32, 1 + TOKENS - at) / 4) for at in range(0, 1 + TOKENS, 32))
        assert prefix_of(one).slots == slots
        assert answer(one).text
        assert math.isfinite(one.score(ids_of(TEXT), CONTINUATION))


@every_compression
@pytest.mark.parametrize("bits", [8, 4])
class TestQuantized:
    DOCUMENTS = ("\n".join(CONTEXT[:4]), "\n" + "\n".join(CONTEXT[4:]))

    def test_the_memory_of_each_document_is_quantized_and_the_sink_is_not(self, compression: str, bits: int) -> None:
        one = baseline(f"{compression}:4:2@int{bits}")
        documents = [ids_of(text) for text in self.DOCUMENTS]
        prefix = by_hand(documents, 4, compression, lambda kv: quantized(kv, bits).dequantized())
        assert same(prefix_of(one), prefix)
        assert not same(prefix, by_hand(documents, 4, compression))
        assert answer(one).text == generated(prefix)
        continued = prefix_of(one, None, (TEXT,))
        assert one.score(ids_of(TEXT), CONTINUATION) == pytest.approx(nll_behind(continued, CONTINUATION), abs=1e-4)

    def test_its_bytes_are_those_of_the_quantized_documents(self, compression: str, bits: int) -> None:
        sizes: list[int] = []

        def noted(kv: MemoryKV) -> MemoryKV:
            sizes.append(quantized(kv, bits).nbytes)
            return kv

        by_hand([ids_of(text) for text in self.DOCUMENTS], 4, compression, noted)
        assert answer(baseline(f"{compression}:4:2@int{bits}")).kv_bytes == sum(sizes)


class TestZoomed:
    LINES = (*accumulate((len(line) + bool(number) for number, line in enumerate(CONTEXT)), initial=0),)

    def line(self, memory: MemoryKV, number: int, lead: int = 0) -> MemoryKV:
        start, stop = self.LINES[number : number + 2]
        return memory.between(lead + start if number else 0, lead + stop)

    @pytest.mark.parametrize("sink", [0, 1])
    def test_the_passage_with_the_words_of_the_question_is_loaded_as_it_was_read_in_the_text(self, sink: int) -> None:
        model = saved_model(sink=sink)
        whole = prefix_of(baseline("select:1", model)).between(sink, 1 + TOKENS)
        one = baseline("slice:7", model)  # more than one line
        for number, name in enumerate(RIVERS):
            prefix, line = prefix_of(one, f"Where does the {name} rise?"), self.line(whole, number, 1 - sink)
            assert same(prefix.between(prefix.span - line.span, prefix.span), line)

    def test_the_next_best_stands_before_it(self) -> None:
        whole = prefix_of(baseline("select:1")).between(1, 1 + TOKENS)
        prefix = prefix_of(baseline("slice:3"), "Where does the Dune rise, rise, and where does Dune end: in Amber?")
        both = MemoryKV.concat([self.line(whole, number) for number in (0, 3)])
        assert same(prefix.between(prefix.span - both.span, prefix.span), both)

    def test_it_takes_what_half_of_the_tokens_leave_of_the_passage(self) -> None:
        rich, question = prefix_of(baseline("select:2")).between(1, 1 + TOKENS), "Where does the Fern rise?"
        prefix, line = prefix_of(baseline("zoom:7"), question), self.line(rich, 5)
        assert same(prefix.between(prefix.span - line.span, prefix.span), line)
        assert prefix.slots < prefix_of(baseline("select:2")).slots / 3

    def test_what_is_looked_up_comes_in_where_words_do_not_tell(self) -> None:
        for question, told in (
            ("Is it the Fern that rises?", True),  # both words
            ("Which peaks may feed the Fern when the snow melts?", False),  # one of six
            ("Why?", True),  # no word: it is about all of them
        ):
            looked, found = (prefix_of(baseline(name), question) for name in ("look:7", "zoom:7"))
            assert same(looked, found) == told
            assert looked.slots <= found.slots + 1

    def test_documents_compete_for_one_budget(self) -> None:
        parts = [baseline("select:2").memories([ids_of(text)], 2, "select")[0] for text in TestQuantized.DOCUMENTS]
        prefix = prefix_of(baseline("zoom:7:2"), "Where does the Fern rise?")
        line = self.line(MemoryKV.concat(parts), 5)
        assert same(prefix.between(prefix.span - line.span, prefix.span), line)

    def test_without_words_in_common_it_selects_as_blindly_as_nested_does(self) -> None:
        assert same(prefix_of(baseline("zoom:6"), "Why?"), prefix_of(baseline("nested:6"), "Where does the Fern rise?"))

    def test_of_a_text_of_one_window_nested_memories_are_those_that_are_read_at_their_ratio(self) -> None:
        for ratio in (2, 4, 8):
            read, nested = (prefix_of(baseline(f"{name}:{ratio}"), None, (TEXT[:32],)) for name in ("select", "nested"))
            assert same(read, nested)

    @pytest.mark.parametrize("ratio", [2, 4, 9])
    def test_it_has_no_more_bytes_than_others_of_its_ratio_and_hardly_less(self, ratio: int) -> None:
        budget, size = answer(baseline(f"bm25:{ratio}")).kv_bytes, saved_model().slot_bytes + HEADS * PLACE
        for name in ("zoom", "slice", "nested"):
            assert budget - 0.3 * 64 * size < answer(baseline(f"{name}:{ratio}")).kv_bytes <= budget

    @pytest.mark.parametrize("name", ["zoom:4", "slice:4"])
    def test_it_has_no_score_without_a_question(self, name: str) -> None:
        with pytest.raises(InputError, match=f"{name} needs a question"):
            baseline(name).score(ids_of(TEXT), CONTINUATION)


def test_the_expected_score_chooses_as_many_tokens_and_others() -> None:
    repeat, expected = (prefix_of(baseline(f"{name}:4")) for name in ("select", "select-expected"))
    assert (expected.span, len(expected.positions)) == (repeat.span, len(repeat.positions))
    assert not same(expected, repeat)


def test_beacons_take_a_position_each_and_chosen_tokens_keep_theirs() -> None:
    beacons, chosen, both = (prefix_of(baseline(f"{compression}:4")) for compression in BUILT_IN)
    assert beacons.span == beacons.slots
    assert chosen.span == 1 + TOKENS
    assert both.span == chosen.span + sum(math.ceil(min(32, TOKENS - at) / 16) for at in range(0, TOKENS, 32))
    assert len(set(beacons.counts.flatten().tolist())) == 1
    assert len(set(chosen.counts.flatten().tolist())) > 1
    assert len(set(both.counts.flatten().tolist())) > 1


def test_chosen_tokens_of_one_window_are_those_of_the_stock_model() -> None:
    """Of a text that needs no memory of earlier windows: its K/V, some of them hidden from some heads."""
    model, chosen = saved_model(), prefix_of(baseline("select:4"), None, (TEXT[:32],))
    cache = DynamicCache()
    with torch.no_grad():
        stock()(torch.tensor([[*model.sink_ids, *ids_of(TEXT[:32])]]), past_key_values=cache)
    for layer, whole in enumerate(cache.layers):
        for head, (keys, values, positions) in enumerate(chosen.layer(layer)):
            turned = apply_rotation(keys, *model.rope.table(positions))
            assert torch.allclose(whole.keys[0, head, positions], turned, atol=1e-4)  # type: ignore[union-attr, attr-defined]
            assert torch.allclose(whole.values[0, head, positions], values, atol=1e-4)  # type: ignore[union-attr, attr-defined]


@pytest.mark.parametrize("ratio", [2, 4, 9])
def test_baselines_of_one_ratio_have_one_budget(ratio: int) -> None:
    slots = math.ceil(TOKENS / ratio)
    windows = -(-TOKENS // 32)
    for name in ("truncated", "bm25", *BUILT_IN):
        one = baseline(f"{name}:{ratio}")
        kv_bytes, prefix = answer(one).kv_bytes, prefix_of(one)
        assert slots_in(kv_bytes) == prefix.slots - 1
        assert kv_bytes - PLACE * HEADS * (prefix.slots - 1) == (prefix.slots - 1) * one.model.slot_bytes
        assert slots <= slots_in(kv_bytes) <= slots + windows  # of a window's last, incomplete unit


@pytest.mark.parametrize("ratio", [2, 4, 9])
def test_all_compressions_keep_as_much_to_the_last_byte(ratio: int) -> None:
    assert len({answer(baseline(f"{compression}:{ratio}")).kv_bytes for compression in BUILT_IN}) == 1


class TestReading:
    def count(self, one: Baseline, monkeypatch: pytest.MonkeyPatch) -> list[object]:
        asked: list[object] = []
        read = one.read  # type: ignore[attr-defined]

        def counted(passages: object, question: object) -> object:
            asked.append(question)
            return read(passages, question)

        monkeypatch.setattr(one, "read", counted)
        return asked

    ITEMS = (an_item("One?"), an_item("Two?"), an_item("Three?", CONTEXT[:3]), an_item("Four?"))

    @pytest.mark.parametrize("name", ["full", "none", "truncated:4", "beacon:4", "select:4", "hybrid:4"])
    def test_a_text_is_read_once_for_questions_that_follow_each_other(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = baseline(name)
        asked = self.count(one, monkeypatch)
        one.answer(self.ITEMS, 2)
        assert asked == ["One?", "Three?", "Four?"]
        one.answer(self.ITEMS[3:], 2)
        assert len(asked) == 3

    def test_who_must_know_the_question_reads_for_each(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one = baseline("bm25:4")
        asked = self.count(one, monkeypatch)
        one.answer(self.ITEMS, 2)
        assert asked == ["One?", "Two?", "Three?", "Four?"]

    def test_reading_counts_in_the_time_of_each_question(self) -> None:
        beacons = baseline("beacon:4")
        _, read = beacons.memory(self.ITEMS[0])
        assert all(outcome.seconds > read for outcome in beacons.answer(self.ITEMS[:2], 2))

    @every_compression
    def test_a_batch_answers_as_each_item_alone(self, compression: str) -> None:
        one = baseline(f"{compression}:4")
        together = [outcome.text for outcome in one.answer(self.ITEMS, 12)]
        assert together == [answer(one, item).text for item in self.ITEMS]
        assert len(set(together)) > 2  # the tiny model does not mind every question
