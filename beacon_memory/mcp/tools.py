"""The tools that an agent gets: remember, append, search, ask, list and forget, each over one memory."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from anyio import CapacityLimiter, from_thread, to_thread
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field

from beacon_memory.documents import Document
from beacon_memory.errors import BeaconMemoryError
from beacon_memory.results import Answer, Progress, SourcePassage

from .results import (
    AnswerFromMemory,
    DocumentInMemory,
    DocumentPage,
    Forgotten,
    FoundPassage,
    LoadedPassage,
    Stored,
)

if TYPE_CHECKING:
    from beacon_memory.memory import BeaconMemory

__all__ = ["MemoryTools"]

T = TypeVar("T")

_MOST_SHOWN = 5  # passages that an answer comes with: enough to compare it with, and few to read

Id = Annotated[str, Field(description="Id of the document, such as a path, a URL or a title.", min_length=1)]
Ids = Annotated[
    list[str] | None,
    Field(description="Only these documents, by id. Leave it out to have the best ones found."),
]


class MemoryTools:
    """The tools of an MCP server, over the memory that `opened` returns; each runs beside the event loop.

    Documents are read one after another, for reading keeps the machine busy; questions are answered together.

    Raises ToolError, with the reason for the agent, where the memory cannot do what it asks.
    """

    def __init__(self, opened: Callable[[], BeaconMemory], *, answers: int = 16) -> None:
        self._opened = opened
        self._reading, self._answering, self._looking = CapacityLimiter(1), CapacityLimiter(answers), CapacityLimiter(8)

    def add_to(self, server: MCPServer[Any], *, read_only: bool = False) -> None:
        """Offer the tools by a server, those that change the memory only if it is not `read_only`."""
        for tool, title, hints in (
            (self.search, "Search memory", _READS),
            (self.ask, "Ask memory", _READS),
            (self.list, "List memory", _READS),
            (self.remember, "Remember a text", _REPLACES),
            (self.append, "Append to a document", _GROWS),
            (self.forget, "Forget documents", _FORGETS),
        ):
            if hints is _READS or not read_only:
                server.add_tool(
                    tool, title=title, description=inspect.getdoc(tool), annotations=hints, structured_output=True
                )

    async def remember(
        self,
        id: Id,
        text: Annotated[str, Field(description="The whole text, plain or Markdown.", min_length=1)],
        context: Context[Any, Any],
        tags: Annotated[list[str] | None, Field(description="Words to find it by in `list`.")] = None,
        metadata: Annotated[
            dict[str, Any] | None, Field(description="Facts about it, such as its author or where it is from.")
        ] = None,
    ) -> Stored:
        """Keep a text in long-term memory under an id, so that `ask` can answer from it in any later conversation.

        The text is read once, which takes about as long as the model reads it (seconds for a page, minutes for a book),
        and is compressed. A document that has this id is replaced; the same text again costs nothing. Remember whole
        documents, notes or facts under telling ids, one subject each; do not cut a document into pieces yourself.
        To add to a document, use `append`. Without tags or metadata, those that the document has already stay.
        """
        told = _Told(context, "reading")

        def work() -> Stored:
            document = Document(id, text, metadata, tags)
            return Stored.of(self._opened().add_many([document], progress=told.read)[0])

        return await self._run(work, self._reading)

    async def append(
        self,
        id: Id,
        text: Annotated[str, Field(description="What to put behind the document's text.", min_length=1)],
    ) -> Stored:
        """Put new text behind a document that is in memory; only the new text is read.

        For logs, minutes and notes that grow. The text goes right behind the old one: begin it with a line break if it
        is a new line or paragraph. The document must exist: use `remember` for a new one.
        """
        return await self._run(lambda: Stored.of(self._opened().append(id, text)), self._reading)

    async def search(
        self,
        query: Annotated[str, Field(description="Words that the passage should have; any language.", min_length=1)],
        ids: Ids = None,
        limit: Annotated[int, Field(description="Most passages to return.", ge=1, le=50)] = 5,
    ) -> list[FoundPassage]:
        """Find passages of the documents in memory by their words, best first, and return their original text.

        Fast, and runs no model. Use it for exact wording, names and numbers, to see whether something is in memory at
        all, and to find the ids of documents to `ask`. An empty list means that no passage has any of the words: try
        other words, since it matches words and not meanings.
        """

        def work() -> list[FoundPassage]:
            store = self._opened().store
            for id in ids or ():
                store.row(id)  # one that is not there shall not look like one without the words
            hits = store.search(query, limit, conversations=False, documents=ids)
            return [
                FoundPassage(id=hit.document, start=hit.start, stop=hit.stop, text=hit.text, score=round(hit.score, 3))
                for hit in hits
            ]

        return await self._run(work, self._looking)

    async def ask(
        self,
        question: Annotated[
            str, Field(description="One question, complete in itself: the model sees nothing else.", min_length=1)
        ],
        context: Context[Any, Any],
        ids: Ids = None,
        budget: Annotated[
            str | None,
            Field(
                description="How much of the documents to load: a ratio such as 'x8' (an eighth), memory slots such as "
                "'500', or 'x1' for all that fits. Left out: the passages that the question is about."
            ),
        ] = None,
        abstain: Annotated[
            bool, Field(description="Answer 'That is not in memory.' instead of what is not supported.")
        ] = False,
        max_tokens: Annotated[int, Field(description="Longest answer, in tokens.", ge=1, le=4096)] = 256,
    ) -> AnswerFromMemory:
        """Answer a question from the documents in memory, with the local model that has read them.

        The documents need not be read again, however long they are, and cost none of your context. Ask one thing at a
        time, in the words of the documents where you know them, and name the documents by `ids` if you do. The model is
        small: check `supported`, and compare the answer with the passages that come with it, which are the original
        text. For wording and numbers use `search`.
        """
        told = _Told(context, "answering", max_tokens)

        def work() -> AnswerFromMemory:
            memory = self._opened()
            told.begun()
            options: dict[str, Any] = {"budget": budget, "abstain": abstain, "max_new_tokens": max_tokens}
            for piece in memory.stream(question, ids, **options):
                if isinstance(piece, Answer):
                    return AnswerFromMemory.of(piece, [*_shown(memory, piece.sources)])
                told.said(piece)
            raise AssertionError("a stream ends with its answer")

        return await self._run(work, self._answering)

    async def list(
        self,
        prefix: Annotated[str, Field(description="Only ids that begin with this.")] = "",
        tags: Annotated[builtins.list[str] | None, Field(description="Only documents that have all of these.")] = None,
        after: Annotated[str, Field(description="Only ids behind this one: `next` of the page before.")] = "",
        limit: Annotated[int, Field(description="Most documents to return.", ge=1, le=200)] = 50,
    ) -> DocumentPage:
        """List the documents in memory by id, with their tags and metadata, page by page.

        Use it to see what there is before you `ask` or `remember`. It does not return texts: see `search` and `ask`.
        """

        def work() -> DocumentPage:
            rows = self._opened().list(prefix=prefix, tags=tags or (), after=after, limit=limit + 1)
            page = rows[:limit]
            return DocumentPage(
                documents=[*map(DocumentInMemory.of, page)], next=page[-1].id if len(rows) > limit else None
            )

        return await self._run(work, self._looking)

    async def forget(
        self,
        ids: Annotated[
            builtins.list[str], Field(description="Ids of the documents to forget, as `list` shows them.", min_length=1)
        ],
    ) -> Forgotten:
        """Remove documents from memory, for good: all that are named, or none if one of them is not there.

        Forget what is wrong, outdated or unwanted; to correct a document, `remember` its new text under the same id.
        """

        def work() -> Forgotten:
            memory, wanted = self._opened(), [*dict.fromkeys(ids)]
            for id in wanted:  # all must exist before the first goes
                memory.show(id)
            for id in wanted:
                memory.remove(id)
            return Forgotten(forgotten=wanted)

        return await self._run(work, self._looking)

    async def _run(self, work: Callable[[], T], limiter: CapacityLimiter) -> T:
        try:
            return await to_thread.run_sync(work, limiter=limiter)
        except BeaconMemoryError as error:
            raise ToolError(str(error)) from error


def _hints(*, reads: bool = False, destroys: bool = False, again: bool = False) -> ToolAnnotations:
    """Tell a host what a tool may do; `again`: whether a second call with the same arguments changes nothing more."""
    return ToolAnnotations(
        read_only_hint=reads, destructive_hint=destroys, idempotent_hint=again, open_world_hint=False
    )


_READS = _hints(reads=True, again=True)
_REPLACES = _hints(destroys=True, again=True)
_GROWS = _hints()
_FORGETS = _hints(destroys=True)


@dataclass(slots=True)
class _Told:
    """Tell the client of a call how far it is, from the thread that works on it; ends the work if it was cancelled."""

    context: Context[Any, Any]
    doing: str
    total: float | None = None
    done: int = 0
    text: str = ""

    def begun(self) -> None:
        """Tell that the work has begun, the model being loaded first if it was not yet."""
        self._tell(self.done, self.total, self.doing)

    def read(self, progress: Progress) -> None:
        """Tell how many tokens of a document were read."""
        self._tell(progress.tokens, progress.begun, self.doing)

    def said(self, piece: str) -> None:
        """Tell the answer so far."""
        self.done, self.text = self.done + 1, self.text + piece
        self._tell(self.done, self.total, self.text)

    def _tell(self, done: float, total: float | None, message: str) -> None:
        from_thread.check_cancelled()
        from_thread.run(partial(self.context.report_progress, done, total, message))


def _shown(memory: BeaconMemory, sources: Iterable[SourcePassage]) -> Iterable[LoadedPassage]:
    """Return the most relevant passages that an answer was given from, with their texts."""
    best = sorted(sources, key=lambda source: (source.relevance, source.loaded), reverse=True)[:_MOST_SHOWN]
    texts = {id: memory.store.text(id) for id in {source.document for source in best}}
    for one in best:
        text = texts[one.document][one.start : one.stop]
        yield LoadedPassage(id=one.document, start=one.start, stop=one.stop, text=text, loaded=round(one.loaded, 3))
