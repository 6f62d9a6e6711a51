"""Tool calls of answers as LangChain has them, and which tools a model is offered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, InvalidToolCall, ToolCall, ToolCallChunk
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk

from beacon_memory import InputError
from beacon_memory.generation.tool_calls import CALL, new_call_id, read_call, write_call

__all__ = ["Parsed", "chosen_tools", "parse_calls", "require_call", "to_chunks", "to_text"]


@dataclass(frozen=True, slots=True)
class Parsed:
    """What an answer says beside its tool calls, the calls, and those that cannot be read."""

    content: str
    calls: list[ToolCall]
    invalid: list[InvalidToolCall]


def parse_calls(text: str) -> Parsed:
    """Take the tool calls out of an answer."""
    calls: list[ToolCall] = []
    invalid: list[InvalidToolCall] = []
    for block in CALL.findall(text):
        try:
            call = read_call(block)
            id = str(call.get("id") or new_call_id())
            calls.append(tool_call(name=call["name"], args=call["arguments"], id=id))
        except ValueError as error:
            invalid.append(invalid_tool_call(args=block.strip(), id=new_call_id(), error=str(error)))
    return Parsed(CALL.sub("", text).strip(), calls, invalid)


def to_text(call: ToolCall, *, with_id: bool) -> str:
    """A tool call as a model would have written it, and with its id if it is to be read again."""
    fields = {"name": call["name"], "arguments": call["args"]} | ({"id": call["id"]} if with_id else {})
    return write_call(fields)


def to_chunks(message: AIMessage) -> list[ToolCallChunk]:
    """All tool calls of a message for a stream; what could not be read stays so when chunks are added up."""
    valid = [(call["name"], json.dumps(call["args"], ensure_ascii=False), call["id"]) for call in message.tool_calls]
    invalid = [(call["name"], json.dumps(call["args"]), call["id"]) for call in message.invalid_tool_calls]
    return [
        tool_call_chunk(name=name, args=args, id=id, index=index)
        for index, (name, args, id) in enumerate(valid + invalid)
    ]


def chosen_tools(tools: Sequence[dict[str, Any]], choice: Any) -> tuple[list[dict[str, Any]], bool]:
    """The tools that a `tool_choice` leaves, and whether one of them has to be called.

    choice: None or "auto" leaves it to the model, "none" offers no tool, "any", "required" or True demands a call, and
    a tool's name, or an OpenAI-style dict with it, a call of that one.
    """
    if choice is None or choice == "auto":
        return list(tools), False
    if choice is False or choice == "none":
        return [], False
    if choice is True or choice in ("any", "required"):
        return list(tools), True
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else choice
    if chosen := [tool for tool in tools if tool["function"]["name"] == name]:
        return chosen, True
    known = ", ".join(repr(tool["function"]["name"]) for tool in tools) or "none"
    raise InputError(f"tool_choice={choice!r} must be 'auto', 'any', 'none' or the name of a tool; tools: {known}")


def require_call(message: AIMessage, names: Sequence[str]) -> AIMessage:
    """Return the message; raises OutputParserException unless it calls one of these tools."""
    if any(call["name"] in names for call in message.tool_calls):
        return message
    unread = "".join(f"; a call could not be read: {call['error']}" for call in message.invalid_tool_calls)
    raise OutputParserException(
        f"the model had to call {' or '.join(map(repr, names))}, and answered without{unread}; a model that calls "
        "tools more reliably, more max_tokens or a plainer prompt may help",
        llm_output=message.text or (message.invalid_tool_calls[0]["args"] if message.invalid_tool_calls else ""),
    )
