"""OpenAI's Responses through its official client: answers are those of chats, and errors the client's own."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from beacon_memory import BeaconMemory

ROOF = {"document_ids": ["roof"]}


def ask(ai: openai.OpenAI, **options: Any) -> Any:
    asked = {"model": "beacon-memory", "input": "Who?", "max_output_tokens": 8, "extra_body": ROOF} | options
    return ai.responses.create(**asked)


def test_answer_is_that_of_the_library_with_what_it_took(ai: openai.OpenAI, memory: BeaconMemory) -> None:
    wanted = memory.ask("Who?", ["roof"], max_new_tokens=8)
    reply = ask(ai)
    assert reply.output_text == wanted.text
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    read = wanted.usage.slots + wanted.usage.prompt_tokens
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.total_tokens) == (read, 8, read + 8)
    assert reply.usage.input_tokens_details.cached_tokens == wanted.usage.slots
    assert reply.memory["document_ids"] == ["roof"]


def test_turns_and_instructions_are_those_of_a_chat(ai: openai.OpenAI) -> None:
    parts: Any = [{"type": "input_text", "text": "Wh"}, {"type": "input_text", "text": "o?"}]
    turns: Any = [
        {"role": "user", "content": "What is there?"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A barn."}]},
        {"role": "user", "content": parts},
    ]
    chat = ai.chat.completions.create(
        model="beacon-memory",
        messages=[
            {"role": "system", "content": "Be brief."},
            turns[0],
            {"role": "assistant", "content": "A barn."},
            {"role": "user", "content": "Who?"},
        ],
        max_completion_tokens=8,
        seed=3,
        temperature=1.5,
        extra_body=ROOF,
    )
    reply = ask(ai, input=turns, instructions="Be brief.", temperature=1.5, extra_body={**ROOF, "seed": 3})
    assert reply.output_text == chat.choices[0].message.content
    assert (reply.instructions, reply.temperature) == ("Be brief.", 1.5)


def test_stream_has_the_typed_events_and_ends_with_the_whole(ai: openai.OpenAI) -> None:
    wanted = ask(ai).output_text
    options: Any = {"model": "beacon-memory", "input": "Who?", "max_output_tokens": 8, "extra_body": ROOF}
    with ai.responses.stream(**options) as stream:
        events: list[Any] = [*stream]
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == wanted
    assert [event.sequence_number for event in ask(ai, stream=True)] == [*range(len(kinds))]
    assert events[-1].response.output_text == wanted


class Roof(BaseModel):
    """What is asked of a roof."""

    material: Literal["slate", "thatch"]
    leaks: bool


def test_answer_of_a_schema_is_parsed(ai: openai.OpenAI) -> None:
    asked: Any = {"model": "beacon-memory", "input": "What of the roof?", "max_output_tokens": 60}
    parsed = ai.responses.parse(**asked, text_format=Roof, extra_body=ROOF).output_parsed
    assert isinstance(parsed, Roof)
    with ai.responses.stream(**asked, text_format=Roof, extra_body=ROOF) as stream:
        assert stream.get_final_response().output_parsed == parsed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"max_output_tokens": 5000}, "5000 tokens"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_met_is_an_error_of_the_client(
    ai: openai.OpenAI, options: dict[str, Any], said: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        ask(ai, stream=stream, **options)
