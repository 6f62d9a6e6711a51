"""Tools that BeaconMemoryLLM is offered, and the calls that it writes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ToolCallBlock
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index_beacon_memory.tool_calls import parse
from llama_index_samples import make_llm, saying

from beacon_memory import InputError
from beacon_memory.generation.tool_calls import split_calls

QUESTION = [ChatMessage("Who mended the roof?")]
ADD = '<tool_call>{"name":"add","arguments":{"a":2,"b":3}}</tool_call>'


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call", "no call", []),
        ('<tool_call>{"name": "f"}</tool_call>', None, [("f", {})]),
        ('So: <tool_call>\n{"name": "f", "arguments": {"a": {"b": 1}}}\n</tool_call>', "So:", [("f", {"a": {"b": 1}})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', None, [("f", {"a": 1})]),
        ('<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}', None, [("f", {}), ("g", {})]),
        ('<tool_call>{"name": "f", </tool_call>', '<tool_call>{"name": "f", </tool_call>', []),
        ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        ('<tool_call>["f"]</tool_call>', '<tool_call>["f"]</tool_call>', []),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, None),
        ("", "", []),
    ],
)
def test_tool_calls_are_read(text: str, content: str | None, calls: list[Any] | None) -> None:
    message = ChatMessage(role="assistant", blocks=parse(split_calls(text)))
    if calls is None:  # arguments that are no object: not a call, and nothing is lost
        content, calls = text, []
    assert message.content == content
    found = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    assert [(block.tool_name, block.tool_kwargs) for block in found] == calls
    assert len({block.tool_call_id for block in found}) == len(found)


def test_call_that_is_nested_too_deeply_stays_text() -> None:
    text = "<tool_call>" + "[" * 100_000 + "</tool_call>"
    (block,) = parse(split_calls(text))
    assert block == TextBlock(text=text)


def test_tools_are_refused_where_the_template_has_no_place_for_them(tmp_path: Path) -> None:
    llm = make_llm(tmp_path)
    tool = FunctionTool.from_defaults(add)
    refusal = "chat template has no place for tools"
    with pytest.raises(InputError, match=refusal):
        llm.chat_with_tools([tool], "What is 2 + 3?")
    with pytest.raises(InputError, match=refusal):
        llm.stream_chat_with_tools([tool], "What is 2 + 3?")
    with pytest.raises(InputError, match=refusal):
        asyncio.run(llm.achat_with_tools([tool], "What is 2 + 3?"))


def test_tools_are_called(tmp_path: Path) -> None:
    llm = make_llm(tmp_path, tools=True, **saying(f"I add. {ADD}"))
    tool = FunctionTool.from_defaults(add)
    response = llm.chat_with_tools([tool], "What is 2 + 3?")
    assert response.message.content == "I add."
    (call,) = llm.get_tool_calls_from_response(response)
    assert (call.tool_name, call.tool_kwargs) == ("add", {"a": 2, "b": 3})
    assert llm.predict_and_call([tool], "What is 2 + 3?").response == "5"
    assert asyncio.run(llm.apredict_and_call([tool], "What is 2 + 3?")).response == "5"


def test_calls_are_only_read_where_tools_were_offered(tmp_path: Path) -> None:
    llm = make_llm(tmp_path, tools=True, **saying(ADD))
    assert llm.chat(QUESTION).message.content == ADD
    tool = FunctionTool.from_defaults(add)
    assert llm.chat_with_tools([tool], "2 + 3?", tool_choice="none").message.content == ADD


def test_answer_without_a_call_is_an_error_if_one_is_needed(tmp_path: Path) -> None:
    llm = make_llm(tmp_path, tools=True, **saying("Five."))
    response = llm.chat_with_tools([FunctionTool.from_defaults(add)], "What is 2 + 3?")
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match=r"the model called no tool, but answered 'Five\.'"):
        llm.get_tool_calls_from_response(response)


def test_several_calls_are_kept_only_if_they_are_allowed(tmp_path: Path) -> None:
    llm = make_llm(tmp_path, tools=True, **saying(ADD + ADD.replace("3", "4")))
    tool = FunctionTool.from_defaults(add)
    one = llm.chat_with_tools([tool], "Add.")
    both = llm.chat_with_tools([tool], "Add.", allow_parallel_tool_calls=True)
    assert [call.tool_kwargs["b"] for call in llm.get_tool_calls_from_response(one)] == [3]
    assert [call.tool_kwargs["b"] for call in llm.get_tool_calls_from_response(both)] == [3, 4]


def test_tool_choice_leaves_the_tool_that_it_names(tmp_path: Path) -> None:
    llm = make_llm(tmp_path, tools=True)
    tools = [FunctionTool.from_defaults(add, name=name) for name in ("plus", "sum")]

    def prompt_tokens(**choice: Any) -> int:
        tokens: int = llm.chat_with_tools(tools, "2 + 3?", **choice).raw["usage"]["prompt_tokens"]
        return tokens

    alone = llm.chat_with_tools(tools[:1], "2 + 3?").raw["usage"]["prompt_tokens"]
    none = llm.chat([ChatMessage("2 + 3?")]).raw["usage"]["prompt_tokens"]
    named = {"type": "function", "function": {"name": "plus"}}
    assert prompt_tokens(tool_choice="plus") == prompt_tokens(tool_choice=named) == alone
    assert prompt_tokens(tool_choice="none") == none
    assert prompt_tokens() == prompt_tokens(tool_choice="auto") > alone > none
    with pytest.raises(InputError, match=r"tool_choice='minus' must be .* tools: 'plus', 'sum'"):
        prompt_tokens(tool_choice="minus")


def test_streamed_calls_are_not_shown_as_text(tmp_path: Path) -> None:
    llm = make_llm(tmp_path, tools=True, **saying(f"I add. {ADD}"))
    tool = FunctionTool.from_defaults(add)

    async def streamed() -> list[Any]:
        return [r async for r in await llm.astream_chat_with_tools([tool], "2 + 3?")]

    for responses in (list(llm.stream_chat_with_tools([tool], "2 + 3?")), asyncio.run(streamed())):
        assert "".join(response.delta for response in responses).strip() == "I add."
        assert all("<" not in (response.message.content or "") for response in responses)
        (call,) = llm.get_tool_calls_from_response(responses[-1])
        assert call.tool_kwargs == {"a": 2, "b": 3}


def test_text_that_only_looked_like_a_call_is_streamed_in_the_end(tmp_path: Path) -> None:
    text = 'a <tool_call> {"name": 1}</tool_call> b'
    llm = make_llm(tmp_path, tools=True, **saying(text))
    responses = list(llm.stream_chat_with_tools([FunctionTool.from_defaults(add)], "2 + 3?"))
    assert "".join(response.delta for response in responses) == text == responses[-1].message.content


def test_result_of_a_tool_reaches_the_model(tmp_path: Path) -> None:
    llm = make_llm(tmp_path, tools=True)
    tool = FunctionTool.from_defaults(add)
    call = ToolCallBlock(tool_call_id="1", tool_name="add", tool_kwargs={"a": 2, "b": 3})
    history = [
        ChatMessage("What is 2 + 3?"),
        ChatMessage(role="assistant", blocks=[call]),
        ChatMessage("5", role="tool", additional_kwargs={"tool_call_id": "1"}),
    ]
    turns = [
        {"role": "user", "content": "What is 2 + 3?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}],
        },
        {"role": "tool", "content": "5"},
    ]
    expected = llm.memory.ask(turns, [], tools=[tool.metadata.to_openai_tool()], max_new_tokens=8)
    response = llm.chat_with_tools([tool], chat_history=history)
    assert response.message.content == expected.text
    assert response.raw["usage"]["prompt_tokens"] == expected.usage.prompt_tokens


@pytest.mark.parametrize("streaming", [True, False])
def test_agent_calls_a_tool_and_answers(tmp_path: Path, streaming: bool) -> None:
    llm = make_llm(tmp_path, tools=True, **saying(ADD))

    def plus(a: int, b: int) -> int:
        """Add two numbers; then the model has something else to say."""
        for name, value in saying(f"It is {a + b}.").items():
            setattr(llm, name, value)
        return a + b

    agent = FunctionAgent(
        tools=[FunctionTool.from_defaults(plus, name="add")], llm=llm, streaming=streaming, system_prompt="Calculate."
    )

    async def run() -> Any:
        return await agent.run("What is 2 + 3?")

    output = asyncio.run(run())
    assert str(output) == "It is 5."
    assert [(call.tool_name, call.tool_output.raw_output) for call in output.tool_calls] == [("add", 5)]


class Sum(BaseModel):
    """A sum."""

    a: int
    b: int


def test_structured_answers_come_by_tool_calls(tmp_path: Path) -> None:
    llm = make_llm(tmp_path, tools=True, **saying(ADD.replace("add", "Sum")))
    prompt = PromptTemplate("Add {a} and {b}.")
    assert llm.structured_predict(Sum, prompt, a=2, b=3) == Sum(a=2, b=3)
    assert asyncio.run(llm.astructured_predict(Sum, prompt, a=2, b=3)) == Sum(a=2, b=3)
    *_, last = llm.stream_structured_predict(Sum, prompt, a=2, b=3)
    assert last.model_dump() == {"a": 2, "b": 3}
