"""ChatBeaconMemory: a chat model that answers from stored memories."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from operator import itemgetter
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.runnables.config import run_in_executor
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from beacon_memory import Answer, BeaconMemory, InputError
from beacon_memory.generation.background import in_background
from beacon_memory.generation.prompt import require_tools
from beacon_memory.generation.tool_calls import certain_text, chosen_tools

from .language_model import BeaconLanguageModel, response_metadata, usage_metadata
from .messages import to_turns
from .tool_calls import parse_calls, require_call, to_chunks

__all__ = ["ChatBeaconMemory"]

_METHODS = ("function_calling", "json_schema", "json_mode")


class ChatBeaconMemory(BeaconLanguageModel, BaseChatModel, extra="forbid"):
    """A chat model in front of which stored documents are loaded: the prompt holds the conversation only.

        model = ChatBeaconMemory(memory=BeaconMemory("my-store"), max_tokens=64)
        model.invoke("Who pays the rent?", document_ids=["lease"])

    The tokens of loaded documents are counted in `usage_metadata["input_token_details"]["cache_read"]`, and
    `response_metadata` names the documents. Tools need a model whose chat template has a place for them and writes
    calls in a form that is read; for another, a call with tools raises InputError.
    """

    streaming: bool = False

    @property
    def _llm_type(self) -> str:
        return "beacon-memory-chat"

    def own_documents(self, messages: Sequence[BaseMessage], namespace: str) -> list[str]:
        """Return the documents that the model loads by itself in a namespace."""
        if self.document_ids is not None:
            return list(self.document_ids)
        with self.memory.in_namespace(namespace) as memory:
            return [pick.id for pick in memory.pick(to_turns(messages))]

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002  # the base class names it
        **kwargs: Any,
    ) -> ChatResult:
        tools, must_call = _offered(kwargs)
        with self._asked(kwargs) as memory:
            turns, options = self._question(memory, messages, stop, tools, kwargs)
            answer = memory.ask(turns, **options)
        return self._result(answer, tools, must_call)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        if (kwargs.get("num_beams") or self.model_kwargs.get("num_beams") or 1) > 1:  # cannot be streamed
            return await super()._agenerate(messages, stop, run_manager, **kwargs)
        tools, must_call = _offered(kwargs)
        pieces = in_background(lambda: self._pieces(messages, stop, tools, kwargs))  # ends when the task is cancelled
        *_, answer = [piece async for piece in pieces]
        return self._result(answer, tools, must_call)  # type: ignore[arg-type]  # an Answer comes last

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002  # the base class reports the tokens
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        tools, must_call = _offered(kwargs)
        seen = shown = ""
        for piece in self._pieces(messages, stop, tools, kwargs):
            if isinstance(piece, Answer):
                message = self._message(piece, tools, must_call)
                last = AIMessageChunk(
                    content=message.text.removeprefix(shown),
                    tool_call_chunks=to_chunks(message),
                    usage_metadata=message.usage_metadata,
                    response_metadata=message.response_metadata,
                    chunk_position="last",
                )
                yield ChatGenerationChunk(message=last)
                return
            seen += piece
            certain = certain_text(self.memory.model.tokenizer, seen, tools).strip()
            if new := certain.removeprefix(shown):
                shown = certain
                yield ChatGenerationChunk(message=AIMessageChunk(content=new))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002  # the base class reports the tokens
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with aclosing(in_background(lambda: self._stream(messages, stop, **kwargs))) as chunks:
            async for chunk in chunks:
                yield chunk

    def _pieces(
        self, messages: Sequence[BaseMessage], stop: Sequence[str] | None, tools: Sequence[Any], kwargs: dict[str, Any]
    ) -> Iterator[str | Answer]:
        """Iterate over pieces of the answer as they come, and the Answer last."""
        with self._asked(kwargs) as memory:
            turns, options = self._question(memory, messages, stop, tools, kwargs)
            yield from memory.stream(turns, **options)

    def _question(
        self,
        memory: BeaconMemory,
        messages: Sequence[BaseMessage],
        stop: Sequence[str] | None,
        tools: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the conversation to ask, and the options of `BeaconMemory.ask`."""
        if tools:
            require_tools(memory.model)
        turns = to_turns(messages)
        options = {name: value for name, value in kwargs.items() if name != "tool_choice"}
        return turns, self._options(stop, options) | {"tools": tools}

    def _result(self, answer: Answer, tools: Sequence[Mapping[str, Any]], must_call: bool) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._message(answer, tools, must_call))])

    def _message(self, answer: Answer, tools: Sequence[Mapping[str, Any]], must_call: bool) -> AIMessage:
        message = AIMessage(
            answer.text, usage_metadata=usage_metadata(answer), response_metadata=response_metadata(answer, self.model)
        )
        if tools:
            parsed = parse_calls(answer.parts)
            message.content, message.tool_calls = parsed.content, parsed.calls
            message.invalid_tool_calls = parsed.invalid
        return require_call(message, [tool["function"]["name"] for tool in tools]) if must_call else message

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Offer tools to the model.

        tool_choice: "auto", the default; "none"; "any", or a tool's name, for an answer that must call one, or that
        one: there is no way to force the model, so an answer without a call raises OutputParserException.
        """
        formatted = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        chosen_tools(formatted, tool_choice)  # refuses a choice that is none
        return self.bind(tools=formatted, tool_choice=tool_choice, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: str = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """Answer in the form of a schema; an answer in another form raises OutputParserException.

        method: with "json_schema" nothing can be said but JSON of the schema, with "json_mode" nothing but a JSON
        object, so that any model will do; the prompt must ask for what is wanted. "function_calling" offers the schema
        as a tool, to models that call them.
        """
        if kwargs or method not in _METHODS:
            raise InputError(
                f"with_structured_output takes the methods {', '.join(_METHODS)}, got {method!r}, {kwargs}"
            )
        tool = convert_to_openai_tool(schema, strict=True if method == "json_schema" else strict)
        name = tool["function"]["name"]
        traced: dict[str, Any] = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": schema}}
        checked: Any = schema if isinstance(schema, type) and is_basemodel_subclass(schema) else None
        model: Runnable[LanguageModelInput, AIMessage]
        parser: Runnable[Any, Any]
        if method != "function_calling":
            form = {"type": "object"} if method == "json_mode" else tool["function"]["parameters"]
            model = self.bind(schema=form, **traced)
            read: Any = PydanticOutputParser(pydantic_object=checked) if checked else JsonOutputParser()
            parser = RunnableLambda(_require_whole) | read
        else:
            model = self.bind_tools([tool], **traced)
            called: Runnable[AIMessage, AIMessage] = RunnableLambda(lambda message: require_call(message, [name]))
            if checked:
                parser = called | PydanticToolsParser(tools=[checked], first_tool_only=True)
            else:
                parser = called | JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        if not include_raw:
            return model | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | parsed.with_fallbacks([failed], exception_key="parsing_error")

    async def agenerate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Answer as the base class does; a model that is not loaded yet is loaded in a thread."""
        await run_in_executor(None, lambda: self.memory.model)
        return await super().agenerate(*args, **kwargs)

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Return the key of LangChain's cache of answers: it changes with the model and each version of a document."""
        ids = kwargs.get("document_ids", self.document_ids)
        with self._asked(kwargs) as memory:
            fingerprint = memory.model.fingerprint.digest
            if ids is None:  # what the search finds may change with any document
                loaded = [secrets.token_hex(16)]
            else:
                loaded = [memory.store.row(id, fingerprint).root for id in ([ids] if isinstance(ids, str) else ids)]
        return f"{super()._get_llm_string(stop=stop, **kwargs)}---{fingerprint}---{loaded}"


def _require_whole(message: AIMessage) -> AIMessage:
    """Return a message whose text is JSON; raises OutputParserException, for parsers complete what was cut off."""
    try:
        json.loads(message.text)
    except ValueError as error:
        raise OutputParserException(
            f"the answer is no whole JSON ({error}); max_tokens cuts off what is longer", llm_output=message.text
        ) from error
    return message


def _offered(kwargs: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], bool]:
    """Return the tools of a call, and whether one of them has to be called."""
    tools = [convert_to_openai_tool(tool) for tool in kwargs.get("tools") or ()]
    return chosen_tools(tools, kwargs.get("tool_choice"))
