"""Answers in the form of OpenAI's chats and completions, whole and in pieces.

Memory slots count as tokens of the prompt that were read from a cache. What is told of memories stands beside OpenAI's
fields, under `memory`.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from beacon_memory.generation.tool_calls import certain_text
from beacon_memory.results import Answer, ToolCall, UnreadCall

from .bodies import ToolQuestion
from .refusals import RefusedError

__all__ = ["ChatReply", "CompletionReply", "Reply", "told_of_memory"]


class Reply(ABC):
    """The reply to one request. A subclass says how it is worded.

    model: its name. asked: the question with its tools. tokenizer: of the model.
    """

    last_event = ""  # of a stream

    def __init__(self, model: str, asked: ToolQuestion, tokenizer: Any) -> None:
        self._model = model
        self._asked = asked
        self._tokenizer = tokenizer

    @abstractmethod
    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the reply as one object; raises RefusedError with 422 if a tool had to be called and was not."""

    @abstractmethod
    def chunks(self, pieces: AsyncIterator[str | Answer], *, include_usage: bool) -> AsyncIterator[Mapping[str, Any]]:
        """Yield the reply in chunks, as pieces of the answer come."""

    def event(self, chunk: Mapping[str, Any]) -> str:
        """Return a chunk as a server-sent event."""
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    async def _texts(self, pieces: AsyncIterator[str | Answer]) -> AsyncIterator[str | Answer]:
        """Yield the text of an answer without the calls in it, as it becomes certain, and the Answer last."""
        seen = shown = ""
        async for piece in pieces:
            if isinstance(piece, Answer):
                if rest := self._content(piece).removeprefix(shown):
                    yield rest
                yield piece
                return
            seen += piece
            certain = certain_text(self._tokenizer, seen, self._asked.tools).strip()
            if new := certain.removeprefix(shown):
                shown = certain
                yield new

    def _content(self, answer: Answer) -> str:
        """Return the text of an answer without the calls in it; what cannot be read as a call is text."""
        if not self._asked.tools:
            return answer.text
        said = (part if isinstance(part, str) else part.text for part in answer.parts if not isinstance(part, ToolCall))
        return "".join(said).strip()

    def _calls(self, answer: Answer) -> list[ToolCall]:
        calls = [part for part in answer.parts if isinstance(part, ToolCall)] if self._asked.tools else []
        if self._asked.must_call and not calls:
            unread = [part.error for part in answer.parts if isinstance(part, UnreadCall)]
            why = f"; a call could not be read: {unread[0]}" if unread else ""
            raise RefusedError(
                422,
                "tool_not_called",
                f"the model had to call a tool, and answered without{why}; a model that calls tools more reliably, "
                "more tokens or a plainer prompt may help",
                param="tool_choice",
            )
        return calls


class _ChoicesReply(Reply):
    """A reply with one choice, whole or in pieces."""

    kind = ""
    chunk_kind = ""
    opening = ""
    last_event = "data: [DONE]\n\n"

    def __init__(self, model: str, asked: ToolQuestion, tokenizer: Any) -> None:
        super().__init__(model, asked, tokenizer)
        self._shared = {"id": f"{self.opening}{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the reply with its choice."""
        return self._object(self.kind, [self._choice(answer)], usage=_usage(answer), memory=told_of_memory(answer))

    async def chunks(
        self, pieces: AsyncIterator[str | Answer], *, include_usage: bool
    ) -> AsyncIterator[Mapping[str, Any]]:
        """Yield pieces of the choice."""
        for choice in self._begin():
            yield self._chunk([choice])
        async for piece in self._texts(pieces):
            if isinstance(piece, str):
                yield self._chunk([self._delta(self._text(piece))])
                continue
            for choice in self._rest(piece):
                yield self._chunk([choice])
            last = self._delta({}, self._finish(piece))
            yield self._object(self.chunk_kind, [last], memory=told_of_memory(piece))
            if include_usage:
                yield self._object(self.chunk_kind, [], usage=_usage(piece))

    def _object(self, kind: str, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._shared, "object": kind, "choices": list(choices), **more}

    def _chunk(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return self._object(self.chunk_kind, choices)

    def _finish(self, answer: Answer) -> str:
        return "length" if not answer.ended else "tool_calls" if self._calls(answer) else "stop"

    def _begin(self) -> Iterator[Mapping[str, Any]]:
        """Yield what opens a stream."""
        yield from ()

    def _rest(self, answer: Answer) -> Iterator[Mapping[str, Any]]:  # noqa: ARG002  # of which a text has none
        """Yield what is known only at the end, beside the text."""
        yield from ()

    @abstractmethod
    def _choice(self, answer: Answer) -> Mapping[str, Any]:
        """Return the whole answer as a choice."""

    @abstractmethod
    def _delta(self, fields: Mapping[str, Any], finish: str | None = None) -> Mapping[str, Any]:
        """Return a piece of the answer as a choice."""

    @abstractmethod
    def _text(self, text: str) -> Mapping[str, Any]:
        """Return a text as fields of a piece."""


class ChatReply(_ChoicesReply):
    """A reply of `/v1/chat/completions`."""

    kind, chunk_kind, opening = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def _begin(self) -> Iterator[Mapping[str, Any]]:
        yield self._delta({"role": "assistant", "content": ""})

    def _rest(self, answer: Answer) -> Iterator[Mapping[str, Any]]:
        for index, call in enumerate(self._calls(answer)):
            yield self._delta({"tool_calls": [{"index": index, **_call(call)}]})

    def _choice(self, answer: Answer) -> Mapping[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._content(answer), "refusal": None}
        if calls := self._calls(answer):
            message |= {"content": message["content"] or None, "tool_calls": [*map(_call, calls)]}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish(answer)}

    def _delta(self, fields: Mapping[str, Any], finish: str | None = None) -> Mapping[str, Any]:
        return {"index": 0, "delta": dict(fields), "logprobs": None, "finish_reason": finish}

    def _text(self, text: str) -> Mapping[str, Any]:
        return {"content": text}


class CompletionReply(_ChoicesReply):
    """A reply of `/v1/completions`."""

    kind = chunk_kind = "text_completion"
    opening = "cmpl-"

    def _choice(self, answer: Answer) -> Mapping[str, Any]:
        return {"index": 0, "text": answer.text, "logprobs": None, "finish_reason": self._finish(answer)}

    def _delta(self, fields: Mapping[str, Any], finish: str | None = None) -> Mapping[str, Any]:
        return {"index": 0, "text": "", "logprobs": None, "finish_reason": finish, **fields}

    def _text(self, text: str) -> Mapping[str, Any]:
        return {"text": text}


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _usage(answer: Answer) -> dict[str, Any]:
    usage = answer.usage
    prompt = usage.slots + usage.prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": usage.generated_tokens,
        "total_tokens": prompt + usage.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.slots},
    }


def told_of_memory(answer: Answer) -> dict[str, Any]:
    """Return what is told of memories: which documents and passages were loaded, and what that took."""
    return {
        "document_ids": list(answer.ids),
        "slots": answer.usage.slots,
        "documents": [asdict(document) for document in answer.usage.documents],
        "sources": [asdict(source) for source in answer.sources],
        "supported": answer.supported,
        "evidence": None if answer.evidence is None else asdict(answer.evidence),
        "time_to_first_token": answer.time_to_first_token,
        "seconds": answer.seconds,
    }
