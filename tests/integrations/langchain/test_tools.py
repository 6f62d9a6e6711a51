"""Tool calls in the text of answers, and what comes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from langchain.agents import create_agent
from langchain_beacon_memory import ChatBeaconMemory
from langchain_beacon_memory.tool_calls import parse_calls
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_samples import Lesson, babbling_model, calling, filled_memory, taught_model
from pydantic import BaseModel

from beacon_memory import BeaconMemory, InputError
from beacon_memory.generation.tool_calls import split_calls


@tool
def look_up(place: str) -> str:
    """What is known of a place."""
    return f"The {place} is forty feet deep."


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Lease(BaseModel):
    """The terms of a lease."""

    tenant: str
    rent: int


CALL: Any = {"name": "look_up", "args": {"place": "well"}, "id": "call_1", "type": "tool_call"}
BROKEN = '<tool_call>\n{"name": "look_up", "arguments": {"place": \n</tool_call>'


def lessons() -> list[Lesson]:
    """What the model of these tests knows."""
    tools = [look_up, add]
    asked = HumanMessage("How deep is the well?")
    looked_up = [asked, AIMessage("Let me look.", tool_calls=[CALL]), ToolMessage("40 feet", tool_call_id="call_1")]
    agent = [*looked_up[:2], ToolMessage("The well is forty feet deep.", tool_call_id="call_1")]
    two = "First this.\n" + calling("add", a=1, b=2) + "\n" + calling("look_up", place="mill") + "\nThen that."
    return [
        ([asked], tools, "Let me look.\n" + calling("look_up", place="well")),
        (looked_up, tools, "It is forty feet deep."),
        (agent, tools, "It is forty feet deep."),
        ([HumanMessage("Who are you?")], tools, "A small model, less than <toolbox."),
        ([HumanMessage("Do both.")], tools, two),
        ([HumanMessage("Break it.")], tools, "Well.\n" + BROKEN),
        ([HumanMessage("Who rents?")], [Lease], calling("Lease", tenant="Ada Flint", rent=40)),
        ([HumanMessage("Who rents not?")], [Lease], "Nobody does."),
        ([HumanMessage("Who rents wrongly?")], [Lease], calling("Lease", tenant="Ada Flint", rent="much")),
        ([HumanMessage("Who rents, as JSON?")], [], '{"tenant": "Ada Flint", "rent": 40}'),
    ]


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BeaconMemory]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield filled_memory(tmp_path_factory.mktemp("store"), taught_model(lessons()))
    torch.set_num_threads(threads)


@pytest.fixture
def model(memory: BeaconMemory) -> ChatBeaconMemory:
    return ChatBeaconMemory(memory=memory, max_tokens=120, temperature=0)


@pytest.fixture
def with_tools(model: ChatBeaconMemory) -> Any:
    return model.bind_tools([look_up, add])


def without_ids(calls: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(call["name"], call["args"]) for call in calls]


def test_calls_are_taken_out_of_the_answer(with_tools: Any) -> None:
    answer = with_tools.invoke("How deep is the well?")
    assert (answer.content, without_ids(answer.tool_calls)) == ("Let me look.", [("look_up", {"place": "well"})])
    answer = with_tools.invoke("Do both.")
    assert without_ids(answer.tool_calls) == [("add", {"a": 1, "b": 2}), ("look_up", {"place": "mill"})]
    assert answer.content.split() == ["First", "this.", "Then", "that."]
    assert len({call["id"] for call in answer.tool_calls}) == 2


def test_answer_without_calls_stays_as_it_is(with_tools: Any) -> None:
    answer = with_tools.invoke("Who are you?")
    assert (answer.content, answer.tool_calls) == ("A small model, less than <toolbox.", [])


@pytest.mark.parametrize("question", ["How deep is the well?", "Who are you?", "Do both.", "Break it."])
async def test_streams_add_up_to_the_whole_answer(with_tools: Any, question: str) -> None:
    whole = with_tools.invoke(question)
    for chunks in (list(with_tools.stream(question)), [chunk async for chunk in with_tools.astream(question)]):
        assert all("<tool_call>" not in str(chunk.content) for chunk in chunks)
        added: AIMessageChunk = sum(chunks[1:], start=chunks[0])
        assert added.content == whole.content
        assert without_ids(added.tool_calls) == without_ids(whole.tool_calls)
        assert len(added.invalid_tool_calls) == len(whole.invalid_tool_calls)
        assert added.usage_metadata == whole.usage_metadata


def test_call_that_cannot_be_read_is_shown_as_such(with_tools: Any) -> None:
    answer = with_tools.invoke("Break it.")
    assert (answer.content, answer.tool_calls) == ("Well.", [])
    ((invalid),) = answer.invalid_tool_calls
    assert invalid["args"] == '{"name": "look_up", "arguments": {"place":'
    assert "not a JSON object with the text 'name'" in invalid["error"]


def test_results_of_tools_reach_the_chat_template(with_tools: Any) -> None:
    messages = [
        HumanMessage("How deep is the well?"),
        AIMessage("Let me look.", tool_calls=[CALL]),
        ToolMessage([{"type": "text", "text": "40 feet"}], tool_call_id="call_1"),
    ]
    assert with_tools.invoke(messages).content == "It is forty feet deep."


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_agent_calls_a_tool_and_answers_from_its_result(model: ChatBeaconMemory, asynchronous: bool) -> None:
    agent: Any = create_agent(model, [look_up, add])
    question = {"messages": [HumanMessage("How deep is the well?")]}
    state = await agent.ainvoke(question) if asynchronous else agent.invoke(question)
    assert [message.type for message in state["messages"]] == ["human", "ai", "tool", "ai"]
    assert state["messages"][2].content == "The well is forty feet deep."
    assert state["messages"][3].content == "It is forty feet deep."


def test_structured_output_fills_in_a_schema(model: ChatBeaconMemory) -> None:
    lease = Lease(tenant="Ada Flint", rent=40)
    called: dict[str, Any] = {"method": "function_calling"}
    assert model.with_structured_output(Lease, **called).invoke("Who rents?") == lease
    assert model.with_structured_output(Lease.model_json_schema(), **called).invoke("Who rents?") == lease.model_dump()
    for method in ("json_schema", "json_mode"):
        assert model.with_structured_output(Lease, method=method).invoke("Who rents, as JSON?") == lease
    raw: Any = model.with_structured_output(Lease, include_raw=True, **called).invoke("Who rents?")
    assert (raw["parsed"], raw["parsing_error"], raw["raw"].tool_calls[0]["name"]) == (lease, None, "Lease")


def test_answer_that_has_not_the_form_of_the_schema_is_an_error_and_never_nothing(model: ChatBeaconMemory) -> None:
    called: dict[str, Any] = {"method": "function_calling"}
    structured = model.with_structured_output(Lease, **called)
    raw = model.with_structured_output(Lease, include_raw=True, **called)
    with pytest.raises(OutputParserException, match="had to call 'Lease', and answered without") as caught:
        structured.invoke("Who rents not?")
    assert caught.value.llm_output == "Nobody does."
    with pytest.raises(ValueError, match="rent"):
        structured.invoke("Who rents wrongly?")
    for question, error in {"Who rents not?": OutputParserException, "Who rents wrongly?": ValueError}.items():
        answer: Any = raw.invoke(question)
        assert isinstance(answer["parsing_error"], error)
        assert (answer["parsed"], answer["raw"].type) == (None, "ai")
    with pytest.raises(InputError, match="'telepathy'"):
        model.with_structured_output(Lease, method="telepathy")


class Roof(BaseModel):
    """What is known of a roof."""

    material: Literal["slate", "thatch"]
    leaks: bool


def test_any_model_fills_in_a_schema_and_what_is_cut_off_is_an_error(tmp_path: Path) -> None:
    model = ChatBeaconMemory(memory=filled_memory(tmp_path, babbling_model()), max_tokens=60)
    assert isinstance(model.with_structured_output(Roof).invoke("What of the roof?"), Roof)
    filled = model.with_structured_output(Roof.model_json_schema()).invoke("What of the roof?")
    assert Roof.model_validate(filled).model_dump() == filled
    (streamed,) = model.with_structured_output(Roof).stream("What of the roof?")
    assert isinstance(streamed, Roof)
    short = ChatBeaconMemory(memory=model.memory, max_tokens=9)
    with pytest.raises(OutputParserException, match="no whole JSON") as caught:
        short.with_structured_output(Roof).invoke("What of the roof?")
    assert caught.value.llm_output == '{"materia'


def test_demanded_call_that_is_not_made_is_an_error(model: ChatBeaconMemory) -> None:
    assert model.bind_tools([look_up, add], tool_choice="any").invoke("How deep is the well?").tool_calls
    for choice in ("any", "required", True):
        with pytest.raises(OutputParserException, match="'look_up' or 'add'"):
            model.bind_tools([look_up, add], tool_choice=choice).invoke("Who are you?")
    with pytest.raises(OutputParserException, match="a call could not be read"):
        list(model.bind_tools([look_up, add], tool_choice="any").stream("Break it."))
    with pytest.raises(InputError, match=r"tool_choice='swim' must be .* 'look_up', 'add'"):
        model.bind_tools([look_up, add], tool_choice="swim")


def test_tools_change_the_prompt_and_none_does_not(model: ChatBeaconMemory) -> None:
    def tokens(**options: Any) -> int:
        usage = model.bind_tools([look_up, add], **options).invoke("Who are you?", max_tokens=1).usage_metadata
        return usage["input_tokens"] if usage else 0

    plain = model.invoke("Who are you?", max_tokens=1).usage_metadata
    assert plain is not None
    assert tokens(tool_choice="none") == plain["input_tokens"] < tokens()


async def test_model_whose_template_has_no_tools_says_so(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    memory = filled_memory(tmp_path_factory.mktemp("plain"), babbling_model())
    model = ChatBeaconMemory(memory=memory, max_tokens=2)
    bound = model.bind_tools([look_up])
    with pytest.raises(InputError, match="tools cannot be used"):
        bound.invoke("Who?")
    with pytest.raises(InputError, match="tools cannot be used"):
        next(iter(bound.stream("Who?")))
    with pytest.raises(InputError, match="tools cannot be used"):
        await bound.ainvoke("Who?")
    with pytest.raises(InputError, match="tools cannot be used"):
        model.with_structured_output(Lease, method="function_calling").invoke("Who?")
    assert model.bind_tools([look_up], tool_choice="none").invoke("Who?").tool_calls == []


def test_calls_that_cannot_be_read_are_apart_from_the_text() -> None:
    parsed = parse_calls(split_calls(f"Hm. <tool_call>f(1)</tool_call> {calling('add', a=1)}"))
    assert (parsed.content, without_ids(parsed.calls)) == ("Hm.", [("add", {"a": 1})])
    ((invalid),) = parsed.invalid
    assert invalid["args"] == "f(1)"
