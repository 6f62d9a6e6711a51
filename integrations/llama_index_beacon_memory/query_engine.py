"""BeaconQueryEngine: a retriever and a synthesizer on one store."""

from __future__ import annotations

from typing import Any, Self

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine

from .llm import BeaconMemoryLLM
from .retriever import BeaconRetriever
from .synthesizer import BeaconSynthesizer
from .transform import BeaconCompressionTransform

__all__ = ["BeaconQueryEngine"]


class BeaconQueryEngine(RetrieverQueryEngine):
    """Answer questions from the compressed documents of a store; make one with `from_llm`.

    `source_nodes` of an answer are the nodes of the documents that it rests on.
    """

    @classmethod
    def from_llm(
        cls,
        llm: BeaconMemoryLLM,
        *,
        similarity_top_k: int = 3,
        retriever: BaseRetriever | None = None,
        transform: BeaconCompressionTransform | None = None,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        text_qa_template: BasePromptTemplate | None = None,
        streaming: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Make an engine on the store and namespace of a model.

        retriever: by default the picker of the model's memory; transform, similarity_top_k: see `BeaconRetriever`.
        """
        if not isinstance(retriever, BeaconRetriever):
            retriever = BeaconRetriever(
                llm.memory,
                similarity_top_k,
                retriever=retriever,
                transform=transform,
            )
        synthesizer = BeaconSynthesizer(llm, text_qa_template=text_qa_template, streaming=streaming)
        return cls(retriever, synthesizer, node_postprocessors=node_postprocessors, **kwargs)
