from __future__ import annotations

import pytest
from evaluation_samples import (
    CONTEXT,
    QUESTION,
    TEXT,
    an_item,
    answer,
    baseline,
    continued,
    ids_of,
    model_with_lora,
    saved_model,
    stock,
    stock_answer,
    stock_nll,
)
from tiny_models import some_ids

CONTINUATION = some_ids(40, seed=7)


def prompt(text: str) -> list[int]:
    """Return the base's own chat template with text, instruction and question, after a bos."""
    message = f"{text}\n\nAnswer the question with a few words from the text.\nQuestion: {QUESTION}"
    return ids_of(f"<s><|user|>{message}</s><|assistant|>")


def test_it_answers_as_the_stock_model_with_its_own_template() -> None:
    outcome = answer(baseline("base", model_with_lora()))
    assert outcome.text == continued(stock(), prompt(TEXT))
    assert outcome.kv_bytes == len(TEXT) * saved_model().slot_bytes
    assert not outcome.cut


def test_lora_and_template_of_the_adapter_are_those_of_the_others() -> None:
    model = model_with_lora()
    tokens = [*model.sink_ids, *ids_of(TEXT), *ids_of(f"Q: {QUESTION} A:")]
    assert answer(baseline("full", model)).text == continued(model.base, tokens)
    assert answer(baseline("full", model)).text != stock_answer(ids_of(TEXT))


def test_it_scores_as_the_stock_model_does() -> None:
    nll = baseline("base", model_with_lora()).score(ids_of(TEXT), CONTINUATION)
    assert nll == pytest.approx(stock_nll(ids_of(TEXT), CONTINUATION), abs=1e-4)


def test_without_a_lora_full_scores_the_same_to_the_last_bit() -> None:
    of_base, of_full = (baseline(name).score(ids_of(TEXT), CONTINUATION) for name in ("base", "full"))
    assert of_base == of_full
    assert baseline("full", model_with_lora()).score(ids_of(TEXT), CONTINUATION) != of_base


def test_a_text_that_does_not_fit_is_cut_in_the_middle() -> None:
    outcome = answer(baseline("base", saved_model(1200)), an_item(context=CONTEXT))
    assert outcome.cut
    assert outcome.text == continued(stock(1200), prompt(TEXT[:88] + TEXT[-87:]))
    assert outcome.kv_bytes == 175 * saved_model().slot_bytes
