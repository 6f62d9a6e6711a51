"""The results of tools, as agents get them: fields with the meanings that stand in the schema of each tool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from beacon_memory.results import Added, Answer
    from beacon_memory.storage.catalog.rows import DocumentRow

__all__ = [
    "AnswerFromMemory",
    "DocumentInMemory",
    "DocumentPage",
    "Forgotten",
    "FoundPassage",
    "LoadedPassage",
    "Stored",
]


class Stored(BaseModel, frozen=True):
    """A document that was stored, or that has grown."""

    id: str
    status: Annotated[
        str, Field(description="added, replaced or appended; unchanged if this text was stored under this id already.")
    ]
    tokens: Annotated[int, Field(description="Length of the whole document in tokens.")]
    slots: Annotated[int, Field(description="Memory slots that it was compressed to.")]
    evicted: Annotated[
        list[str], Field(description="Ids of documents that were forgotten to keep the quota of the store.")
    ]

    @classmethod
    def of(cls, added: Added) -> Stored:
        """Tell of a document what an agent can use."""
        return cls(id=added.id, status=added.status, tokens=added.tokens, slots=added.slots, evicted=[*added.evicted])


class _Passage(BaseModel, frozen=True):
    id: Annotated[str, Field(description="Id of the document.")]
    start: Annotated[int, Field(description="Character of the document's text at which the passage begins.")]
    stop: Annotated[int, Field(description="Character of the document's text at which the passage ends.")]
    text: str


class FoundPassage(_Passage, frozen=True):
    """A passage of a stored document that shares words with what was searched for."""

    score: Annotated[float, Field(description="How well it matches; higher is better, only for comparison.")]


class LoadedPassage(_Passage, frozen=True):
    """A passage that an answer was given from."""

    loaded: Annotated[float, Field(description="Share of the passage that was loaded, 0 to 1.")]


class AnswerFromMemory(BaseModel, frozen=True):
    """An answer of the local model, with what it was given from."""

    answer: str
    supported: Annotated[
        bool | None,
        Field(
            description="False if nothing relevant was in memory or the model was unsure: do not rely on the answer "
            "then. It errs; compare the answer with the passages."
        ),
    ]
    ids: Annotated[list[str], Field(description="Documents that were loaded.")]
    passages: Annotated[list[LoadedPassage], Field(description="The most relevant passages that were loaded.")]
    slots: Annotated[int, Field(description="Memory slots that were loaded.")]
    prompt_tokens: int
    generated_tokens: int
    seconds: float

    @classmethod
    def of(cls, answer: Answer, passages: list[LoadedPassage]) -> AnswerFromMemory:
        """Tell of an answer what an agent can use."""
        return cls(
            answer=answer.text,
            supported=answer.supported,
            ids=[*answer.ids],
            passages=passages,
            slots=answer.usage.slots,
            prompt_tokens=answer.usage.prompt_tokens,
            generated_tokens=answer.usage.generated_tokens,
            seconds=round(answer.seconds, 3),
        )


class DocumentInMemory(BaseModel, frozen=True):
    """A document that is stored."""

    id: str
    tokens: Annotated[int, Field(description="Length of the document in tokens.")]
    tags: list[str]
    metadata: dict[str, Any]
    updated_at: Annotated[str, Field(description="When it was last changed, ISO 8601 in UTC.")]
    expires_at: Annotated[str | None, Field(description="When it will be gone; null for never.")]

    @classmethod
    def of(cls, row: DocumentRow) -> DocumentInMemory:
        """Tell of a document what an agent can use."""
        return cls(
            id=row.id,
            tokens=row.tokens,
            tags=[*row.tags],
            metadata=dict(row.metadata),
            updated_at=row.updated_at,
            expires_at=row.expires_at,
        )


class DocumentPage(BaseModel, frozen=True):
    """Documents in the order of their ids."""

    documents: list[DocumentInMemory]
    next: Annotated[
        str | None,
        Field(description="To go on, call list with this as `after`. Null on the last page."),
    ]


class Forgotten(BaseModel, frozen=True):
    """The documents that are not in memory any more."""

    forgotten: list[str]
