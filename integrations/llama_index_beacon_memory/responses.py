"""Answers of a BeaconMemory as responses of LlamaIndex, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Iterator

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, TextBlock, ToolCallBlock

from beacon_memory import Answer
from beacon_memory.generation.tool_calls import call_of_turn, text_before_calls

from .tool_calls import parse

__all__ = ["SoFar", "to_response"]


class SoFar:
    """An answer as far as it has come."""

    def __init__(self, *, tools: bool) -> None:
        self.tools = tools
        self.text = self.shown = ""

    def add(self, piece: str | Answer) -> Iterator[ChatResponse]:
        """Add a piece and yield what it adds: with tools, only text that is certain to come before a call."""
        if isinstance(piece, Answer):
            whole = to_response(piece, tools=self.tools)
            content = whole.message.content or ""
            shown = self.shown.lstrip()
            rest = content[len(shown) :] if content.startswith(shown) else ""
            yield whole.model_copy(update={"delta": rest})
            return
        self.text += piece
        certain = text_before_calls(self.text) if self.tools else self.text
        if len(certain) > len(self.shown):
            delta, self.shown = certain[len(self.shown) :], certain
            yield ChatResponse(message=ChatMessage(certain, role=MessageRole.ASSISTANT), delta=delta)


def to_response(answer: Answer, *, tools: bool) -> ChatResponse:
    """Return an answer in the framework's form; tools: whether it may hold calls."""
    blocks = parse(answer.text) if tools else [TextBlock(text=answer.text)]
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
            "time_to_first_token": answer.time_to_first_token,
            "seconds": answer.seconds,
        },
        additional_kwargs=usage,
    )
