"""OpenAI's Responses: requests of that form as chats, and answers in that form, whole and as typed events.

No response is kept, so none can be gone on from by its id: `input` has all turns of a conversation.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from beacon_memory.memory import BeaconMemory
from beacon_memory.results import Answer, ToolCall

from .bodies import AnswerOptions, ChatBody, ObjectFormat, OfferedFunction, TextFormat, ToolQuestion
from .replies import Reply, told_of_memory

__all__ = ["ResponseReply", "ResponsesBody"]

# What a response repeats of its request, and what stands there of what was left out.
_REPEATED = ("instructions", "max_output_tokens", "temperature", "top_p")
_ASKED: Mapping[str, Any] = {"text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": []}


class TextPiece(BaseModel):
    """A part of a message that is text."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class MessageItem(BaseModel):
    """A turn of a conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPiece]


class CallItem(BaseModel):
    """A call that the model has made; its arguments are JSON."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class ResultItem(BaseModel):
    """A result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPiece]


class SchemaFormat(BaseModel):
    """An answer that is JSON of a schema; name, description and `strict` are not read."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class TextOptions(BaseModel):
    """The form of the answer."""

    format: Annotated[TextFormat | ObjectFormat | SchemaFormat | None, Field(discriminator="type")] = None


class ResponseTool(OfferedFunction):
    """A function that the model may call."""

    type: Literal["function"]


class ChosenTool(BaseModel):
    """A function that has to be called."""

    type: Literal["function"]
    name: str


class ResponsesBody(AnswerOptions):
    """The body of a request for a response."""

    unmet: ClassVar[Mapping[str, Sequence[object]]] = {
        **AnswerOptions.unmet,
        "background": (False,),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({}, {"effort": "none"}),
        "truncation": ("disabled",),
    }

    input: Annotated[
        str | Annotated[list[MessageItem | CallItem | ResultItem], Field(min_length=1)],
        Field(description="A question, or the turns of a conversation."),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    text: TextOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def asked(self, memory: BeaconMemory) -> ToolQuestion:
        """Return what is asked; raises InputError for tools that the model cannot call."""
        shared = self.model_dump(include={*AnswerOptions.model_fields}, exclude_none=True)
        chat = {
            **shared,
            "messages": [*self._turns()],
            "max_completion_tokens": self.max_output_tokens,
            "tools": [_as_of_chats(tool.model_dump()) for tool in self.tools or ()] or None,
            "tool_choice": _as_of_chats(self.tool_choice.model_dump())
            if isinstance(self.tool_choice, ChosenTool)
            else self.tool_choice,
            "response_format": self._format(),
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return ChatBody.model_validate(chat).asked(memory)

    def _turns(self) -> Iterator[dict[str, Any]]:
        """Yield the turns as those of a chat, where calls that follow each other are of one turn."""
        if self.instructions:
            yield {"role": "system", "content": self.instructions}
        calls: list[dict[str, Any]] = []
        for item in [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input:
            if isinstance(item, CallItem):
                function = {"name": item.name, "arguments": item.arguments}
                calls.append({"id": item.call_id, "type": "function", "function": function})
                continue
            if calls:
                yield {"role": "assistant", "content": None, "tool_calls": calls}
                calls = []
            if isinstance(item, ResultItem):
                yield {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
            else:
                yield {"role": item.role, "content": _text(item.content)}
        if calls:
            yield {"role": "assistant", "content": None, "tool_calls": calls}

    def _format(self) -> dict[str, Any] | None:
        wanted = None if self.text is None else self.text.format
        if isinstance(wanted, SchemaFormat):
            return {"type": "json_schema", "json_schema": {"schema": wanted.schema_}}
        return None if wanted is None else wanted.model_dump()


class ResponseReply(Reply):
    """A reply of `/v1/responses`: its output is a message, and the calls that were made."""

    def __init__(self, body: ResponsesBody, model: str, asked: ToolQuestion, tokenizer: Any) -> None:
        super().__init__(model, asked, tokenizer)
        self._body = body
        self._id, self._message_id = (f"{kind}_{secrets.token_hex(12)}" for kind in ("resp", "msg"))
        self._created = int(time.time())

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the response with all of its output."""
        state = "completed" if answer.ended else "incomplete"
        return self._response(state, self._output(answer), answer)

    async def chunks(
        self,
        pieces: AsyncIterator[str | Answer],
        *,
        include_usage: bool,  # noqa: ARG002  # the last event has it
    ) -> AsyncIterator[Mapping[str, Any]]:
        """Yield the events of a stream."""
        number = 0

        def event(kind: str, **fields: Any) -> dict[str, Any]:
            nonlocal number
            number += 1
            return {"type": f"response.{kind}", "sequence_number": number - 1, **fields}

        begun = self._response("in_progress", [])
        yield event("created", response=begun)
        yield event("in_progress", response=begun)
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        said = None
        async for piece in self._texts(pieces):
            if said is None and (isinstance(piece, str) or not self._calls(piece)):
                yield event("output_item.added", output_index=0, item=self._message("", "in_progress"))
                yield event("content_part.added", **place, part=_part(""))
                said = ""
            if isinstance(piece, str):
                said = (said or "") + piece
                yield event("output_text.delta", **place, delta=piece, logprobs=[])
                continue
            output = self._output(piece)
            if said is not None:
                yield event("output_text.done", **place, text=said, logprobs=[])
                yield event("content_part.done", **place, part=_part(said))
                yield event("output_item.done", output_index=0, item=output[0])
            for index, item in enumerate(output):
                if item["type"] == "function_call":
                    arguments, place_of_call = item["arguments"], {"item_id": item["id"], "output_index": index}
                    opened = {**item, "arguments": "", "status": "in_progress"}
                    yield event("output_item.added", output_index=index, item=opened)
                    yield event("function_call_arguments.delta", **place_of_call, delta=arguments)
                    yield event("function_call_arguments.done", **place_of_call, name=item["name"], arguments=arguments)
                    yield event("output_item.done", output_index=index, item=item)
            whole = self.whole(piece)
            yield event(whole["status"], response=whole)

    def event(self, chunk: Mapping[str, Any]) -> str:
        """Return an event under its name."""
        return f"event: {chunk['type']}\n{super().event(chunk)}"

    def _response(
        self, status: str, output: Sequence[Mapping[str, Any]], answer: Answer | None = None
    ) -> dict[str, Any]:
        asked = self._body.model_dump(include={*_ASKED, *_REPEATED}, by_alias=True)
        asked |= {name: asked[name] or unsaid for name, unsaid in _ASKED.items()}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._model,
            "output": list(output),
            "parallel_tool_calls": True,
            "previous_response_id": None,
            **asked,
            "usage": None if answer is None else _usage(answer),
            "memory": None if answer is None else told_of_memory(answer),
        }

    def _output(self, answer: Answer) -> list[dict[str, Any]]:
        calls, text = self._calls(answer), self._content(answer)
        state = "completed" if answer.ended else "incomplete"
        message = [self._message(text, state)] if text or not calls else []
        return [*message, *map(_call, calls)]

    def _message(self, text: str, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [_part(text)]
        return {"id": self._message_id, "type": "message", "status": status, "role": "assistant", "content": content}


def _as_of_chats(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool, or the choice of one, as chats have it."""
    return {"type": tool.pop("type"), "function": tool}


def _text(content: str | Sequence[TextPiece]) -> str:
    return content if isinstance(content, str) else "".join(piece.text for piece in content)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"fc_{call.id.rpartition('_')[2]}",
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.name,
        "arguments": json.dumps(call.arguments, ensure_ascii=False),
    }


def _usage(answer: Answer) -> dict[str, Any]:
    usage = answer.usage
    read = usage.slots + usage.prompt_tokens
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": usage.slots, "cache_write_tokens": 0},
        "output_tokens": usage.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + usage.generated_tokens,
    }
