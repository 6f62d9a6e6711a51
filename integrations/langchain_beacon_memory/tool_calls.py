"""Tool calls of answers as LangChain has them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, InvalidToolCall, ToolCall, ToolCallChunk
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk

from beacon_memory import ToolCall as AnsweredCall
from beacon_memory import UnreadCall
from beacon_memory.generation.tool_calls import new_call_id

__all__ = ["Parsed", "parse_calls", "require_call", "to_chunks"]


@dataclass(frozen=True, slots=True)
class Parsed:
    """An answer without its tool calls, the calls, and those that cannot be read."""

    content: str
    calls: list[ToolCall]
    invalid: list[InvalidToolCall]


def parse_calls(parts: Iterable[str | AnsweredCall | UnreadCall]) -> Parsed:
    """Take the tool calls out of the parts of an answer."""
    content = ""
    calls: list[ToolCall] = []
    invalid: list[InvalidToolCall] = []
    for part in parts:
        if isinstance(part, str):
            content += part
        elif isinstance(part, UnreadCall):
            invalid.append(invalid_tool_call(args=part.inside, id=new_call_id(), error=part.error))
        else:
            calls.append(tool_call(name=part.name, args=part.arguments, id=part.id))
    return Parsed(content.strip(), calls, invalid)


def to_chunks(message: AIMessage) -> list[ToolCallChunk]:
    """Return all tool calls of a message for a stream; what could not be read stays so when chunks are added up."""
    valid = [(call["name"], json.dumps(call["args"], ensure_ascii=False), call["id"]) for call in message.tool_calls]
    invalid = [(call["name"], json.dumps(call["args"]), call["id"]) for call in message.invalid_tool_calls]
    return [
        tool_call_chunk(name=name, args=args, id=id, index=index)
        for index, (name, args, id) in enumerate(valid + invalid)
    ]


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
