from __future__ import annotations

import gc
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from evaluation_samples import (
    CONTEXT,
    QUESTION,
    TEXT,
    an_item,
    answer,
    baseline,
    ids_of,
    model_with_answers,
    model_with_lora,
    saved_model,
    stock_answer,
    stock_nll,
)
from tiny_models import FAMILIES, some_ids
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from beacon_memory.errors import CapacityError, InputError, MissingDependencyError
from beacon_memory.evaluation.baseline_names import baselines
from beacon_memory.evaluation.pieces import cut_middle
from beacon_memory.evaluation.presses import PRESSES, Selection
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.modeling.attention import IMPLEMENTATION, beacon_attention

TOKENS = len(TEXT)  # every byte is one
CONTINUATION = some_ids(40, seed=7)
LAYERS, HEADS = 3, 2  # of the tiny model

every_press = pytest.mark.parametrize("press", PRESSES)


def selection(one: Any, text: str = TEXT) -> Selection:
    made: Selection = one.read([ids_of(text)], None)
    return made


def keys(cache: DynamicCache) -> list[Tensor]:
    """Of each layer [kv_heads, slots, head_dim], behind RoPE."""
    return [cast(Tensor, layer.keys)[0] for layer in cache.layers]  # type: ignore[attr-defined]


def whole(one: Any) -> Selection:
    return selection(baseline("expected:1", one.model))


def score(one: Any, chosen: Selection, monkeypatch: pytest.MonkeyPatch) -> float:
    """The score behind a selection."""
    with monkeypatch.context() as patch:
        patch.setattr(one, "read", lambda *_: chosen)
        scored: float = one.score(ids_of(TEXT), CONTINUATION)
        return scored


@every_press
class TestEveryPress:
    def test_at_ratio_1_it_is_full_text(self, press: str) -> None:
        one = baseline(f"{press}:1")
        assert answer(one).text == stock_answer(ids_of(TEXT))
        nll = one.score(ids_of(TEXT), CONTINUATION)
        assert nll == pytest.approx(stock_nll(ids_of(TEXT), CONTINUATION), abs=1e-4)
        assert answer(one).kv_bytes == TOKENS * one.model.slot_bytes

    def test_less_than_all_is_another_text(self, press: str) -> None:
        one = baseline(f"{press}:4")
        assert answer(one).text != stock_answer(ids_of(TEXT))
        assert abs(one.score(ids_of(TEXT), CONTINUATION) - stock_nll(ids_of(TEXT), CONTINUATION)) > 0.01

    @pytest.mark.parametrize("ratio", [2, 3, 4, 7, 8, 31])
    def test_its_budget_is_that_of_the_other_baselines(self, press: str, ratio: int) -> None:
        one = baseline(f"{press}:{ratio}")
        slots = answer(one).kv_bytes / one.model.slot_bytes
        assert slots == pytest.approx(math.ceil(TOKENS / ratio), abs=1.01 / (LAYERS * HEADS))
        truncated = answer(baseline(f"truncated:{ratio}")).kv_bytes
        position = LAYERS * HEADS * 4
        assert truncated == math.ceil(TOKENS / ratio) * (one.model.slot_bytes + position)

    def test_the_question_is_never_shown_to_it(self, press: str) -> None:
        one, read = baseline(f"{press}:4"), []

        def note(_: object, args: object, kwargs: dict[str, Tensor]) -> None:
            read.append(kwargs["input_ids"][0].tolist())

        one.stock.model.register_forward_pre_hook(note, with_kwargs=True)
        one.memory(an_item())
        first, *others = (one.model.tokenizer.decode(ids) for ids in read)
        assert first == f"<s>{TEXT}"
        repeating = f"\n\nRepeat the previous context exactly.</s><|assistant|>{TEXT}"
        assert others == ([repeating] if press == "kvzip" else [])
        one.answer([an_item("Another question?")], 2)
        assert one.model.tokenizer.decode(read[len(others) + 1]) == "<|user|>Another question?</s><|assistant|>"

    def test_a_text_is_read_once_for_its_questions(self, press: str, monkeypatch: pytest.MonkeyPatch) -> None:
        one, asked = baseline(f"{press}:4"), []
        read = one.read
        monkeypatch.setattr(one, "read", lambda passages, question: asked.append(question) or read(passages, question))
        items = [an_item("One?"), an_item("Two?"), an_item("Three?", CONTEXT[:3]), an_item("Four?")]
        together = [outcome.text for outcome in one.answer(items, 12)]
        assert asked == ["One?", "Three?", "Four?"]
        assert together == [answer(baseline(f"{press}:4"), item).text for item in items]

    def test_it_reads_with_the_lora(self, press: str) -> None:
        model = model_with_lora()
        tokens = torch.tensor([[*model.sink_ids, *ids_of(TEXT), *CONTINUATION]])
        with torch.no_grad():
            logits = model.base(input_ids=tokens).logits[0, -len(CONTINUATION) : -1]
        naive = torch.nn.functional.cross_entropy(logits, torch.tensor(CONTINUATION[1:])).item()
        nll = baseline(f"{press}:1", model).score(ids_of(TEXT), CONTINUATION)
        assert nll == pytest.approx(naive, abs=1e-4)

    def test_the_lora_of_answers_is_for_what_follows_here_too(self, press: str) -> None:
        model = model_with_answers()
        one, full = baseline(f"{press}:1", model), baseline("full", model)
        assert answer(one).text == answer(full).text
        nll = full.score(ids_of(TEXT), CONTINUATION)
        assert one.score(ids_of(TEXT), CONTINUATION) == pytest.approx(nll, abs=1e-4)
        assert abs(baseline("full").score(ids_of(TEXT), CONTINUATION) - nll) > 0.01

    def test_it_leaves_nothing_behind_in_the_stock_model(self, press: str) -> None:
        one = baseline(f"{press}:4")
        hooks = self.hooks(one)
        answer(one)
        one.score(ids_of(TEXT), CONTINUATION)
        assert self.hooks(one) == hooks
        assert one.stock.config.name_or_path == saved_model().base.config.name_or_path
        with torch.no_grad():
            tokens = torch.tensor([[*one.model.sink_ids, *ids_of(TEXT), *CONTINUATION]])
            again = one.stock(input_ids=tokens).logits[0, -len(CONTINUATION) : -1]
        nll = torch.nn.functional.cross_entropy(again, torch.tensor(CONTINUATION[1:])).item()
        assert nll == pytest.approx(stock_nll(ids_of(TEXT), CONTINUATION), abs=1e-4)

    def hooks(self, one: Any) -> list[int]:
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in one.stock.modules()]

    def test_a_text_that_does_not_fit_is_cut_in_the_middle(self, press: str) -> None:
        one = baseline(f"{press}:1", saved_model(1200))
        assert answer(one).cut
        assert answer(one).text == stock_answer(cut_middle(ids_of(TEXT), 175))
        with pytest.raises(CapacityError, match=rf"{press}:1: a text of {TOKENS} tokens .* 1200 positions whole"):
            one.score(ids_of(TEXT), CONTINUATION)

    def test_short_texts_can_be_selected_from(self, press: str) -> None:
        one = baseline(f"{press}:4")
        outcome = answer(one, an_item(context=("A short text.",)))
        assert outcome.kv_bytes / one.model.slot_bytes == pytest.approx(4, abs=1.01 / (LAYERS * HEADS))
        with pytest.raises(InputError, match="4 tokens is too short"):
            answer(one, an_item(context=("Oh!",)))

    def test_without_a_sink_a_bos_leads_the_text(self, press: str) -> None:
        one = baseline(f"{press}:1", saved_model(sink=0))
        assert answer(one).text == stock_answer(ids_of(TEXT))
        assert answer(baseline(f"{press}:4", saved_model(sink=0))).text != stock_answer(ids_of(TEXT))

    def test_without_the_package_it_says_how_to_get_it(self, press: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "kvpress", None)
        with pytest.raises(MissingDependencyError, match=rf"{press}:4 .*pip install 'beacon-memory\[eval\]'"):
            baseline(f"{press}:4")


@every_press
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_models_of_other_families_can_be_selected_from(press: str, family: str) -> None:
    model = saved_model(family=family)
    full, whole_text, part = (baseline(name, model) for name in ("full", f"{press}:1", f"{press}:4"))
    nll = full.score(ids_of(TEXT), CONTINUATION)
    assert whole_text.score(ids_of(TEXT), CONTINUATION) == pytest.approx(nll, abs=1e-4)
    assert abs(part.score(ids_of(TEXT), CONTINUATION) - nll) > 0.01
    assert answer(whole_text).text == answer(full).text
    assert answer(part).kv_bytes < answer(full).kv_bytes / 3.9


@pytest.mark.parametrize("press", ["expected", "snapkv"])
class TestShorterCaches:
    """ExpectedAttention and SnapKV keep as many slots in every head, and drop the others."""

    @pytest.mark.parametrize("ratio", [2, 3, 8])
    def test_every_head_keeps_as_many_of_the_texts_own_keys(self, press: str, ratio: int) -> None:
        one = baseline(f"{press}:{ratio}")
        chosen, full = selection(one), whole(one)
        assert (chosen.hidden, chosen.read) == (None, 1 + TOKENS)
        for kept, all_keys in zip(keys(chosen.cache), keys(full.cache), strict=True):
            assert kept.shape[:2] == (HEADS, 1 + math.ceil(TOKENS / ratio))
            for head in range(HEADS):
                assert len(set(self.positions(kept[head], all_keys[head]))) == kept.shape[1]

    def test_dropped_slots_are_as_good_as_hidden_ones(self, press: str, monkeypatch: pytest.MonkeyPatch) -> None:
        one = baseline(f"{press}:4")
        chosen, full = selection(one), whole(one)
        hidden = torch.ones(LAYERS, HEADS, 1 + TOKENS, dtype=torch.bool)
        for layer, (kept, all_keys) in enumerate(zip(keys(chosen.cache), keys(full.cache), strict=True)):
            for head in range(HEADS):
                hidden[layer, head, self.positions(kept[head], all_keys[head])] = False
        dropped = score(one, chosen, monkeypatch)
        assert dropped == pytest.approx(score(one, replace(full, hidden=hidden), monkeypatch), abs=1e-4)
        hidden[:, 0] = hidden[:, 1]  # what the other head keeps
        assert dropped != pytest.approx(score(one, replace(full, hidden=hidden), monkeypatch), abs=1e-3)

    def positions(self, kept: Tensor, full: Tensor) -> list[int]:
        """Where in the whole text the kept keys [slots, head_dim] of a head are from."""
        equal = (kept[:, None] == full[None]).all(dim=-1)
        assert equal.any(dim=1).all()
        return equal.int().argmax(dim=1).tolist()


def test_snapkv_keeps_the_last_tokens_and_others() -> None:
    for ratio, window in ((2, 64), (8, 28)):  # of 221 and 56 slots
        one = baseline(f"snapkv:{ratio}")
        last = {tuple(key.tolist()) for key in keys(whole(one).cache)[0][0, -window:].round(decimals=3)}
        kept = {tuple(key.tolist()) for key in keys(selection(one).cache)[0][0].round(decimals=3)}
        assert last < kept
        assert one.press.window_size == window


class TestHiddenSlots:
    """KVzip keeps more in some heads than in others: the cache stays whole, and slots are hidden from heads."""

    def test_they_are_as_many_as_asked_not_evenly_spread(self) -> None:
        chosen = selection(baseline("kvzip:4"))
        assert chosen.hidden is not None
        assert chosen.hidden.shape == (LAYERS, HEADS, 1 + TOKENS)
        kept = (~chosen.hidden).sum(dim=-1)
        assert int(kept.sum()) - LAYERS * HEADS * (1 + math.ceil(TOKENS / 4)) in (0, 1)
        assert len(set(kept.flatten().tolist())) > 1

    def test_nothing_that_follows_sees_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one = baseline("kvzip:4")
        chosen = selection(one)
        before = score(one, chosen, monkeypatch)
        assert score(one, self.garbled(chosen, hidden=True), monkeypatch) == pytest.approx(before, abs=1e-4)
        assert score(one, self.garbled(chosen, hidden=False), monkeypatch) != pytest.approx(before, abs=1e-2)

    def garbled(self, chosen: Selection, *, hidden: bool) -> Selection:
        """With other keys and values in those slots that are hidden, or in those that are not."""
        cache = DynamicCache()
        assert chosen.hidden is not None
        for layer, kept in enumerate(chosen.cache.layers):
            spoilt = chosen.hidden[layer] if hidden else ~chosen.hidden[layer]
            cache.update(
                cast(Tensor, kept.keys).masked_fill(spoilt[None, :, :, None], 3.0),  # type: ignore[attr-defined]
                cast(Tensor, kept.values).masked_fill(spoilt[None, :, :, None], 3.0),  # type: ignore[attr-defined]
                layer,
            )
        return replace(chosen, cache=cache)

    def test_answers_see_what_scores_see(self) -> None:
        """Token by token, and in one piece."""
        one = baseline("kvzip:4")
        chosen = selection(one)
        prompt = chat_prompt(one.model, QUESTION, behind_memory=True)
        tokens = one._generate(chosen, prompt, 6)
        for count in range(1, len(tokens)):
            likely = one.score(ids_of(TEXT), [*prompt, *tokens[: count + 1]])
            other = one.score(ids_of(TEXT), [*prompt, *tokens[:count], (tokens[count] + 1) % 262])
            assert likely < other

    def test_selections_on_one_stock_model_do_not_mix(self) -> None:
        field = baselines(["kvzip:2", "kvzip:8", "expected:4"], saved_model())
        alone = [answer(baseline(one.name)).text for one in field]
        first = [answer(one).text for one in field]
        second = [answer(one).text for one in field]  # behind what each has kept
        assert first == second == alone
        assert len(set(alone)) == 3

    def test_the_tokenizer_that_kvzip_loads_goes_with_the_baseline(self) -> None:
        one = baseline("kvzip:4")
        folder = Path(one._folder.name)
        template = one.model.tokenizer.chat_template
        answer(one)
        assert folder.exists()
        assert one.model.tokenizer.chat_template == template
        del one
        gc.collect()
        assert not folder.exists()


def test_beacons_read_the_same_after_kvpress_has_wrapped_all_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    baseline("expected:2")  # imports kvpress
    assert ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] is not beacon_attention
    names = ("full", "beacon:4", "select:4")
    wrapped = [answer(baseline(name)).text for name in names]
    keys_wrapped = baseline("beacon:4").read([ids_of(TEXT)], None).kv.keys
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, IMPLEMENTATION, beacon_attention)
    assert torch.equal(baseline("beacon:4").read([ids_of(TEXT)], None).kv.keys, keys_wrapped)
    assert [answer(baseline(name)).text for name in names] == wrapped
