"""Tool calls of answers as LlamaIndex has them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from llama_index.core.base.llms.types import TextBlock, ToolCallBlock

from beacon_memory import ToolCall, UnreadCall

__all__ = ["arguments_of", "parse"]


def parse(parts: Iterable[str | ToolCall | UnreadCall]) -> list[TextBlock | ToolCallBlock]:
    """Return an answer as blocks: its text, and its tool calls. One that cannot be read stays part of the text."""
    content = ""
    calls: list[ToolCallBlock] = []
    for part in parts:
        if isinstance(part, str):
            content += part
        elif isinstance(part, UnreadCall):
            content += part.text
        else:
            calls.append(ToolCallBlock(tool_call_id=part.id, tool_name=part.name, tool_kwargs=part.arguments))
    content = content.strip()
    return [*([TextBlock(text=content)] if content or not calls else []), *calls]


def arguments_of(call: ToolCallBlock) -> Any:
    """Return the arguments of a call, which other models' classes keep as JSON."""
    if isinstance(call.tool_kwargs, str):
        try:
            return json.loads(call.tool_kwargs)
        except ValueError:
            return call.tool_kwargs
    return call.tool_kwargs
