"""BeaconRetriever: the nodes of a question whose memories are in the store."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import BaseNode, NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode

from beacon_memory import BeaconMemory, DocumentNotFoundError, InputError
from beacon_memory.picking import DEFAULT_LIMIT, Pick, excerpts, fitting

from . import nodes as of_nodes
from .transform import BeaconCompressionTransform

__all__ = ["BeaconRetriever"]


class BeaconRetriever(BaseRetriever):
    """Find the documents that `BeaconMemory.ask` would answer a question from, or those of another retriever.

    memory:           the store and namespace to look in, and no other.
    similarity_top_k: documents to return at most; another retriever decides that itself.
    retriever:        finds nodes in its own way, for example by embeddings.
    transform:        compresses nodes of that retriever which are not in the store; without it they are an error.
    max_slots:        memory slots that all documents together may take; those that do not fit beside better ones are
                      left out. `BeaconSynthesizer` does that by itself: it knows the prompt and the model's positions.

    By the memory's picker, there is one node for each document, with its id and the text of its best passage.
    """

    def __init__(
        self,
        memory: BeaconMemory,
        similarity_top_k: int = DEFAULT_LIMIT,
        *,
        retriever: BaseRetriever | None = None,
        transform: BeaconCompressionTransform | None = None,
        max_slots: int | None = None,
        **kwargs: Any,
    ) -> None:
        if similarity_top_k < 1:
            raise InputError(f"similarity_top_k={similarity_top_k} must be at least 1")
        if transform is not None and (transform.memory.store.place, transform.memory.store.namespace) != (
            memory.store.place,
            memory.store.namespace,
        ):
            raise InputError("the transform compresses into another store or namespace than the retriever's memory")
        self._memory = memory
        self._similarity_top_k = similarity_top_k
        self._inner = retriever
        self._transform = transform
        self._max_slots = max_slots
        super().__init__(**kwargs)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._inner is None:
            return self._picked(query_bundle.query_str)
        return self._with_documents(self._inner.retrieve(query_bundle))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if self._inner is None:
            return await asyncio.to_thread(self._picked, query_bundle.query_str)
        return await asyncio.to_thread(self._with_documents, await self._inner.aretrieve(query_bundle))

    def _picked(self, query: str) -> list[NodeWithScore]:
        picks = self._memory.pick(query, self._similarity_top_k, self._max_slots)
        read = excerpts(self._memory.store, picks)
        return [NodeWithScore(node=_node(pick, text), score=pick.best.score) for pick, text in read]

    def _with_documents(self, found: list[NodeWithScore]) -> list[NodeWithScore]:
        """Return the nodes of another retriever, which must have a memory, as far as their documents fit."""
        missing = [one.node for one in found if of_nodes.document_id(self._memory, one.node) is None]
        if missing and self._transform is not None:
            made = self._transform(missing)
            refused = {node.node_id for node in missing}.difference(node.node_id for node in made)
            found = [one for one in found if one.node.node_id not in refused]
        ids = [self._document_id(one) for one in found]
        if self._max_slots is None:
            return found
        rows = [self._memory.show(id) for id in dict.fromkeys(ids)]
        kept = {row.id for row in fitting(rows, self._max_slots)}
        return [one for one, id in zip(found, ids, strict=True) if id in kept]

    def _document_id(self, found: NodeWithScore) -> str:
        id = of_nodes.document_id(self._memory, found.node)
        if id is None:
            raise DocumentNotFoundError(
                f"node {found.node.node_id!r} has no memory in this store and namespace; run its document through a "
                "BeaconCompressionTransform, or give the retriever one"
            )
        return id


def _node(pick: Pick, text: str) -> BaseNode:
    node = TextNode(
        id_=pick.id,
        text=text,
        metadata=dict(pick.row.metadata),
        start_char_idx=pick.best.start,
        end_char_idx=pick.best.stop,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=pick.id)},
    )
    return of_nodes.marked(node, pick.id)
