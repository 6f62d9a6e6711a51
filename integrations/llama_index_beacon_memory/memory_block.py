"""BeaconMemoryBlock: the part of a `Memory` that folds old messages into keys and values."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import Field
from llama_index.core.memory import BaseMemoryBlock

from beacon_memory import BeaconMemoryError, Session
from beacon_memory.session import SESSION_SLOTS

from . import handles
from .llm import BeaconMemoryLLM
from .messages import from_session_turn, to_session_turns

__all__ = ["BeaconMemoryBlock"]


class BeaconMemoryBlock(BaseMemoryBlock[list[ChatMessage]]):
    """Fold the messages that a `Memory` flushes into documents, and have the model answer behind them.

    They are appended to the last document until it is as long as a window of the model, then the next one begins: what
    was folded before is not read again. The documents lie in the store and the namespace of `llm`, under the name of
    the block and the id of the session, and survive the program. What a block gives to its `Memory` are messages
    without text, with handles that `llm` understands, and every other `BeaconMemoryLLM` of this process on the same
    namespace; and system messages, which stay in force as they are.

    Users who must not see each other's conversations get namespaces of their own:
    `BeaconMemoryBlock(llm=llm.within("alice"))`, with the same `llm.within("alice")` to answer.
    """

    name: str = Field(default="BeaconMemory", description="The name of the block; part of its documents' ids.")
    llm: BeaconMemoryLLM = Field(description="The model that reads the messages and answers behind them.")
    slots: int = Field(
        default=SESSION_SLOTS,
        ge=1,
        description="Memory slots that a conversation may take in the store. When it needs more, its older documents "
        "are compressed more strongly, and when that goes no further the oldest is forgotten. How many of them a "
        "question loads is told by `session_budget` with a call.",
    )
    system: int = Field(
        default=512,
        ge=0,
        description="Tokens of flushed system messages that stay in force: they are given back as they are.",
    )

    def session(self, session_id: str | None = None) -> Session:
        """Return the conversation that is kept for a `Memory` with this session id."""
        id = self.name if session_id is None else f"{self.name}/{session_id}"
        one = 1  # token: everything but system messages is folded
        return Session(self.llm.memory, id, recent=one, slots=self.slots, system=self.system)

    async def aput(
        self,
        messages: list[ChatMessage],
        from_short_term_memory: bool = False,
        session_id: str | None = None,
    ) -> None:
        """Fold messages. The session is the one that the `Memory` names, never one that a message claims to be of."""
        if not from_short_term_memory or self.accept_short_term_memory:
            await asyncio.to_thread(self._fold, messages, session_id)

    async def _aput(self, messages: list[ChatMessage]) -> None:
        await self.aput(messages)

    async def _aget(
        self,
        messages: list[ChatMessage] | None = None,  # noqa: ARG002  # the framework passes it
        session_id: str | None = None,
        **block_kwargs: Any,  # noqa: ARG002  # the framework passes it
    ) -> list[ChatMessage]:
        """Return handles of what was folded, system messages, and what an interrupted program did not come to fold."""
        return await asyncio.to_thread(self._messages, session_id)

    def clear(self, session_id: str | None = None) -> None:
        """Forget a conversation; `Memory.reset` leaves what was folded."""
        self.session(session_id).clear()

    def _fold(self, messages: list[ChatMessage], session_id: str | None) -> None:
        if turns := to_session_turns(messages):
            session = self.session(session_id)
            try:
                session.add(turns)
            except BeaconMemoryError:  # a Memory gives messages away once: they are folded with the next ones
                session.add(turns, fold=False)
                raise

    def _messages(self, session_id: str | None) -> list[ChatMessage]:
        session = self.session(session_id)
        folded = [handles.issue(self.llm.memory.store, id) for id in session.ids]
        return [*folded, *map(from_session_turn, session.turns)]
