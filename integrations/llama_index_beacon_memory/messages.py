"""LlamaIndex's messages as turns of a chat template."""

from __future__ import annotations

from collections.abc import Sequence
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
from .tool_calls import arguments_of, to_text

__all__ = ["to_text_turns", "to_turns"]

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
        if KEY in message.additional_kwargs and not message.blocks:
            continue
        turn: dict[str, Any] = {"role": _role(message), "content": message.content or ""}
        if calls := _calls(message):
            turn["tool_calls"] = [call_of_turn(one.tool_call_id, one.tool_name, arguments_of(one)) for one in calls]
        if turn["role"] == "tool":
            turn["tool_call_id"] = str(message.additional_kwargs.get("tool_call_id", ""))
        turns.append(turn)
    return turns


def to_text_turns(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Return messages as turns of text alone, tool calls written out; what holds neither is left out."""
    texts = ((message, _with_calls(message)) for message in messages)
    return [{"role": _role(message), "content": text} for message, text in texts if text]


def _role(message: ChatMessage) -> str:
    return _ROLES[message.role]


def _calls(message: ChatMessage) -> list[ToolCallBlock]:
    return [block for block in message.blocks if isinstance(block, ToolCallBlock)]


def _with_calls(message: ChatMessage) -> str:
    return "\n".join(filter(None, [message.content, *map(to_text, _calls(message))]))
