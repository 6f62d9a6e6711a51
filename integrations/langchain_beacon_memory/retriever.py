"""BeaconMemoryRetriever: which stored documents a question is about."""

from __future__ import annotations

from collections.abc import Iterable

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field

from beacon_memory import BeaconMemory, InputError
from beacon_memory.picking import DEFAULT_LIMIT, excerpts, fitting

__all__ = ["BeaconMemoryRetriever"]


class BeaconMemoryRetriever(BaseRetriever):
    """Find the documents that `BeaconMemory.ask` would answer a question from; each comes as its best passage.

        retriever = BeaconMemoryRetriever(memory=memory)                                     # the memory's picker
        retriever = BeaconMemoryRetriever(memory=memory, inner=vector_store.as_retriever())  # your own

    The metadata of each carries the id of the stored document under `id_key`, so that a chain hands ids to the model
    instead of texts. With the memory's picker it also has the `score` of the passage, which are the characters `start`
    to `stop` of the document.

    memory, namespace: where the documents are. k: how many of them.
    inner:  a retriever whose documents have the id in their metadata under `id_key`; several chunks of one document
            count once. An id that is not stored in the namespace raises DocumentNotFoundError: nothing that an index
            holds leads to another namespace.
    max_slots: memory slots that all of them together may take; those that do not fit beside better ones are left out.
            A chain or middleware does that by itself: it knows the question and the model's positions.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    memory: BeaconMemory = Field(exclude=True, repr=False)
    namespace: str | None = None
    inner: BaseRetriever | None = None
    id_key: str = "document_id"
    k: int = Field(default=DEFAULT_LIMIT, ge=1)
    max_slots: int | None = None

    @property
    def searched(self) -> str:
        """The namespace that it looks in."""
        return self.memory.store.namespace if self.namespace is None else self.namespace

    def ids(self, documents: Iterable[Document]) -> list[str]:
        """Return the ids of found documents, for the model."""
        return [document.metadata[self.id_key] for document in documents]

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        if self.inner is None:
            return self._picked(query, k)
        return self._checked(self.inner.invoke(query, {"callbacks": run_manager.get_child()}), k)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        if self.inner is None:
            return await run_in_executor(None, self._picked, query, k)
        found = await self.inner.ainvoke(query, {"callbacks": run_manager.get_child()})
        return await run_in_executor(None, self._checked, found, k)

    def _picked(self, query: str, k: int | None) -> list[Document]:
        with self.memory.in_namespace(self.namespace) as memory:
            picks = memory.pick(query, self._count(k), self.max_slots)
            return [
                Document(
                    text,
                    metadata={
                        **pick.row.metadata,
                        "start": pick.best.start,
                        "stop": pick.best.stop,
                        "score": pick.best.score,
                        self.id_key: pick.id,
                    },
                )
                for pick, text in excerpts(memory.store, picks)
            ]

    def _checked(self, found: Iterable[Document], k: int | None) -> list[Document]:
        """Return the first document of each id that another retriever found; raises for what is not stored."""
        documents: dict[str, Document] = {}
        for document in found:
            id = document.metadata.get(self.id_key)
            if not isinstance(id, str):
                raise InputError(
                    f"the inner retriever found a document whose metadata has no text under {self.id_key!r}: "
                    f"{document.metadata!r}; give each the id under which the memory stores it, or set id_key"
                )
            documents.setdefault(id, document)
        with self.memory.in_namespace(self.namespace) as memory:
            rows = [memory.show(id) for id in documents][: self._count(k)]
        if self.max_slots is not None:
            rows = fitting(rows, self.max_slots)
        return [documents[row.id] for row in rows]

    def _count(self, k: int | None) -> int:
        count = self.k if k is None else k
        if count < 1:
            raise InputError(f"k={k} must be at least 1")
        return count
