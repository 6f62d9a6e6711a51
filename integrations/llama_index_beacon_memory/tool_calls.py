"""Tool calls of answers as LlamaIndex has them, and which tools a model is offered."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import TextBlock, ToolCallBlock

from beacon_memory import InputError
from beacon_memory.generation.tool_calls import CALL, new_call_id, read_call, write_call

__all__ = ["arguments_of", "chosen_tools", "parse", "to_text"]


def parse(text: str) -> list[TextBlock | ToolCallBlock]:
    """An answer as blocks: its text, and its tool calls. One that cannot be read stays part of the text."""
    calls: list[ToolCallBlock] = []

    def take(match: re.Match[str]) -> str:
        call = _read(match[1])
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    content = CALL.sub(take, text).strip()
    return [*([TextBlock(text=content)] if content or not calls else []), *calls]


def _read(block: str) -> ToolCallBlock | None:
    try:
        call = read_call(block)
    except ValueError:
        return None
    return ToolCallBlock(tool_call_id=new_call_id(), tool_name=call["name"], tool_kwargs=call["arguments"])


def to_text(call: ToolCallBlock) -> str:
    """A tool call as a model would have written it."""
    return write_call({"name": call.tool_name, "arguments": arguments_of(call)})


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
