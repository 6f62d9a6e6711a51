"""Tool calls as Hermes and Qwen models write them: <tool_call>{"name": ..., "arguments": ...}</tool_call>."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, InvalidToolCall, ToolCall, ToolCallChunk
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk

from beacon_memory import InputError

__all__ = [
    "OPENING",
    "Parsed",
    "chosen_tools",
    "parse_calls",
    "require_call",
    "text_before_calls",
    "to_chunks",
    "to_text",
]

OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_CALL = re.compile(rf"{OPENING}(.*?)(?:{_CLOSING}|\Z)", re.DOTALL)  # the last one may have been cut off


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
    for block in _CALL.findall(text):
        try:
            calls.append(_parse(block))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"not a JSON object with the text 'name' and the object 'arguments': {error!r}"
            invalid.append(invalid_tool_call(args=block.strip(), id=_new_id(), error=reason))
    return Parsed(_CALL.sub("", text).strip(), calls, invalid)


def _parse(block: str) -> ToolCall:
    fields = json.loads(block)
    name, arguments = fields["name"], fields.get("arguments", {})
    if isinstance(arguments, str):  # some models quote them
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise TypeError(f"name={name!r}, arguments={arguments!r}")
    return tool_call(name=name, args=arguments, id=str(fields.get("id") or _new_id()))


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex}"


def text_before_calls(text: str) -> str:
    """What is certain to come before any tool call, of an answer that is not finished."""
    if (at := text.find(OPENING)) >= 0:
        return text[:at]
    begun = max((n for n in range(1, len(OPENING)) if text.endswith(OPENING[:n])), default=0)
    return text[: len(text) - begun]


def to_text(call: ToolCall, *, with_id: bool) -> str:
    """A tool call as a model would have written it, and with its id if it is to be read again."""
    fields = {"name": call["name"], "arguments": call["args"]} | ({"id": call["id"]} if with_id else {})
    return f"{OPENING}\n{json.dumps(fields, ensure_ascii=False)}\n{_CLOSING}"


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
