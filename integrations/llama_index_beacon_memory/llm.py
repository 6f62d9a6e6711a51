"""BeaconMemoryLLM: a local model in front of which stored documents and conversations are loaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from llama_index.core.base.llms.generic_utils import (
    achat_to_completion_decorator,
    astream_chat_to_completion_decorator,
    chat_to_completion_decorator,
    stream_chat_to_completion_decorator,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    ToolCallBlock,
)
from llama_index.core.bridge.pydantic import Field
from llama_index.core.constants import DEFAULT_NUM_OUTPUTS
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection

from beacon_memory import Answer, BeaconMemory, InputError
from beacon_memory.generation.prompt import takes_tools
from beacon_memory.generation.tool_calls import chosen_tools

from .call import Call
from .component import MemoryComponent
from .handles import redeem_all
from .responses import SoFar, to_response
from .tool_calls import arguments_of

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool

__all__ = ["BeaconMemoryLLM"]


class BeaconMemoryLLM(MemoryComponent, FunctionCallingLLM):
    """A local model that answers behind the memories of stored documents.

    Everything runs in this process. Each of `document_ids`, `namespace`, `budget`, `abstain`, `temperature`,
    `max_tokens`, `seed` and `stop` may be given with a call, too, and so may other options of transformers' `generate`.
    They only ever come from the program: nothing in the text or the metadata of a message can name a document or a
    namespace.

    It calls tools if the chat template of its model has a place for them (`metadata.is_function_calling_model`).

    ```python
    llm = BeaconMemoryLLM("my-store", document_ids=["lease"])
    llm.memory.add("lease", "The rent of the mill is paid by Ada Flint.")
    llm.chat([ChatMessage("Who pays the rent?")])
    ```
    """

    document_ids: list[str] | None = Field(
        default_factory=list,
        description="Documents to answer from, loaded in this order; None finds some for the last question.",
    )
    budget: int | str | None = Field(
        default=None, description="How much of their memories is loaded, where the question is: see BeaconMemory.ask."
    )
    abstain: bool = Field(
        default=False, description="Whether to answer that it is not in memory where an answer is not supported."
    )
    temperature: float = Field(default=0.0, ge=0, description="Of sampling; 0 takes the likeliest token.")
    max_tokens: int = Field(default=DEFAULT_NUM_OUTPUTS, gt=0, description="Tokens that an answer may have.")
    seed: int | None = Field(default=None, description="Of sampling.")
    stop: list[str] | None = Field(default=None, description="Strings at which an answer ends.")
    generate_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further options of transformers' generate."
    )

    def __init__(
        self, store: str | os.PathLike[str] | None = None, *, memory: BeaconMemory | None = None, **fields: Any
    ) -> None:
        super().__init__(store, memory=memory, **fields)

    @classmethod
    def class_name(cls) -> str:
        """Return its name in written form."""
        return "BeaconMemoryLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """The abilities and limits of the model, which is loaded for that."""
        model = self._memory.model
        return LLMMetadata(
            context_window=model.max_positions,
            num_output=self.max_tokens,
            is_chat_model=model.tokenizer.chat_template is not None,
            is_function_calling_model=takes_tools(model),
            model_name=str(model.base.config.name_or_path) or self.class_name(),
        )

    def to_payload(self) -> dict[str, Any]:
        """Return the fields that events say of it; does not load the model, which would hold up an event loop."""
        names = ("model", "adapter", "temperature", "max_tokens", "seed", "stop")
        return {"class_name": self.class_name(), **{name: getattr(self, name) for name in names}}

    def within(self, namespace: str) -> Self:
        """Return the same model in another namespace of the store."""
        other = self.model_copy(update={"namespace": namespace})
        other._memory = self._memory.within(namespace)
        return other

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        return self._chat(messages, **kwargs)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation in pieces; the last one says what the answer rests on."""
        return self._stream_chat(messages, **kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation in a thread; cancelled, it stops at the next token."""
        return await self._achat(messages, **kwargs)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Answer a conversation in pieces, in a thread; closed or cancelled, it stops at the next token."""
        return await self._astream_chat(messages, **kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt, as the one message of a user: the models behind it are chat models."""
        return chat_to_completion_decorator(self._chat)(self._prompt(prompt, formatted), **kwargs)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer a prompt in pieces, see `complete` and `stream_chat`."""
        return stream_chat_to_completion_decorator(self._stream_chat)(self._prompt(prompt, formatted), **kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt in a thread, see `complete` and `achat`."""
        return await achat_to_completion_decorator(self._achat)(self._prompt(prompt, formatted), **kwargs)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Answer a prompt in pieces, in a thread, see `complete` and `astream_chat`."""
        answer = astream_chat_to_completion_decorator(self._astream_chat)
        return await answer(self._prompt(prompt, formatted), **kwargs)

    def get_tool_calls_from_response(
        self,
        response: ChatResponse,
        error_on_no_tool_call: bool = True,
        **kwargs: Any,  # noqa: ARG002  # the framework passes it
    ) -> list[ToolSelection]:
        """Return the tool calls of an answer; raises ValueError if it has none, unless told otherwise."""
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if error_on_no_tool_call and not calls:
            raise ValueError(f"the model called no tool, but answered {response.message.content!r}")
        return [
            ToolSelection(tool_id=call.tool_call_id or "", tool_name=call.tool_name, tool_kwargs=arguments_of(call))
            for call in calls
        ]

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,  # noqa: ARG002  # the framework passes it
        allow_parallel_tool_calls: bool = False,  # noqa: ARG002  # seen to in what comes out
        tool_required: bool = False,  # noqa: ARG002  # a local model cannot be forced
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `chat` for a call with tools."""
        asked = ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg
        schemas = [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools]
        messages = [*(chat_history or []), *([asked] if asked else [])]
        return {"messages": messages, "tools": chosen_tools(schemas, tool_choice)[0], **kwargs}

    def _validate_chat_with_tools_response(
        self,
        response: ChatResponse,
        tools: Sequence[BaseTool],  # noqa: ARG002  # the framework passes it
        allow_parallel_tool_calls: bool = False,
        **kwargs: Any,  # noqa: ARG002  # the framework passes it
    ) -> ChatResponse:
        if not allow_parallel_tool_calls:
            message = response.message
            calls = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
            message.blocks = [block for block in message.blocks if block not in calls[1:]]
            message.additional_kwargs |= {"tool_calls": message.additional_kwargs["tool_calls"][:1]} if calls else {}
        return response

    def _chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        call = self._call(messages, kwargs)
        return to_response(call.ask())

    def _stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        call = self._call(messages, kwargs)
        pieces = call.stream()

        def responses() -> ChatResponseGen:
            so_far = SoFar(call.certain)
            for piece in pieces:
                yield from so_far.add(piece)

        return responses()

    async def _achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        call = self._call(messages, kwargs)
        async with contextlib.aclosing(call.astream()) as pieces:
            async for piece in pieces:
                if isinstance(piece, Answer):
                    return to_response(piece)
        raise AssertionError("a stream ends with an Answer")

    async def _astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        call = self._call(messages, kwargs)

        async def responses() -> ChatResponseAsyncGen:
            so_far = SoFar(call.certain)
            async with contextlib.aclosing(call.astream()) as pieces:
                async for piece in pieces:
                    for response in so_far.add(piece):
                        yield response

        return responses()

    def _prompt(self, prompt: str, formatted: bool) -> str:
        return prompt if formatted or self.completion_to_prompt is None else self.completion_to_prompt(prompt)

    def _call(self, messages: Sequence[ChatMessage], given: Mapping[str, Any]) -> Call:
        names = ("document_ids", "budget", "abstain", "temperature", "max_tokens", "seed", "stop")
        own_options = self.generate_kwargs | {name: getattr(self, name) for name in names}
        meant = {name: value for name, value in given.items() if value is not None or name == "document_ids"}
        options = own_options | meant
        namespace = options.pop("namespace", self.namespace)
        ids = options.pop("document_ids")
        if isinstance(ids, str):
            raise InputError(f"document_ids={ids!r} must be a list of ids; write [{ids!r}]")
        options["max_new_tokens"] = options.pop("max_tokens")
        options["tools"] = options.get("tools") or ()
        conversations = redeem_all(self._memory.store, namespace, messages)
        return Call(self._memory, namespace, messages, ids, conversations, options)
