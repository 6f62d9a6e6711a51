from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import BOS, FAMILIES, some_ids, tiny_base, tiny_model, tiny_tokenizer
from torch import Tensor

from beacon_memory import BeaconMemory, BeaconModel
from beacon_memory.compression.selection import read_raw, read_sink
from beacon_memory.config import BeaconConfig
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.kv.levels import LEVELS
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.lookup import Lookup, gist_slots, sections_of_entries
from beacon_memory.ranking import joined

QUESTION = "Who rows?"
SECTIONS = 4
TEXT = some_ids(40, seed=3)
OF_TOKENS = torch.arange(40) // 11


def stock_shares(family: str, prompt: list[int]) -> Tensor:
    """[layers, heads, sections]: eager attention of the stock model's question to the text without its bos."""
    base = tiny_base(family, attn_implementation="eager")
    with torch.no_grad():
        attentions = base(torch.tensor([[BOS, *TEXT, *prompt]]), output_attentions=True).attentions
    weights = torch.stack(attentions)[:, 0, :, 1 + len(TEXT) :, 1 : 1 + len(TEXT)]
    received = (weights / weights.sum(-1, keepdim=True)).mean(2)
    return torch.zeros(*received.shape[:2], SECTIONS).index_add_(2, OF_TOKENS, received)


@pytest.mark.parametrize("family", FAMILIES)
def test_relevance_is_the_attention_that_the_stock_model_gives_to_sections(family: str) -> None:
    model = tiny_model(family, BeaconConfig(beacon_window=64), tokenizer=tiny_tokenizer())
    lookup, sink = Lookup(model), MemoryKV.of(read_sink(model))
    read = MemoryKV.of(read_raw(model, model.prefix(sink), TEXT))
    sections = dict.fromkeys(range(3), [torch.cat((torch.tensor([-1]), OF_TOKENS))] * 2)
    expected = stock_shares(family, chat_prompt(model, QUESTION, behind_memory=True))

    asked = torch.stack([expected[layer, head] for layer, head in lookup.heads])
    relevance = lookup.relevance(QUESTION, model.prefix(sink, read), sections, SECTIONS)
    assert len(lookup.heads) == 5
    assert relevance == pytest.approx(asked.log().mean(0).exp().tolist(), rel=1e-3)


def test_entries_belong_to_the_sections_that_they_were_counted_in() -> None:
    counts = torch.zeros(3, LEVELS, 2, 2, dtype=torch.int64)
    counts[0, 0], counts[0, 5], counts[1, 5], counts[2, 13] = 7, 1, 2, torch.tensor([[1, 0], [3, 1]])
    sections = sections_of_entries([counts[:1], counts[1:]], [1, 5, 6], [1], sink=2)

    assert list(sections) == [1]
    assert [head.tolist() for head in sections[1]] == [[-1, -1, 0, 1, 1, 2, 2, 2], [-1, -1, 0, 1, 1, 2]]


@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (80, 10), (81, 11), (1_000_000, 1024)])
def test_gist_has_an_eighth_of_the_tokens_and_a_bounded_size(tokens: int, slots: int) -> None:
    assert gist_slots(tokens) == slots


@pytest.mark.parametrize(("told", "scores"), [(2 / 3, [1.25, 1, 1]), (1 / 3, [0.75, 0.5, 1]), (2 / 15, [0.45, 0.2, 1])])
def test_words_count_by_how_much_they_tell_beside_attention(told: float, scores: list[float]) -> None:
    assert joined([4.0, 4.0, 0.0], [0.1, 0.0, 0.4], told) == pytest.approx(scores)


def test_passages_without_any_score_have_none_joined() -> None:
    assert joined([0.0, 0.0], [0.0, 0.0], 0.5) == [0, 0]
    assert joined([], [], 0.5) == []


NOTES = (
    "Mr Brown paints the fence on Mondays and sells the old boards in town.",
    "The physician's telephone number is 4413907.",
    "On Tuesday the council talked about the new bridge for three hours.",
    "A grey cat sleeps in the bakery and nobody knows whose it is.",
    "The train to the coast is late whenever it snows in the hills.",
    "Her garden has forty roses, two pears and a bench of oak.",
)


@pytest.mark.slow
def test_default_model_finds_what_shares_no_word_with_the_question(tmp_path: Any) -> None:
    model, text = BeaconModel.from_pretrained(), "\n\n".join((one + " ") * 5 for one in NOTES)
    assert len({*model.lookup_heads} & {*Lookup(model).found()}) >= 4  # processors round differently
    for options, found in (({"picker": "text"}, False), ({}, True)):
        memory = BeaconMemory(tmp_path, model, **options)
        memory.add("notes", text)
        answer = memory.ask(
            "How can one call the doctor on Sunday or in the hills?", "notes", budget=40, max_new_tokens=16
        )
        best = max(answer.sources, key=lambda source: source.relevance)
        assert ("4413907" in text[best.start : best.stop] and best.relevance > 0) == found
        assert ("4413907" in answer.text) == found
