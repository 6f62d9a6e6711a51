"""Conversations as chat templates take them and as a store keeps them, checked where they come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .documents import check_id, check_utf8
from .errors import InputError

__all__ = ["Conversation", "Messages", "checked_tools", "turns_of"]

Messages = str | Sequence[Mapping[str, Any]]

_MOST_PARTS = 100_000  # documents of a conversation, which are looked for one by one


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as a store keeps it, beside the documents with its older turns: `<id>/1`, `<id>/2`, ...

    turns:   turns that are kept as text: system turns that stay in force, then recent ones.
    parts:   numbers of the first and the last of its documents; (1, 0) if there are none.
    folding: set while turns are folded: which turns stay, what `parts` will be, and the sha256 of the text of the last
             document, which is stored last. After a crash, this hash tells whether all is folded.
    created_at, updated_at: ISO 8601, UTC, given by the store; "" before. Each change has a later time than the last.

    Raises InputError for anything else.
    """

    id: str
    turns: Sequence[Mapping[str, Any]] = ()
    parts: tuple[int, int] = (1, 0)
    folding: tuple[Sequence[int], tuple[int, int], str] | None = None
    created_at: str = ""
    updated_at: str = ""

    def __post_init__(self) -> None:
        check_id(self.id)
        object.__setattr__(self, "turns", [] if self.turns in ((), []) else turns_of(self.turns))
        object.__setattr__(self, "parts", self._checked_parts(self.parts))
        if self.folding is not None:
            object.__setattr__(self, "folding", self._checked_folding(self.folding))
        for time in filter(lambda time: time != "", (self.created_at, self.updated_at)):
            try:
                datetime.fromisoformat(time)
            except (TypeError, ValueError) as error:
                raise InputError(f"the conversation {self.id!r}: {time!r} is no time: {error}") from error

    @property
    def document_ids(self) -> list[str]:
        """Return the ids that its documents may have, oldest first, those of an unfinished fold included."""
        first, last = self.parts
        if self.folding is not None:
            last = max(last, self.folding[1][1])
        return [f"{self.id}/{number}" for number in range(first, last + 1)]

    def _checked_parts(self, parts: object) -> tuple[int, int]:
        match parts:
            case [int(first), int(last)] if 1 <= first <= last + 1 <= first + _MOST_PARTS:
                return first, last
        raise InputError(
            f"the conversation {self.id!r}: parts={parts!r} must be the numbers of its first and last document, at "
            f"most {_MOST_PARTS:,} of them"
        )

    def _checked_folding(self, folding: object) -> tuple[list[int], tuple[int, int], str]:
        match folding:
            case [list(stay), parts, str(digest)]:
                places = range(len(self.turns))
                if all(type(place) is int and place in places for place in stay) and stay == sorted({*stay}):
                    return stay, self._checked_parts(parts), digest
        raise InputError(f"the conversation {self.id!r}: folding={folding!r} says nothing of how its turns are folded")


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
