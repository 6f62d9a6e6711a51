"""LangChain's messages as turns of a chat template, and as turns of a session that can be read back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    ToolMessage,
    convert_to_messages,
    message_chunk_to_message,
    message_to_dict,
    messages_from_dict,
)

from beacon_memory import InputError
from beacon_memory.generation.tool_calls import call_of_turn

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


def to_session_turn(message: BaseMessage) -> dict[str, Any]:
    """Return a message as a session keeps it: as a chat template takes it, and whole, as `message`.

    What JSON cannot hold of it, such as some artifacts of tools, is kept as text, and a chunk as a message.
    """
    (turn,) = to_turns([message])
    whole = message_to_dict(message_chunk_to_message(message))
    try:
        return turn | {"message": json.loads(json.dumps(whole, default=str))}
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"a {message.type} message cannot be kept as JSON: {error!r}") from error


def from_session_turns(turns: Iterable[Mapping[str, Any]]) -> list[BaseMessage]:
    """Return the messages that `to_session_turn` made turns of, and those of turns that a program added itself."""
    return [_message(turn) for turn in turns]


def _message(turn: Mapping[str, Any]) -> BaseMessage:
    if "message" in turn:
        return messages_from_dict([turn["message"]])[0]
    if turn["role"] not in _ROLES.values():
        return ChatMessage(content=turn["content"], role=turn["role"])
    given = {"tool_call_id": "", **turn} if turn["role"] == "tool" else dict(turn)
    if calls := turn.get("tool_calls"):
        given["tool_calls"] = [{"id": None, **call} for call in calls]
    return convert_to_messages([given])[0]


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
