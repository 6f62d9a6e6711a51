"""Answers of a BeaconMemory as responses of LlamaIndex, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, ToolCallBlock

from beacon_memory import Answer
from beacon_memory.generation.tool_calls import call_of_turn

from .tool_calls import parse

__all__ = ["SoFar", "to_response"]


class SoFar:
    """An answer as far as it has come.

    certain: returns how much of a text is certain to come before a call; see `certain_text`.
    """

    def __init__(self, certain: Callable[[str], str]) -> None:
        self.certain = certain
        self.text = self.shown = ""

    def add(self, piece: str | Answer) -> Iterator[ChatResponse]:
        """Add a piece and yield what it adds to the text that is certain."""
        if isinstance(piece, Answer):
            whole = to_response(piece)
            content = whole.message.content or ""
            shown = self.shown.lstrip()
            rest = content[len(shown) :] if content.startswith(shown) else ""
            yield whole.model_copy(update={"delta": rest})
            return
        self.text += piece
        certain = self.certain(self.text)
        if len(certain) > len(self.shown):
            delta, self.shown = certain[len(self.shown) :], certain
            yield ChatResponse(message=ChatMessage(certain, role=MessageRole.ASSISTANT), delta=delta)


def to_response(answer: Answer) -> ChatResponse:
    """Return an answer in the framework's form."""
    blocks = parse(answer.parts)
    calls = [
        call_of_turn(block.tool_call_id, block.tool_name, block.tool_kwargs)
        for block in blocks
        if isinstance(block, ToolCallBlock)
    ]
    usage = {
        "memory_slots": answer.usage.slots,
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.generated_tokens,
        "total_tokens": answer.usage.slots + answer.usage.prompt_tokens + answer.usage.generated_tokens,
    }
    return ChatResponse(
        message=ChatMessage(
            role=MessageRole.ASSISTANT,
            blocks=blocks,
            additional_kwargs={"tool_calls": calls} if calls else {},  # some of the framework looks for them here
        ),
        raw={
            "document_ids": list(answer.ids),
            "usage": usage,
            "sources": [asdict(source) for source in answer.sources],
            "supported": answer.supported,
            "time_to_first_token": answer.time_to_first_token,
            "seconds": answer.seconds,
        },
        additional_kwargs=usage,
    )
