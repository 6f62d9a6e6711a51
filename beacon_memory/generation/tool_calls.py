"""Tool calls as Hermes and Qwen models write them: <tool_call>{"name": ..., "arguments": ...}</tool_call>."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from beacon_memory.errors import InputError

__all__ = [
    "OPENING",
    "ToolCall",
    "UnreadCall",
    "call_of_turn",
    "chosen_tools",
    "new_call_id",
    "results_in_order",
    "split_calls",
    "text_before_calls",
    "with_calls_as_text",
    "write_call",
]

OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_CALL = re.compile(rf"{OPENING}(.*?)(?:{_CLOSING}|\Z)", re.DOTALL)  # the last one may have been cut off


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool: an id of its own, the tool's name, and the arguments."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class UnreadCall:
    """A call that cannot be read: what stands between the tags, all of it with the tags, and why."""

    inside: str
    text: str
    error: str


def split_calls(text: str) -> list[str | ToolCall | UnreadCall]:
    """Split an answer into texts and tool calls, in their order.

    >>> split_calls('Let me see. <tool_call>{"name": "look", "arguments": {"at": "roof"}}</tool_call>')
    ['Let me see. ', ToolCall(id='call_...', name='look', arguments={'at': 'roof'})]
    """
    parts: list[str | ToolCall | UnreadCall] = []
    end = 0
    for match in _CALL.finditer(text):
        parts += [text[end : match.start()], _read(match)]
        end = match.end()
    return [part for part in [*parts, text[end:]] if part != ""]


def write_call(fields: Mapping[str, Any]) -> str:
    """Write a tool call as a model would have written it."""
    return f"{OPENING}\n{json.dumps(fields, ensure_ascii=False)}\n{_CLOSING}"


def call_of_turn(id: str | None, name: str, arguments: Any) -> dict[str, Any]:
    """Return a tool call as chat templates have it among the `tool_calls` of a turn."""
    return {"type": "function", "id": id or "", "function": {"name": name, "arguments": arguments}}


def with_calls_as_text(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn of a conversation with its `tool_calls` as part of its text, as the model would have written it."""
    calls = [call["function"] for call in turn.get("tool_calls") or ()]
    written = [write_call({"name": call["name"], "arguments": call.get("arguments", {})}) for call in calls]
    kept = {name: value for name, value in turn.items() if name != "tool_calls"}
    return kept | {"content": "\n".join(filter(None, [turn.get("content"), *written]))}


def results_in_order(turns: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return turns with the results of tools in the order of their calls: most templates show a model no ids."""
    ordered: list[dict[str, Any]] = []
    places: dict[Any, int] = {}
    for results, group in groupby(turns, key=lambda turn: turn.get("role") == "tool"):
        run = list(group)
        if results:
            run.sort(key=lambda turn: places.get(turn.get("tool_call_id"), len(places)))
        else:
            places = {call.get("id"): n for n, call in enumerate(run[-1].get("tool_calls") or ())}
        ordered += run
    return ordered


def text_before_calls(text: str) -> str:
    """Return what is certain to come before any tool call, of an answer that is not finished."""
    if (at := text.find(OPENING)) >= 0:
        return text[:at]
    begun = max((n for n in range(1, len(OPENING)) if text.endswith(OPENING[:n])), default=0)
    return text[: len(text) - begun]


def chosen_tools(tools: Sequence[Mapping[str, Any]], choice: Any) -> tuple[list[Mapping[str, Any]], bool]:
    """Return the tools that a `tool_choice` leaves, and whether one of them has to be called.

    choice: None or "auto" leaves it to the model, "none" or False offers no tool, "any", "required" or True demands a
    call, and a tool's name, or an OpenAI-style dict with it, a call of that one. Raises InputError for anything else.
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
    raise InputError(
        f"tool_choice={choice!r} must be 'auto', 'any', 'required', 'none' or the name of a tool; tools: {known}"
    )


def new_call_id() -> str:
    """Return an id for a call that has none."""
    return f"call_{uuid.uuid4().hex}"


def _read(match: re.Match[str]) -> ToolCall | UnreadCall:
    try:
        fields = json.loads(match[1])
        name, arguments = fields["name"], fields.get("arguments", {})
        if isinstance(arguments, str):  # some models quote them
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise TypeError(f"name={name!r}, arguments={arguments!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"not a JSON object with the text 'name' and the object 'arguments': {error!r}"
        return UnreadCall(match[1].strip(), match[0], why)
    return ToolCall(str(fields.get("id") or new_call_id()), name, arguments)
