"""One question to a BeaconMemory: the documents that are loaded in front of it, and how it is asked."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llama_index.core.base.llms.types import ChatMessage

from beacon_memory import Answer, BeaconMemory
from beacon_memory.generation.background import in_background
from beacon_memory.generation.prompt import require_tools
from beacon_memory.generation.tool_calls import certain_text

from .messages import to_turns

__all__ = ["Call"]


@dataclass(frozen=True, slots=True)
class Call:
    """A question ready to be asked.

    memory, namespace: which memory is asked, and where in it.
    ids:           documents to load, None to find some.
    conversations: folded conversations to load behind them.
    options:       of `BeaconMemory.ask`.
    """

    memory: BeaconMemory
    namespace: str
    messages: Sequence[ChatMessage]
    ids: Sequence[str] | None
    conversations: list[str]
    options: dict[str, Any]

    def certain(self, text: str) -> str:
        """Return how much of an unfinished answer is certain to be text, and no call."""
        return certain_text(self.memory.model.tokenizer, text, self.options["tools"])

    def ask(self) -> Answer:
        """Answer it, see `BeaconMemory.ask`."""
        with self.memory.in_namespace(self.namespace) as memory:
            return memory.ask(**self._asked(memory))

    def stream(self) -> Iterator[str | Answer]:
        """Answer it in pieces, see `BeaconMemory.stream`."""
        with self.memory.in_namespace(self.namespace) as memory:  # everything is loaded when this returns
            return memory.stream(**self._asked(memory))

    async def astream(self) -> AsyncGenerator[str | Answer, None]:
        """Answer it in pieces, in threads."""
        if self.options.get("num_beams", 1) > 1:  # only known at the end
            async for answer in in_background(lambda: iter([self.ask()])):
                yield answer
        else:
            async with contextlib.aclosing(in_background(self.stream)) as pieces:
                async for piece in pieces:
                    yield piece

    def _asked(self, memory: BeaconMemory) -> dict[str, Any]:
        """Return the arguments of `BeaconMemory.ask`."""
        if self.options["tools"]:
            require_tools(memory.model)
        turns, found = to_turns(self.messages), []
        if self.ids is None:
            found = [pick.id for pick in memory.pick(_said(turns))]
        ids = list(dict.fromkeys([*(found if self.ids is None else self.ids), *self.conversations]))
        return {"question": turns, "ids": ids, **self.options}


def _said(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out the results of tools that a ReActAgent reports as if the user had said them."""
    return [
        turn
        for before, turn in pairwise([{"role": "", "content": ""}, *turns])
        if not (
            (before["role"], turn["role"]) == ("assistant", "user")
            and "\nAction Input:" in before["content"]
            and turn["content"].startswith("Observation: ")
        )
    ]
