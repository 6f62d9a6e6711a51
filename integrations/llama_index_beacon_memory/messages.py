"""LlamaIndex's messages as turns of a chat template, and as turns of a session that can be read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from beacon_memory import InputError
from beacon_memory.generation.tool_calls import call_of_turn

from .handles import KEY
from .tool_calls import arguments_of

__all__ = ["from_session_turn", "to_session_turns", "to_turns"]

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}
_NO_TEXT = (CachePoint, ThinkingBlock, ToolCallBlock)  # what a template has another place for, or none


def to_turns(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages as the model's chat template takes them. Raises InputError for content that is no text.

    Nothing but role, text and tool calls of a message has a meaning here. A message that only holds a memory handle is
    no turn.
    """
    turns: list[dict[str, Any]] = []
    for message in messages:
        for block in message.blocks:
            if not isinstance(block, (TextBlock, *_NO_TEXT)):
                raise InputError(f"the model reads text only; a {message.role.value} message has a {block.block_type}")
        if KEY not in message.additional_kwargs or message.blocks:
            turns.append(_turn(message))
    return turns


def to_session_turns(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages as a session keeps them; what holds neither text nor tool calls is left out."""
    return [turn for turn in map(_turn, messages) if turn["content"] or "tool_calls" in turn]


def from_session_turn(turn: Mapping[str, Any]) -> ChatMessage:
    """Return the message that a turn was made of: its role, text and tool calls, or the call that it answers."""
    calls = [
        ToolCallBlock(
            tool_call_id=call["id"] or None,
            tool_name=call["function"]["name"],
            tool_kwargs=call["function"]["arguments"],
        )
        for call in turn.get("tool_calls", ())
    ]
    text = [TextBlock(text=turn["content"])] if turn["content"] or not calls else []
    answered = {"tool_call_id": turn["tool_call_id"]} if "tool_call_id" in turn else {}
    return ChatMessage(role=MessageRole(turn["role"]), blocks=[*text, *calls], additional_kwargs=answered)


def _turn(message: ChatMessage) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": _ROLES[message.role], "content": message.content or ""}
    if calls := [block for block in message.blocks if isinstance(block, ToolCallBlock)]:
        turn["tool_calls"] = [call_of_turn(one.tool_call_id, one.tool_name, arguments_of(one)) for one in calls]
    if turn["role"] == "tool":
        turn["tool_call_id"] = str(message.additional_kwargs.get("tool_call_id", ""))
    return turn
