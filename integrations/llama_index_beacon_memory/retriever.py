"""BeaconRetriever: the nodes of a question whose memories are in the store."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode

from beacon_memory import BeaconMemory, DocumentNotFoundError, InputError
from beacon_memory.storage.catalog.full_text import PassageHit
from beacon_memory.storage.catalog.rows import DocumentRow

from . import nodes as of_nodes
from .full_text import search
from .transform import BeaconCompressionTransform

__all__ = ["BeaconRetriever"]


class BeaconRetriever(BaseRetriever):
    """Finds documents of a store for a question: by its full text, or by another retriever.

    memory:           the store and namespace to look in, and no other.
    similarity_top_k: documents to return at most; another retriever decides that itself.
    retriever:        finds nodes in its own way, for example by embeddings.
    transform:        compresses nodes of that retriever which are not in the store; without it they are an error.
    max_slots:        memory slots that all documents together may take; those that do not fit beside better ones are
                      left out.

    By full text, there is one node for each document, with the document's id and the text of its best passage.
    """

    def __init__(
        self,
        memory: BeaconMemory,
        similarity_top_k: int = 3,
        *,
        retriever: BaseRetriever | None = None,
        transform: BeaconCompressionTransform | None = None,
        max_slots: int | None = None,
        **kwargs: Any,
    ) -> None:
        if similarity_top_k < 1:
            raise InputError(f"similarity_top_k={similarity_top_k} must be at least 1")
        if transform is not None and transform.memory.store.folder != memory.store.folder:
            raise InputError("the transform compresses into another store or namespace than the retriever's memory")
        self._memory = memory
        self._similarity_top_k = similarity_top_k
        self._inner = retriever
        self._transform = transform
        self._max_slots = max_slots
        super().__init__(**kwargs)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._inner is None:
            return self._by_full_text(query_bundle.query_str)
        return self._with_documents(self._inner.retrieve(query_bundle))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._inner is None:
            return await asyncio.to_thread(self._by_full_text, query_bundle.query_str)
        return await asyncio.to_thread(self._with_documents, await self._inner.aretrieve(query_bundle))

    def _by_full_text(self, query: str) -> list[NodeWithScore]:
        found = search(self._memory, query, self._similarity_top_k, self._max_slots)
        return [NodeWithScore(node=_node(hit, row), score=hit.score) for hit, row in found]

    def _with_documents(self, found: list[NodeWithScore]) -> list[NodeWithScore]:
        """The nodes of another retriever that have a memory, as far as their documents fit."""
        missing = [one.node for one in found if of_nodes.document_id(self._memory, one.node) is None]
        if missing and self._transform is not None:
            self._transform([node.model_copy(deep=True) for node in missing])  # theirs stay as they are
        kept: list[NodeWithScore] = []
        slots: dict[str, int] = {}
        for one in found:
            id = of_nodes.document_id(self._memory, one.node)
            if id is None:
                raise DocumentNotFoundError(
                    f"node {one.node.node_id!r} has no memory in this store and namespace; run its document through a "
                    "BeaconCompressionTransform, or give the retriever one"
                )
            row = self._memory.show(id)
            taken = sum(slots.values()) + (0 if id in slots else row.slots)
            if kept and self._max_slots is not None and taken > self._max_slots:
                continue
            slots[id] = row.slots
            kept.append(one)
        return kept


def _node(hit: PassageHit, row: DocumentRow) -> TextNode:
    node = TextNode(
        id_=hit.document,
        text=hit.text,
        metadata=dict(row.metadata),
        start_char_idx=hit.start,
        end_char_idx=hit.stop,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=hit.document)},
    )
    of_nodes.mark(node, hit.document)
    return node
