"""What is not in memory is told: by the words that were loaded, and by how sure the model is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory import Answer, BeaconMemory, Evidence, Question
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import InputError
from beacon_memory.evidence import words_together
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.results import LEAST_WORDS, NOT_IN_MEMORY, SourcePassage

REST = "It is seen by day and by night, and nobody in the village could tell us much more of it. " * 2
TEXT = "".join(
    f"The {name} lives in the {place}. {REST}\n\n" for name, place in (("otter", "brook"), ("heron", "reeds"))
)
KNOWN, UNKNOWN = "Where does the heron live?", "Which tax did parliament abolish?"
SHORT = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    return tiny_model("llama", BeaconConfig(beacon_window=64), tokenizer=tiny_tokenizer(), max_position_embeddings=2048)


@pytest.fixture
def memory(model: BeaconModel, tmp_path: Path) -> Iterator[BeaconMemory]:
    with BeaconMemory(tmp_path / "store", model, reserve=100) as memory:
        memory.add("animals", TEXT, ratio=2)
        yield memory


@pytest.fixture
def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tiny model is sure of is enough: it knows nothing."""
    monkeypatch.setattr("beacon_memory.results.LEAST_LIKELIHOOD", 0.0)


def source(start: int, stop: int, document: str = "a") -> SourcePassage:
    return SourcePassage(document, start, stop, 0.0, 1.0)


def test_words_count_that_one_loaded_passage_has_together() -> None:
    places = {"heron": [("a", 0, 10), ("a", 10, 20)], "reed": [("a", 10, 20), ("b", 0, 10)], "tax": [("b", 0, 10)]}
    assert words_together(places, [source(0, 100), source(0, 100, "b")]) == pytest.approx(2 / 3)
    assert words_together(places, [source(0, 10)]) == pytest.approx(1 / 3)
    assert words_together(places, [source(5, 12)]) == pytest.approx(2 / 3)  # a part of it
    assert words_together(places, [source(20, 30)]) == 0.0
    assert words_together(places, []) == 0.0
    assert words_together(places, [], [["the", "heron"], ["heron", "reed", "tax"]]) == 1.0
    assert words_together({}, [source(0, 10)]) == 0.0


def test_a_question_about_what_was_loaded_is_supported(memory: BeaconMemory, sure: None) -> None:
    answer = memory.ask(KNOWN, "animals", max_new_tokens=3)
    assert answer.evidence is not None
    assert answer.evidence.words == 1.0  # heron, lives
    assert answer.supported is True


def test_a_question_about_something_else_is_not(memory: BeaconMemory, sure: None) -> None:
    answer = memory.ask(UNKNOWN, "animals", max_new_tokens=3)
    assert answer.evidence is not None
    assert answer.evidence.words < LEAST_WORDS
    assert answer.supported is False
    assert answer.text != NOT_IN_MEMORY  # nobody asked for that


def test_only_what_was_loaded_counts(memory: BeaconMemory) -> None:
    for budget in (30, None):
        answer = memory.ask("Otter and heron and brook and reeds?", "animals", budget=budget, max_new_tokens=1)
        assert answer.evidence is not None
        assert answer.evidence.words == 0.5
    memory.add("more", "The otter and the heron meet in the brook behind the reeds.", ratio=2)
    answer = memory.ask("Otter and heron and brook and reeds?", ["animals", "more"], max_new_tokens=1)
    assert answer.evidence is not None
    assert answer.evidence.words == 1.0


def test_likelihood_is_that_of_the_stock_model(memory: BeaconMemory, model: BeaconModel) -> None:
    answer = memory.ask("Where?", [], max_new_tokens=4, do_sample=False)
    assert answer.evidence is None
    ticket = memory._submit(memory._asked(Question("Where?", [], options=SHORT)))
    generation = ticket.result()
    prompt = torch.tensor([[*memory._asked(Question("Where?", [], options=SHORT)).request.prompt, *generation.tokens]])
    ids = torch.cat([torch.tensor([model.sink_ids]), prompt], 1)
    with torch.inference_mode():
        logits = model.base(input_ids=ids).logits[0, -len(generation.tokens) - 1 : -1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(generation.tokens)[:, None])[:, 0].tolist()
    assert generation.likelihoods == pytest.approx(expected, abs=1e-3)


def test_options_do_not_change_how_sure_the_model_is(memory: BeaconMemory) -> None:
    plain = memory.ask(KNOWN, "animals", max_new_tokens=1, do_sample=False)
    assert plain.evidence is not None
    assert plain.evidence.likelihood is not None
    hot = memory.ask(KNOWN, "animals", max_new_tokens=1, temperature=0.01, top_k=1, seed=1)
    assert hot.evidence is not None
    assert hot.evidence.likelihood == pytest.approx(plain.evidence.likelihood, rel=1e-3)
    assert 0 < plain.evidence.likelihood < 1


def test_an_unsure_answer_is_not_supported(memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beacon_memory.results.LEAST_LIKELIHOOD", 1.1)
    answer = memory.ask(KNOWN, "animals", abstain=True, max_new_tokens=3)
    assert (answer.supported, answer.text, answer.parts) == (False, NOT_IN_MEMORY, (NOT_IN_MEMORY,))
    assert answer.usage.generated_tokens > 0


def test_who_abstains_generates_nothing_where_nothing_relevant_is_loaded(memory: BeaconMemory, sure: None) -> None:
    plain = memory.ask(KNOWN, "animals", max_new_tokens=3)
    assert memory.ask(KNOWN, "animals", abstain=True, max_new_tokens=3).text == plain.text
    answer = memory.ask(UNKNOWN, "animals", abstain=True, max_new_tokens=3)
    assert (answer.text, str(answer), answer.parts, answer.supported) == (
        NOT_IN_MEMORY, NOT_IN_MEMORY, (NOT_IN_MEMORY,), False,
    )  # fmt: skip
    assert answer.ids == ("animals",)
    assert answer.usage.generated_tokens == 0
    assert answer.seconds > 0


def test_a_schema_leaves_no_room_for_other_answers(memory: BeaconMemory) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    beside: list[dict[str, Any]] = [{"abstain": True}, {"tools": [tool]}, {"num_beams": 2}]
    for given in beside:
        with pytest.raises(InputError, match=f"{next(iter(given))} and a schema do not go together"):
            memory.ask(KNOWN, "animals", schema={}, **given)


def test_streams_and_many_questions_abstain_likewise(memory: BeaconMemory, sure: None) -> None:
    for question in (KNOWN, UNKNOWN):
        expected = memory.ask(question, "animals", abstain=True, max_new_tokens=3)
        *pieces, answer = memory.stream(question, "animals", abstain=True, max_new_tokens=3)
        assert isinstance(answer, Answer)
        assert ("".join(map(str, pieces)), answer.text) == (expected.text, expected.text)
    asked = [Question(text, "animals", abstain=True, options=SHORT) for text in (UNKNOWN, KNOWN, UNKNOWN)]
    texts = [answer.text for answer in memory.ask_many(asked)]
    assert [text == NOT_IN_MEMORY for text in texts] == [True, False, True]


def test_nothing_is_said_without_documents_and_with_tools(memory: BeaconMemory) -> None:
    assert memory.ask(UNKNOWN, [], abstain=True, max_new_tokens=2).supported is None
    loaded = memory._asked(Question(UNKNOWN, "animals", options=SHORT)).loaded
    assert memory._recollection.evidence(Question(UNKNOWN, "animals"), loaded) == Evidence(0.0)
    with_tools = Question(UNKNOWN, "animals", tools=[{"type": "function"}])
    assert memory._recollection.evidence(with_tools, loaded) is None


def test_what_was_said_before_counts_as_loaded(memory: BeaconMemory) -> None:
    turns = [
        {"role": "user", "content": "Parliament did abolish which tax, in 1846?"},
        {"role": "assistant", "content": "The one on corn."},
        {"role": "user", "content": UNKNOWN},
    ]
    answer = memory.ask(turns, "animals", max_new_tokens=2)
    assert answer.evidence is not None
    assert answer.evidence.words == 1.0


def test_beams_have_no_likelihood(memory: BeaconMemory) -> None:
    answer = memory.ask(KNOWN, "animals", max_new_tokens=2, num_beams=2)
    assert answer.evidence == Evidence(1.0)
    assert answer.supported is True
    assert math.isclose(Evidence(1.0).words, 1.0)
