"""A chain that hands ids of documents to the model, where others paste chunks into the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.documents import Document
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda

from beacon_memory.picking import last_question

from .chat_model import ChatBeaconMemory
from .messages import to_turns
from .retriever import BeaconMemoryRetriever

__all__ = ["create_memory_chain"]


def create_memory_chain(
    model: ChatBeaconMemory, retriever: BaseRetriever | None = None
) -> Runnable[LanguageModelInput, AIMessage]:
    """Chain question -> retriever -> ids -> model.

    The input is a question or a conversation, or what a prompt template in front makes of it; the output is the model's
    message. retriever: by default the picker of the model's memory; one of your own must have the documents' ids in its
    metadata, see `BeaconMemoryRetriever`, which it is made part of. If nothing is found, the model answers
    without a document.

        create_memory_chain(ChatBeaconMemory(memory=memory)).invoke("Who pays the rent?")
    """
    if not isinstance(retriever, BeaconMemoryRetriever):
        retriever = BeaconMemoryRetriever(memory=model.memory, namespace=model.namespace, inner=retriever)
    chain = _MemoryChain(model, retriever)
    return RunnableLambda(chain.answer, chain.answer_async, name="memory_chain")


@dataclass(frozen=True)
class _MemoryChain:
    """The steps of a chain. They are methods, so that a chain can be pickled."""

    model: ChatBeaconMemory
    finder: BeaconMemoryRetriever

    def answer(self, asked: Any, config: RunnableConfig) -> Any:
        return self._behind(self.finder.invoke(self._query(asked), config))

    async def answer_async(self, asked: Any, config: RunnableConfig) -> Any:
        return self._behind(await self.finder.ainvoke(self._query(asked), config))

    def _query(self, asked: LanguageModelInput) -> str:
        return last_question(to_turns(self.model._convert_input(asked).to_messages()))

    def _behind(self, documents: Sequence[Document]) -> Runnable[LanguageModelInput, AIMessage]:
        ids = self.finder.ids(documents)
        return self.model.bind(document_ids=ids, namespace=self.finder.searched)
