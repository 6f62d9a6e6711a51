"""What is explained is what would be loaded, down to the word, and nothing is run for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory import BeaconMemory, DocumentNotFoundError, ExplainedPassage, Explanation, InputError
from beacon_memory.config import BeaconConfig
from beacon_memory.explain import _begins_word
from beacon_memory.modeling.model import BeaconModel

REST = "It is seen by day and by night, and nobody in the village could tell us much more of it. " * 2
TEXT = "".join(f"The {name} is found behind the mill. {REST}\n\n" for name in ("otter", "badger", "heron", "weasel"))


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    return tiny_model("llama", BeaconConfig(beacon_window=64), tokenizer=tiny_tokenizer(), max_position_embeddings=4096)


@pytest.fixture
def memory(model: BeaconModel, tmp_path: Path) -> Iterator[BeaconMemory]:
    with BeaconMemory(tmp_path / "store", model, reserve=100) as memory:
        yield memory


def covers(explanation: Explanation, text: str) -> None:
    """Passages make up the text, in its order, and words the passages of which something is loaded."""
    assert "".join(passage.text for passage in explanation.passages) == text
    stop = 0
    for passage in explanation.passages:
        assert passage.start == stop
        stop = passage.stop
        assert passage.text == text[passage.start : passage.stop]
        assert all(0 <= word.loaded <= 1 for word in passage.words)
        assert [one.start for one in passage.words[1:]] == [one.stop for one in passage.words[:-1]]


@pytest.mark.parametrize("compression", ["select", "hybrid", "beacon"])
@pytest.mark.parametrize("budget", [None, 60, 200])
def test_an_explanation_is_what_ask_loads(memory: BeaconMemory, compression: str, budget: int | None) -> None:
    memory.add("animals", TEXT, ratio=2, compression=compression)
    explanation = memory.explain("Where is the heron?", "animals", budget=budget)
    answer = memory.ask("Where is the heron?", "animals", budget=budget, max_new_tokens=2)

    covers(explanation, TEXT)
    assert explanation.ids == answer.ids == ("animals",)
    assert explanation.slots == answer.usage.slots - 1  # of the sink
    loaded = {(one.start, one.stop): one for one in explanation.passages if one.loaded}
    sources = {(one.start, one.stop): one for one in answer.sources}
    assert loaded.keys() <= sources.keys()
    for place, passage in loaded.items():
        assert passage.relevance == sources[place].relevance
        assert bool(passage.words) is (compression != "beacon")
    if compression == "select":
        assert loaded.keys() == sources.keys()
        assert sum(one.slots for one in loaded.values()) == pytest.approx(explanation.slots, abs=1)
        assert all(passage.loaded == pytest.approx(sources[place].loaded) for place, passage in loaded.items())


def test_the_passage_that_a_question_is_about_is_loaded_first(memory: BeaconMemory) -> None:
    memory.add("animals", TEXT, ratio=2, compression="select")
    passages = memory.explain("Where is the heron?", "animals", budget=60).passages
    best = max(passages, key=lambda one: one.relevance)
    assert "heron" in best.text
    assert best.loaded == max(one.loaded for one in passages)
    assert not any(one.words for one in passages if not one.loaded)


def test_a_word_is_loaded_by_the_share_of_its_entries(memory: BeaconMemory) -> None:
    memory.add("animals", TEXT, ratio=0, compression="select")
    words = [word for one in memory.explain("Where is the heron?", "animals").passages for word in one.words]
    assert {word.loaded for word in words} == {1.0}
    memory.add("animals", TEXT, ratio=4, compression="select")
    kept = memory.store.get("animals").kv.positions.bincount(minlength=len(TEXT))  # a token is a character here
    heads = memory.model.kv_shape[0] * memory.model.kv_shape[1]
    for passage in memory.explain("Where is the heron?", "animals").passages:
        for word in passage.words:
            expected = kept[word.start : word.stop].sum().item() / heads / (word.stop - word.start)
            assert word.loaded == pytest.approx(expected)


def test_nothing_is_run(memory: BeaconMemory, model: BeaconModel, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.add("animals", TEXT, ratio=2)
    memory.compressor.sink  # noqa: B018  # which is run once

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was run")

    monkeypatch.setattr(type(model.base), "forward", refuse)
    assert memory.explain("Where is the heron?", budget="x4").ids == ("animals",)


def test_what_was_appended_is_explained_too(memory: BeaconMemory) -> None:
    memory.add("animals", TEXT[:100], ratio=2, compression="select")
    memory.append("animals", TEXT[100:150])
    memory.append("animals", TEXT[150:170])
    explanation = memory.explain("Where is the heron?", "animals")
    covers(explanation, TEXT[:170])
    assert {word.loaded for one in explanation.passages for word in one.words if word.start >= 150} == {1.0}


def test_errors_are_those_of_ask(memory: BeaconMemory) -> None:
    with pytest.raises(DocumentNotFoundError, match="no document is stored yet"):
        memory.explain("Where is the heron?")
    memory.add("animals", TEXT, ratio=2)
    with pytest.raises(InputError, match="budget='much'"):
        memory.explain("Where is the heron?", "animals", budget="much")


@pytest.mark.parametrize(
    ("text", "stop", "start", "begins"),
    [
        ("the mill", 3, 3, True),  # " mill" begins with its space
        ("the mill", 4, 4, True),
        ("miller", 4, 4, False),
        ("mill's", 4, 4, True),
        ("磨坊", 1, 1, True),
        ("🏠", 1, 0, False),  # two tokens of one character
    ],
)
def test_tokens_make_up_words(text: str, stop: int, start: int, begins: bool) -> None:
    assert _begins_word(text, stop, start) is begins


def names(passages: tuple[ExplainedPassage, ...]) -> list[str]:
    return [passage.document for passage in passages]


def test_documents_come_in_the_order_in_which_they_are_loaded(memory: BeaconMemory) -> None:
    memory.add_many([("a", TEXT), ("b", TEXT[:200])], ratio=2)
    explanation = memory.explain("Where is the heron?", ["b", "a"], budget=100)
    assert explanation.ids == ("b", "a")
    assert sorted(names(explanation.passages), reverse=True) == names(explanation.passages)
