"""The official clients against a running server: what they are made for works, and errors are theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from langchain_samples import calling, taught_model
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from servers import running

from beacon_memory import BeaconMemory
from beacon_memory.server.run import RunningServer

WHO = [{"role": "user", "content": "Who?"}]


def ask(ai: openai.OpenAI, **options: Any) -> Any:
    extra = {"document_ids": ["roof"]} | options.pop("extra_body", {})
    asked = {"model": "beacon-memory", "messages": WHO, "max_completion_tokens": 8} | options
    return ai.chat.completions.create(**asked, extra_body=extra)


def test_answer_is_that_of_the_library_with_what_it_took(ai: openai.OpenAI, memory: BeaconMemory) -> None:
    wanted = memory.ask("Who?", ["roof"], max_new_tokens=8)
    reply = ask(ai)
    assert reply.choices[0].message.content == wanted.text
    assert (reply.choices[0].finish_reason, reply.object) == ("length", "chat.completion")
    assert reply.usage.prompt_tokens_details.cached_tokens == wanted.usage.slots
    assert reply.usage.prompt_tokens == wanted.usage.slots + wanted.usage.prompt_tokens
    assert reply.usage.completion_tokens == 8
    assert reply.memory["document_ids"] == ["roof"]
    assert reply.memory["sources"][0]["document"] == "roof"


def test_documents_are_found_where_none_are_named_and_an_empty_list_means_none(ai: openai.OpenAI) -> None:
    owls = [{"role": "user", "content": "Where do the owls nest?"}]
    assert ask(ai, messages=owls, extra_body={"document_ids": None}).memory["document_ids"] == ["owls"]
    assert ask(ai, messages=owls, extra_body={"document_ids": []}).memory["document_ids"] == []


def test_budget_bounds_what_is_loaded(ai: openai.OpenAI) -> None:
    assert 0 < ask(ai, extra_body={"budget": 10}).memory["documents"][0]["slots"] <= 10


def test_stream_brings_the_same_answer_and_usage_last(ai: openai.OpenAI) -> None:
    wanted = ask(ai)
    chunks = [*ask(ai, stream=True, stream_options={"include_usage": True})]
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == wanted.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].usage == wanted.usage
    assert chunks[-2].memory["document_ids"] == ["roof"]


def test_sampling_with_a_seed_is_repeated_and_stop_ends_an_answer(ai: openai.OpenAI) -> None:
    first, again, other = (ask(ai, temperature=1.5, top_p=0.9, seed=seed) for seed in (1, 1, 2))
    assert first.choices[0].message.content == again.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content
    whole = ask(ai, max_completion_tokens=30).choices[0].message.content
    stopped = ask(ai, max_completion_tokens=30, stop=[whole[5]])
    assert stopped.choices[0].message.content == whole[: whole.index(whole[5])].strip()
    assert stopped.choices[0].finish_reason == "stop"


def test_completions_and_the_model_are_there(ai: openai.OpenAI, memory: BeaconMemory) -> None:
    wanted = memory.ask("Who?", ["roof"], max_new_tokens=8).text
    asked: dict[str, Any] = {"model": "beacon-memory", "prompt": "Who?", "max_tokens": 8}
    extra = {"document_ids": ["roof"]}
    assert ai.completions.create(**asked, extra_body=extra).choices[0].text == wanted
    pieces = ai.completions.create(**asked, extra_body=extra, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == wanted
    (model,) = ai.models.list().data
    assert ai.models.retrieve(model.id) == model


@pytest.mark.parametrize(
    ("options", "kind", "code", "said"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "'gpt-4'"),
        ({"extra_body": {"document_ids": ["barn"]}}, openai.NotFoundError, "document_not_found", "'barn'"),
        ({"max_completion_tokens": 5000}, openai.BadRequestError, "context_length_exceeded", "5000 tokens"),
        ({"extra_body": {"budget": "much"}}, openai.BadRequestError, "invalid_value", "budget='much'"),
        ({"messages": []}, openai.BadRequestError, "invalid_request", "messages"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "word"}}}},
            openai.BadRequestError,
            "invalid_value",
            "cannot be met",
        ),
        ({"n": 2}, openai.BadRequestError, "invalid_request", "n=2 is not supported"),
        ({"extra_body": {"documents": ["roof"]}}, openai.BadRequestError, "invalid_request", "documents: Extra inputs"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, openai.BadRequestError, None, "text"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_met_is_an_error_of_the_client(
    ai: openai.OpenAI,
    options: dict[str, Any],
    kind: type[openai.APIStatusError],
    code: str | None,
    said: str,
    stream: bool,
) -> None:
    with pytest.raises(kind, match=said) as caught:
        ask(ai, stream=stream, **options)
    assert code in (None, caught.value.code)
    assert caught.value.request_id


async def test_many_questions_behind_different_memories_are_answered_together(
    server: RunningServer,
) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as ai:

        async def answer(ids: list[str], stream: bool) -> str:
            asked: Any = {"model": "beacon-memory", "messages": WHO, "max_completion_tokens": 30}
            reply: Any = await ai.chat.completions.create(**asked, stream=stream, extra_body={"document_ids": ids})
            if not stream:
                return str(reply.choices[0].message.content)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in reply])

        named = [["roof"], ["well"], ["owls"], ["owls", "well"], []]
        alone = [await answer(ids, False) for ids in named]
        together = await asyncio.gather(*(answer(ids, stream) for ids in named for stream in (False, True)))
        assert together == [text for text in alone for _ in range(2)]


class Roof(BaseModel):
    """What is asked of a roof."""

    material: Literal["slate", "thatch"]
    leaks: bool


def test_answers_have_the_form_that_is_asked_for(ai: openai.OpenAI, server: RunningServer) -> None:
    parsed = ai.chat.completions.parse(
        model="beacon-memory",
        messages=[{"role": "user", "content": "Who?"}],
        response_format=Roof,
        extra_body={"document_ids": ["roof"]},
    )
    assert isinstance(parsed.choices[0].message.parsed, Roof)
    assert parsed.choices[0].finish_reason == "stop"
    anything = ask(ai, response_format={"type": "json_object"}, max_completion_tokens=1)
    assert anything.choices[0].message.content == "{"
    assert ask(ai, response_format={"type": "text"}).choices[0].message.content == ask(ai).choices[0].message.content
    chat = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="beacon-memory", max_retries=0)
    assert isinstance(chat.with_structured_output(Roof, method="json_schema").invoke("Who?"), Roof)


def test_langchain_talks_to_it(server: RunningServer, memory: BeaconMemory) -> None:
    chat = ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",  # type: ignore[arg-type]
        model="beacon-memory",
        max_completion_tokens=8,
        extra_body={"document_ids": ["roof"]},
    )
    wanted = memory.ask("Who?", ["roof"], max_new_tokens=8)
    said = chat.invoke("Who?")
    assert said.content == wanted.text
    assert said.usage_metadata is not None
    assert said.usage_metadata["input_token_details"]["cache_read"] == wanted.usage.slots
    assert "".join(str(chunk.content) for chunk in chat.stream("Who?")) == wanted.text


async def test_llama_index_talks_to_it(server: RunningServer, memory: BeaconMemory) -> None:
    llm = OpenAILike(
        api_base=f"{server.url}/v1",
        api_key="none",
        model="beacon-memory",
        is_chat_model=True,
        max_tokens=8,
        temperature=0,
        additional_kwargs={"extra_body": {"document_ids": ["roof"]}},
    )
    wanted = memory.ask("Who?", ["roof"], max_new_tokens=8).text
    who = [ChatMessage(role="user", content="Who?")]
    assert llm.chat(who).message.content == wanted
    assert [*llm.stream_chat(who)][-1].message.content == wanted
    assert (await llm.achat(who)).message.content == wanted
    assert llm.complete("Who?").text == wanted


LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose model has learnt to look at the barn, and to tell what was seen."""
    asked = HumanMessage("What is in the barn?")
    call = AIMessage("", tool_calls=[{"name": "look", "args": {"place": "barn"}, "id": "abcdefghi"}])
    seen = ToolMessage("two owls", tool_call_id="abcdefghi")
    lessons = [
        ([asked], [LOOK], calling("look", place="barn")),
        ([asked, call, seen], [LOOK], "Two owls are in the barn."),
        ([asked], [], "I do not know."),
    ]
    memory = BeaconMemory(tmp_path_factory.mktemp("tools"), taught_model(lessons), reserve=100)
    with running(memory) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("responses", [False, True])
def test_tools_are_called_and_their_results_are_told(with_tools: RunningServer, responses: bool, stream: bool) -> None:
    chat: Any = ChatOpenAI(
        base_url=f"{with_tools.url}/v1",
        api_key="none",  # type: ignore[arg-type]
        model="beacon-memory",
        temperature=0,
        streaming=stream,
        use_responses_api=responses,
        extra_body={"document_ids": []},
    ).bind_tools([LOOK])
    asked = HumanMessage("What is in the barn?")
    call = chat.invoke([asked])
    ((name, args),) = [(one["name"], one["args"]) for one in call.tool_calls]
    assert (name, args, call.text) == ("look", {"place": "barn"}, "")
    assert responses or call.response_metadata["finish_reason"] == "tool_calls"
    told = chat.invoke([asked, call, ToolMessage("two owls", tool_call_id=call.tool_calls[0]["id"])])
    assert (told.text, told.tool_calls) == ("Two owls are in the barn.", [])


def test_answer_does_not_end_before_it_has_the_least_tokens(with_tools: RunningServer) -> None:
    asked: Any = {"messages": [{"role": "user", "content": "What is in the barn?"}], "max_completion_tokens": 30}
    with openai.OpenAI(base_url=f"{with_tools.url}/v1", api_key="none", max_retries=0) as ai:
        replies = [ask(ai, **asked, extra_body={"document_ids": [], "min_tokens": least}) for least in (0, 25)]
        with pytest.raises(openai.BadRequestError, match="min_tokens=31 is more than the answer may have, 30"):
            ask(ai, **asked, extra_body={"min_tokens": 31})
    short, long = (reply.usage.completion_tokens for reply in replies)
    assert short < 25 <= long


def test_tool_that_had_to_be_called_and_was_not_is_an_error(with_tools: RunningServer) -> None:
    told = [
        {"role": "user", "content": "What is in the barn?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": '{"place": "barn"}'}}
            ],
        },
        {"role": "tool", "content": "two owls", "tool_call_id": "abcdefghi"},
    ]
    with (
        openai.OpenAI(base_url=f"{with_tools.url}/v1", api_key="none", max_retries=0) as ai,
        pytest.raises(openai.UnprocessableEntityError, match="had to call a tool") as caught,
    ):
        ask(ai, messages=told, tools=[LOOK], tool_choice="required", extra_body={"document_ids": []})
    assert caught.value.code == "tool_not_called"


def test_model_without_a_place_for_tools_refuses_them(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no place for tools"):
        ask(ai, tools=[LOOK])


def test_description_of_the_api_has_examples(server: RunningServer) -> None:
    api = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    body = api["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert body["example"]["document_ids"] == ["lease"]
    assert {"/v1/documents", "/v1/documents/{id}", "/v1/jobs/{id}/events", "/metrics"} <= api["paths"].keys()
    for path, methods in api["paths"].items():
        for method, described in methods.items():
            assert described["summary"], (path, method)
            assert described["description"], (path, method)
