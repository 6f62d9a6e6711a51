"""BeaconSynthesizer: answers from the memories of nodes, instead of their texts in a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.llms.llm import astream_chat_response_to_tokens, stream_chat_response_to_tokens
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import NodeWithScore, QueryType
from llama_index.core.types import RESPONSE_TEXT_TYPE

from beacon_memory import DocumentNotFoundError, InputError

from . import nodes as of_nodes
from .llm import BeaconMemoryLLM

__all__ = ["BeaconSynthesizer"]

_QUESTION = PromptTemplate("{query_str}")


class BeaconSynthesizer(BaseSynthesizer):
    """Answer a question behind the memories of the documents that nodes belong to.

    The nodes' texts are never put into the prompt; the nodes are kept as `source_nodes`.

    llm:              also decides in which store and namespace documents are looked for.
    text_qa_template: the prompt, with `query_str`; by default the question alone.
    streaming:        whether to answer in pieces. kwargs: as for `BaseSynthesizer`.
    """

    def __init__(
        self,
        llm: BeaconMemoryLLM,
        *,
        text_qa_template: BasePromptTemplate | None = None,
        streaming: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(llm, BeaconMemoryLLM):
            raise InputError(f"llm must be a BeaconMemoryLLM, which can load memories, got {type(llm).__name__}")
        super().__init__(llm=llm, streaming=streaming, **kwargs)
        self._beacon_llm = llm
        self._text_qa_template = text_qa_template or _QUESTION

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._text_qa_template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        if "text_qa_template" in prompts:
            self._text_qa_template = prompts["text_qa_template"]

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer from the memories of nodes; raises DocumentNotFoundError for one without."""
        ids = self._document_ids(nodes)
        return super().synthesize(query, nodes, additional_source_nodes, document_ids=ids, **response_kwargs)

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer from the memories of nodes without blocking the event loop."""
        ids = await asyncio.to_thread(self._document_ids, nodes)
        return await super().asynthesize(query, nodes, additional_source_nodes, document_ids=ids, **response_kwargs)

    def get_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],  # noqa: ARG002  # the framework passes it
        document_ids: Sequence[str] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """Answer a question from documents; called by `synthesize`, with texts that are not used."""
        asked, options = self._asked(query_str, document_ids, response_kwargs)
        if self._streaming:
            return stream_chat_response_to_tokens(self._beacon_llm.stream_chat(asked, **options))
        return self._beacon_llm.chat(asked, **options).message.content or self._empty_response

    async def aget_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],  # noqa: ARG002  # the framework passes it
        document_ids: Sequence[str] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """Answer a question from documents; called by `asynthesize`, with texts that are not used."""
        asked, options = self._asked(query_str, document_ids, response_kwargs)
        if self._streaming:
            return await astream_chat_response_to_tokens(await self._beacon_llm.astream_chat(asked, **options))
        return (await self._beacon_llm.achat(asked, **options)).message.content or self._empty_response

    def _asked(
        self, query: str, ids: Sequence[str] | None, response_kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        if ids is None:
            raise InputError("texts alone have no memory to answer from; call synthesize with nodes")
        prompt = self._text_qa_template.format_messages(llm=self._beacon_llm, query_str=query)
        return self._beacon_llm._extend_messages(prompt), {**response_kwargs, "document_ids": list(ids)}

    def _document_ids(self, nodes: Sequence[NodeWithScore]) -> list[str]:
        """Return the ids of the documents of nodes, each once."""
        return list(dict.fromkeys(self._document_id(one) for one in nodes))

    def _document_id(self, found: NodeWithScore) -> str:
        id = of_nodes.document_id(self._beacon_llm.memory, found.node)
        if id is None:
            raise DocumentNotFoundError(
                f"node {found.node.node_id!r} has no memory in the store and namespace of the model; run its document "
                "through a BeaconCompressionTransform"
            )
        return id
