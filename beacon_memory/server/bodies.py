"""Bodies of requests for answers, as OpenAI's clients send them, and what they come to as questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from beacon_memory.errors import InputError
from beacon_memory.generation.options import DEFAULT_MAX_NEW_TOKENS
from beacon_memory.generation.prompt import require_tools
from beacon_memory.generation.tool_calls import call_of_turn, chosen_tools
from beacon_memory.memory import BeaconMemory
from beacon_memory.picking import DEFAULT_LIMIT
from beacon_memory.question import Question

from .refusals import RefusedError

__all__ = ["AnswerOptions", "ChatBody", "CompletionBody", "MemoryOptions", "ToolQuestion"]

# OpenAI's options that change nothing here: they are about accounts, caches and service.
_IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
_UNMET: Mapping[str, Sequence[object]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "suffix": ("",),
    "reasoning_effort": ("none",),
    "modalities": (["text"],),
}


class TextPart(BaseModel):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """A function that was called; its arguments are JSON."""

    name: str
    arguments: str


class Call(BaseModel):
    """A call of a tool in a message of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """A turn of a conversation; what else clients send with it is not read."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    def turn(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            turn["tool_calls"] = [_called(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn


class OfferedFunction(BaseModel):
    """A function that the model may call."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: OfferedFunction


class NamedFunction(BaseModel):
    """The name of a function."""

    name: str


class NamedTool(BaseModel):
    """A tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class NamedSchema(BaseModel):
    """A JSON schema; its name and description are not read, and `strict` is always met."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, JsonValue], Field(alias="schema", default_factory=dict)]


class TextFormat(BaseModel):
    """An answer in any form."""

    type: Literal["text"]


class ObjectFormat(BaseModel):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class SchemaFormat(BaseModel):
    """An answer that is JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class MemoryOptions(BaseModel):
    """Options for memories, beside those of OpenAI."""

    document_ids: Annotated[
        list[str] | None,
        Field(description="Documents to answer from. Left out, they are found by the question; [] means none."),
    ] = None
    budget: Annotated[
        int | str | None,
        Field(description="How much of their memories is loaded: slots (500), bytes (64MB), or a ratio (x16)."),
    ] = None
    limit: Annotated[int, Field(ge=1, le=100, description="Without document_ids: how many may be found.")] = (
        DEFAULT_LIMIT
    )
    abstain: Annotated[
        bool, Field(description="Whether to say that it is not in memory rather than give an unsupported answer.")
    ] = False


class AnswerOptions(MemoryOptions):
    """Options that all requests for answers share.

    unmet: those that would change an answer, and cannot be met, with the values that ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    unmet: ClassVar[Mapping[str, Sequence[object]]] = _UNMET

    model: Annotated[str, Field(description="The name that /v1/models has, or beacon-memory.")]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    min_tokens: Annotated[int | None, Field(ge=0, description="Tokens before which the answer may not end.")] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_not_met(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, nothing in cls.unmet.items():
            if body.get(name) not in (None, *nothing):
                raise ValueError(f"{name}={json.dumps(body[name])[:100]} is not supported by this server; leave it out")
        return {name: value for name, value in body.items() if name not in (*_IGNORED, *cls.unmet)}

    @property
    def longest(self) -> int:
        """The most tokens that the answer may have."""
        return self.max_tokens or DEFAULT_MAX_NEW_TOKENS

    def question(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> Question:
        """Return the question that a conversation asks with these options."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.min_tokens:
            if self.min_tokens > self.longest:
                raise InputError(f"min_tokens={self.min_tokens} is more than the answer may have, {self.longest}")
            options["min_new_tokens"] = self.min_tokens
        return Question(
            messages,
            self.document_ids,
            self.budget,
            abstain=self.abstain,
            limit=self.limit,
            stop=self.stop or None,
            seed=self.seed,
            options={"max_new_tokens": self.longest, **options},
            **more,
        )


class ToolQuestion:
    """A question with the tools that it offers, and whether one of them has to be called."""

    def __init__(self, question: Question, tools: Sequence[Mapping[str, Any]] = (), must_call: bool = False) -> None:
        self.question, self.tools, self.must_call = question, tools, must_call


class ChatBody(AnswerOptions):
    """The body of a request for a chat's next turn."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    response_format: Annotated[
        TextFormat | ObjectFormat | SchemaFormat | None,
        Field(discriminator="type", description="What form the answer has; with JSON, neither tools nor abstain."),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, JsonValue] | None,
        Field(description='Options of the model\'s chat template, such as {"enable_thinking": false}.'),
    ] = None

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    def asked(self, memory: BeaconMemory) -> ToolQuestion:
        """Return what is asked; raises InputError for tools that the model cannot call."""
        offered = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        choice = self.tool_choice.model_dump() if isinstance(self.tool_choice, NamedTool) else self.tool_choice
        tools, must_call = chosen_tools(offered, choice)
        if tools:
            require_tools(memory.model)
        turns = [message.turn() for message in self.messages]
        how = {"tools": tools, "schema": self._schema(), "chat_template_kwargs": self.chat_template_kwargs}
        return ToolQuestion(self.question(turns, **how), tools, must_call)

    def _schema(self) -> dict[str, Any] | None:
        """Return the schema that the answer has to meet."""
        match self.response_format:
            case ObjectFormat():
                return {"type": "object"}
            case SchemaFormat(json_schema=named):
                return named.schema_
        return None


class CompletionBody(AnswerOptions):
    """The body of a request for a completion: its prompt is asked as a user's turn."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]

    def asked(self, _memory: BeaconMemory) -> ToolQuestion:
        """Return what is asked."""
        prompt = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return ToolQuestion(self.question([{"role": "user", "content": prompt}]))


def _called(call: Call) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        raise RefusedError(
            400, "invalid_request", f"the arguments of the call {call.id[:100]!r} are no JSON", param="messages"
        ) from None
    return call_of_turn(call.id, call.function.name, arguments)
