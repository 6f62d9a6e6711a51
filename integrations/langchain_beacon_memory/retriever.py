"""BeaconMemoryRetriever: which stored documents a question is about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field

from beacon_memory import BeaconMemory, InputError

from .namespaces import in_namespace

__all__ = ["BeaconMemoryRetriever"]

_HITS = 50  # passages to look at for k documents


class BeaconMemoryRetriever(BaseRetriever):
    """Finds documents whose memory can answer a question; each comes as its best passage, best first.

        retriever = BeaconMemoryRetriever(memory=memory)                                     # full-text search
        retriever = BeaconMemoryRetriever(memory=memory, inner=vector_store.as_retriever())  # your own

    The metadata of each carries the id of the stored document under `id_key`, so that a chain hands ids to the model
    instead of texts. With full-text search it also says which `passage` it is, of the characters `start` to `stop`,
    with its `score`.

    memory, namespace: where the documents are. k: how many of them.
    inner:  a retriever whose documents have the id in their metadata under `id_key`; several chunks of one document
            count once. An id that is not stored in the namespace raises DocumentNotFoundError: nothing that an index
            holds leads to another namespace.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    memory: BeaconMemory = Field(exclude=True, repr=False)
    namespace: str | None = None
    inner: BaseRetriever | None = None
    id_key: str = "document_id"
    k: int = Field(default=3, ge=1)

    def ids(self, documents: Iterable[Document]) -> list[str]:
        """The ids of found documents, for the model."""
        return [document.metadata[self.id_key] for document in documents]

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        if self.inner is None:
            return self._found(query, k)
        return self._checked(self.inner.invoke(query, {"callbacks": run_manager.get_child()}), k)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        if self.inner is None:
            return await run_in_executor(None, self._found, query, k)
        found = await self.inner.ainvoke(query, {"callbacks": run_manager.get_child()})
        return await run_in_executor(None, self._checked, found, k)

    def _found(self, query: str, k: int | None) -> list[Document]:
        with in_namespace(self.memory, self.namespace) as memory:
            return list(_first(self.k if k is None else k, self._search(memory, query)))

    def _search(self, memory: BeaconMemory, query: str) -> Iterator[Document]:
        for hit, row in memory.matches(query, _HITS):
            place = {"passage": hit.ordinal, "start": hit.start, "stop": hit.stop, "score": hit.score}
            yield Document(hit.text, metadata={**row.metadata, **place, self.id_key: hit.document})

    def _checked(self, found: Iterable[Document], k: int | None) -> list[Document]:
        documents: dict[str, Document] = {}
        for document in found:
            id = document.metadata.get(self.id_key)
            if not isinstance(id, str):
                raise InputError(
                    f"the inner retriever found a document whose metadata has no text under {self.id_key!r}: "
                    f"{document.metadata!r}; give each the id under which the memory stores it, or set id_key"
                )
            documents.setdefault(id, document)
        with in_namespace(self.memory, self.namespace) as memory:
            for id in documents:
                memory.show(id)  # raises DocumentNotFoundError
        return list(_first(self.k if k is None else k, documents.values()))


def _first(k: int, documents: Iterable[Document]) -> Iterator[Document]:
    if k < 1:
        raise InputError(f"k={k} must be at least 1")
    for _, document in zip(range(k), documents, strict=False):
        yield document
