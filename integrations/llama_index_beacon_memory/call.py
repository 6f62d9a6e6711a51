"""One question to a BeaconMemory: what is loaded in front of it, and how it is asked."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from llama_index.core.base.llms.types import ChatMessage, MessageRole, ToolCallBlock

from beacon_memory import Answer, BeaconMemory, InputError
from beacon_memory.generation.background import in_background
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.generation.tool_calls import OPENING

from .full_text import search
from .messages import to_turns

__all__ = ["Call", "takes_tools"]

_DOCUMENTS = 3  # that a question without ids may pick
_PROBE = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"of": {"type": "string", "description": "What."}}},
    },
}


@dataclass(frozen=True, slots=True)
class Call:
    """A question ready to be asked.

    own:           whether the memory was opened for this call.
    ids:           documents to load, None to pick some.
    conversations: folded conversations to load behind them.
    options:       of `BeaconMemory.ask`.
    """

    memory: BeaconMemory
    own: bool
    messages: Sequence[ChatMessage]
    ids: Sequence[str] | None
    conversations: list[str]
    options: dict[str, Any]

    @property
    def tools(self) -> bool:
        """Whether the model may call any."""
        return bool(self.options["tools"])

    def ask(self) -> Answer:
        """See `BeaconMemory.ask`."""
        with self._open() as memory:
            return memory.ask(self._turns(), self._documents(), **self.options)

    def stream(self) -> Iterator[str | Answer]:
        """See `BeaconMemory.stream`."""
        with self._open() as memory:  # everything is loaded when this returns
            return memory.stream(self._turns(), self._documents(), **self.options)

    async def astream(self) -> AsyncGenerator[str | Answer, None]:
        """The same in threads."""
        if self.options.get("num_beams", 1) > 1:  # only known at the end
            async for answer in in_background(lambda: iter([self.ask()])):
                yield answer
        else:
            async with contextlib.aclosing(in_background(self.stream)) as pieces:
                async for piece in pieces:
                    yield piece

    def _turns(self) -> list[dict[str, Any]]:
        called = any(isinstance(block, ToolCallBlock) for message in self.messages for block in message.blocks)
        return to_turns(self.messages, calls_as_text=called and not takes_tools(self.memory))

    def _documents(self) -> list[str]:
        ids = self.ids
        if ids is None:
            asked = (message.content for message in reversed(self.messages) if message.role == MessageRole.USER)
            ids = [row.id for _, row in search(self.memory, next(asked, None) or "", _DOCUMENTS, self._room())]
        return list(dict.fromkeys([*ids, *self.conversations]))

    def _room(self) -> int:
        """Slots that documents may take: what the model leaves beside the answer, the question and conversations."""
        taken = sum(self.memory.show(id).slots for id in self.conversations)
        return self.memory.model.max_positions - self.memory.compressor.reserve - taken

    @contextlib.contextmanager
    def _open(self) -> Iterator[BeaconMemory]:
        try:
            yield self.memory
        finally:
            if self.own:
                self.memory.close()


def takes_tools(memory: BeaconMemory) -> bool:
    """Whether the chat template of the model has a place for tools, and says that calls are written as we read them."""
    try:
        ids = chat_prompt(memory.model, "probe", behind_memory=True, tools=[_PROBE])
    except (InputError, TemplateError):  # no place for them, or it says so itself
        return False
    return OPENING in str(memory.model.tokenizer.decode(ids))
