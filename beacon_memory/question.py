"""A question with all that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .conversation import Messages
from .picking import DEFAULT_LIMIT, SESSION_BUDGET

__all__ = ["Question"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question for `BeaconMemory.ask_many`, with documents and options of its own.

    messages: a text, or a conversation. The other fields are as in `BeaconMemory.ask`, where `options` are those of
    transformers' `generate`.

        Question("Who pays the rent?", "lease", options={"max_new_tokens": 32})
    """

    messages: Messages
    ids: str | Sequence[str] | None = None
    budget: int | str | None = None
    session_budget: int = SESSION_BUDGET
    abstain: bool = False
    limit: int = DEFAULT_LIMIT
    stop: str | Sequence[str] | None = None
    seed: int | None = None
    schema: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    chat_template_kwargs: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
