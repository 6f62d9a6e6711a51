"""Conversations as chat templates take them, checked where they come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .documents import check_utf8
from .errors import InputError

__all__ = ["Messages", "checked_tools", "turns_of"]

Messages = str | Sequence[Mapping[str, Any]]


def turns_of(messages: Messages) -> list[dict[str, Any]]:
    """Return the turns of a conversation, or the one turn of a user's question.

    A turn has the texts `role` and `content`, and may have more that a chat template knows; one with `tool_calls` needs
    no content. Raises InputError for anything else, and for texts that UTF-8 cannot encode.
    """
    if isinstance(messages, str):
        check_utf8(messages, "the question")
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, (list, tuple)) or not messages or not all(map(_is_turn, messages)):
        raise InputError(f"messages={messages!r} must be a text, or dicts with 'role' and 'content' texts")
    check_utf8(messages, "messages")
    return [dict(turn) for turn in messages]


def checked_tools(tools: object) -> list[Mapping[str, Any]]:
    """Return JSON schemas of functions; raises InputError for anything else, and as `turns_of` does."""
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"tools={tools!r} must be JSON schemas of functions, as dicts")
    check_utf8(tools, "tools")
    return list(tools)


def _is_turn(turn: object) -> bool:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        return False
    return isinstance(turn.get("content"), str) or bool(turn.get("tool_calls"))
