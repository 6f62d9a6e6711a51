"""LangChain's messages as turns of a chat template, and as turns of a session that can be read back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from beacon_memory import InputError
from beacon_memory.generation.tool_calls import call_of_turn

from .tool_calls import parse_calls, to_text

__all__ = ["from_session_turns", "to_session_turn", "to_turns"]

_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"}
# Blocks of an answer that its text does without: calls are kept beside it, thoughts are not shown to a model again.
_BESIDE_TEXT = {"tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "reasoning", "thinking"}


def to_turns(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Return messages as a chat template takes them.

    Nothing but role, text and tool calls of a message has a meaning here: not its metadata, not its name.
    """
    turns: list[dict[str, Any]] = []
    for message in messages:
        turn: dict[str, Any] = {"role": _role(message), "content": _text(message)}
        if isinstance(message, AIMessage) and message.tool_calls:
            turn["tool_calls"] = [call_of_turn(call["id"], call["name"], call["args"]) for call in message.tool_calls]
        if isinstance(message, ToolMessage):
            turn |= {"tool_call_id": message.tool_call_id} | ({"name": message.name} if message.name else {})
        turns.append(turn)
    return turns


def to_session_turn(message: BaseMessage) -> dict[str, str]:
    """Return a message as a session keeps it: role and text, with tool calls as part of the text."""
    if isinstance(message, AIMessage):
        written = [_text(message), *map(to_text, message.tool_calls)]
        return {"role": "assistant", "content": "\n".join(filter(None, written))}
    return {"role": _role(message), "content": _text(message)}


def from_session_turns(turns: Iterable[Mapping[str, str]]) -> list[BaseMessage]:
    """Return the messages that `to_session_turn` made turns of; results of tools follow in the order of their calls."""
    messages: list[BaseMessage] = []
    waiting: deque[tuple[str | None, str]] = deque()  # id and name of each call whose result is still to come
    for turn in turns:
        role, content = turn["role"], turn["content"]
        if role == "assistant":
            parsed = parse_calls(content)
            messages.append(AIMessage(parsed.content, tool_calls=parsed.calls))
            waiting.extend((call["id"], call["name"]) for call in parsed.calls)
        elif role == "tool":
            id, name = waiting.popleft() if waiting else (None, None)
            messages.append(ToolMessage(content, tool_call_id=id or "", name=name))
        elif role in ("user", "system"):
            messages.append(HumanMessage(content) if role == "user" else SystemMessage(content))
        else:
            messages.append(ChatMessage(content=content, role=role))
    return messages


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    try:
        return _ROLES[message.type.removesuffix("MessageChunk").lower()]
    except KeyError:
        raise InputError(f"a message of type {message.type!r} is not part of a conversation") from None


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    for block in message.content:
        kind = "text" if isinstance(block, str) else block.get("type")
        if kind != "text" and not (isinstance(message, AIMessage) and kind in _BESIDE_TEXT):
            raise InputError(f"the model reads text only; a {message.type} message has a block of type {kind!r}")
    return str(message.text)
