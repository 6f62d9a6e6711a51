"""The plain language model."""

from __future__ import annotations

from pathlib import Path

import pytest
from langchain_beacon_memory import BeaconMemoryLLM
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import HumanMessage
from langchain_core.prompts import PromptTemplate
from langchain_samples import ROOF, babbling_model, filled_memory, in_words

from beacon_memory import BeaconMemory, DocumentNotFoundError, InputError


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> BeaconMemory:
    memory = filled_memory(tmp_path_factory.mktemp("store"), babbling_model())
    memory.within("alice").add("diary", ROOF, ratio=2)
    return memory


@pytest.fixture
def model(memory: BeaconMemory) -> BeaconMemoryLLM:
    return BeaconMemoryLLM(memory=memory, max_tokens=40, temperature=0, document_ids=["roof"])


def test_prompt_is_one_question(memory: BeaconMemory, model: BeaconMemoryLLM) -> None:
    expected = memory.ask("Who?", ["roof"], max_new_tokens=40, temperature=0)
    chain = PromptTemplate.from_template("{word}?") | model
    assert model.invoke("Who?") == chain.invoke({"word": "Who"}) == expected.text
    assert model.invoke("Who?", document_ids=["well"]) != expected.text
    ((generation,),) = model.generate(["Who?"]).generations
    info = generation.generation_info
    assert info is not None
    assert info["document_ids"] == ["roof"]
    assert info["usage_metadata"]["input_token_details"] == {"cache_read": expected.usage.slots}


async def test_streams_and_async_calls_give_the_same_text(model: BeaconMemoryLLM) -> None:
    long = {"max_tokens": 150, **in_words(model.memory)}
    whole = model.invoke("Who?", **long)
    pieces = list(model.stream("Who?", **long))
    assert len(pieces) > 3
    assert "".join(pieces) == whole == await model.ainvoke("Who?", **long)
    assert "".join([piece async for piece in model.astream("Who?", **long)]) == whole
    events = [event async for event in model.astream_events("Who?", version="v2", **long)]
    assert "".join(event["data"]["chunk"] for event in events if event["event"] == "on_llm_stream") == whole


def test_many_prompts_give_the_answers_of_one(model: BeaconMemoryLLM) -> None:
    questions = [f"What about {number}?" for number in range(6)]
    one_by_one = [model.invoke(question) for question in questions]
    assert model.batch(list(questions)) == one_by_one
    assert [generation.text for (generation,) in model.generate(questions).generations] == one_by_one


def test_namespace_and_options_are_those_of_the_chat_model(memory: BeaconMemory, model: BeaconMemoryLLM) -> None:
    expected = memory.within("alice").ask("Who?", ["diary"], max_new_tokens=40, temperature=0).text
    assert model.invoke("Who?", namespace="alice", document_ids=["diary"]) == expected
    with pytest.raises(DocumentNotFoundError):
        model.invoke("Who?", namespace="alice")
    with pytest.raises(InputError, match="unknown generation options"):
        model.invoke("Who?", voice="low")
    assert model.invoke([HumanMessage("Who?")]) == model.invoke("Human: Who?")
    assert model._llm_type == "beacon-memory"


def test_answers_are_not_cached_unless_it_is_asked_for(memory: BeaconMemory, tmp_path: Path) -> None:
    changing = BeaconMemory(tmp_path, memory.model, reserve=100)
    model = BeaconMemoryLLM(memory=changing, max_tokens=12, temperature=0, document_ids=["diary"])
    set_llm_cache(InMemoryCache())
    try:
        answers = []
        for text in (ROOF, ROOF[::-1]):
            changing.add("diary", text, ratio=2)
            answers.append(model.invoke("Who?"))
        assert answers[0] != answers[1]
    finally:
        set_llm_cache(None)
