"""Tool calls as text, as Hermes and Qwen models write them: <tool_call>{"name": ..., "arguments": ...}</tool_call>."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import TextBlock, ToolCallBlock

from beacon_memory import InputError

__all__ = ["OPENING", "arguments_of", "chosen_tools", "parse", "text_before_calls", "to_text"]

OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_CALL = re.compile(rf"{OPENING}(.*?)(?:{_CLOSING}|\Z)", re.DOTALL)  # the last one may have been cut off


def parse(text: str) -> list[TextBlock | ToolCallBlock]:
    """An answer as blocks: its text, and its tool calls. One that cannot be read stays part of the text."""
    calls: list[ToolCallBlock] = []

    def take(match: re.Match[str]) -> str:
        call = _read(match[1])
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    content = _CALL.sub(take, text).strip()
    return [*([TextBlock(text=content)] if content or not calls else []), *calls]


def _read(block: str) -> ToolCallBlock | None:
    try:
        fields = json.loads(block)
        name, arguments = fields["name"], fields.get("arguments", {})
        if isinstance(arguments, str):  # some models quote them
            arguments = json.loads(arguments)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCallBlock(tool_call_id=f"call_{uuid.uuid4().hex}", tool_name=name, tool_kwargs=arguments)


def text_before_calls(text: str) -> str:
    """What is certain to come before any tool call, of an answer that is not finished."""
    if (at := text.find(OPENING)) >= 0:
        return text[:at]
    begun = max((n for n in range(1, len(OPENING)) if text.endswith(OPENING[:n])), default=0)
    return text[: len(text) - begun]


def to_text(call: ToolCallBlock) -> str:
    """A tool call as a model would have written it."""
    fields = {"name": call.tool_name, "arguments": arguments_of(call)}
    return f"{OPENING}\n{json.dumps(fields, ensure_ascii=False)}\n{_CLOSING}"


def arguments_of(call: ToolCallBlock) -> Any:
    """The arguments of a call, which other models' classes keep as JSON."""
    if isinstance(call.tool_kwargs, str):
        try:
            return json.loads(call.tool_kwargs)
        except ValueError:
            return call.tool_kwargs
    return call.tool_kwargs


def chosen_tools(tools: Sequence[Mapping[str, Any]], choice: Any) -> list[Mapping[str, Any]]:
    """The schemas that a `tool_choice` leaves: all, none for "none", or the one that it names."""
    if choice in (None, "auto", "any", "required"):
        return list(tools)
    if choice == "none":
        return []
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else choice
    if chosen := [tool for tool in tools if tool["function"]["name"] == name]:
        return chosen
    known = ", ".join(repr(tool["function"]["name"]) for tool in tools) or "none"
    raise InputError(f"tool_choice={choice!r} must be 'auto', 'required', 'none' or the name of a tool; tools: {known}")
