"""BeaconMemory: documents in, answers out."""

from __future__ import annotations

import builtins
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from .catalog import DocumentRow
from .compressor import BeaconCompressor, CompressedDocument, Ratio, TokenizedText, check_score
from .document import check_id, check_metadata, content_hash
from .errors import BeaconMemoryError, CorruptFileError, DocumentNotFoundError, InputError
from .generation import Generation, Messages, Request, chat_prompt, generate, generation_config, require_room, stream
from .kv import MemoryKV
from .kv_file import DocumentHeader, WindowSpan
from .modeling import BeaconModel
from .results import Added, Answer, Document, Progress, Usage
from .store import MemoryStore, Problem

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

__all__ = ["BeaconMemory"]

DEFAULT_DOCUMENTS = 3  # documents that a question without ids may pick
_HITS = 50  # passages to look at for them
_WEAKEST = 0.5  # of the best passage's BM25 score: what a document must reach to be loaded beside it


@dataclass(frozen=True, slots=True)
class _Job:
    """A document on its way to the store."""

    document: Document
    content_hash: str
    text: TokenizedText
    ratios: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """A question ready to be asked."""

    ids: tuple[str, ...]
    request: Request
    config: GenerationConfig
    started: float

    def answer(self, generation: Generation) -> Answer:
        now = time.perf_counter()
        usage = Usage(self.request.prefix.slots, len(self.request.prompt), len(generation.tokens))
        first = generation.first_token_at - self.started
        return Answer(generation.text, self.ids, usage, first, now - self.started)


class BeaconMemory:
    """Long-term memory of a local language model: each document is read once and answers from then on.

    store:   folder of the documents; created when first written to.
    model:   folder or hub name of the base model, or a loaded BeaconModel; by default the embedded one.
    adapter: folder or hub name of a beacon adapter for it.
    reserve: positions of the model that `ratio="auto"` leaves free behind a document for question and answer.
    score:   how `select` and `hybrid` choose tokens: `repeat`, or `expected`, which is worse and saves a pass.

    The model is loaded when it is first needed: listing, searching and removing do without.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        model: str | Path | BeaconModel | None = None,
        adapter: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = "auto",
        reserve: int = 1024,
        score: str = "repeat",
    ) -> None:
        if isinstance(model, BeaconModel) and (adapter is not None or device is not None):
            raise InputError("adapter and device belong to a model that is still to be loaded, and this one is")
        self.store = MemoryStore(store)
        self._source = (model, adapter, device, dtype)
        self._options: dict[str, Any] = {"reserve": reserve, "score": check_score(score)}
        self._compressor: BeaconCompressor | None = None
        self._loading = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the store's catalog."""
        self.store.close()

    @property
    def compressor(self) -> BeaconCompressor:
        """The compressor, and with it the loaded model."""
        with self._loading:
            if self._compressor is None:
                model, adapter, device, dtype = self._source
                if not isinstance(model, BeaconModel):
                    model = BeaconModel.from_pretrained(model, adapter, device=device, dtype=dtype)
                compressor = BeaconCompressor(model, **self._options)
                compressor.sink, model.fingerprint  # noqa: B018  # now, so that no answer waits for them
                self._compressor = compressor
            return self._compressor

    @property
    def model(self) -> BeaconModel:
        """The loaded model."""
        return self.compressor.model

    def add(
        self,
        id: str,
        text: str,
        metadata: Mapping[str, object] | None = None,
        ratio: Ratio = "auto",
        compression: str = "auto",
    ) -> Added:
        """Compress a document and store it under `id`, in place of what was there.

        ratio: raw tokens per memory slot (2, 4, 8, ...); `auto` for the smallest that fits the model; or a list with
        one for each window. compression: `beacon`, `select` (K/V of chosen tokens; needs no adapter), `hybrid` (both)
        or `auto`, the model's own. A text that is stored already, compressed in the same way by the same model, is left
        as it is. Raises ConfigError, InputError or CapacityError if it cannot be compressed; then nothing has changed.
        """
        return self.add_many([Document(id, text, metadata)], ratio=ratio, compression=compression)[0]

    def add_many(
        self,
        documents: Iterable[Document | tuple[str, str]],
        ratio: Ratio = "auto",
        compression: str = "auto",
        *,
        progress: Callable[[Progress], None] = lambda _: None,
        on_added: Callable[[Added], None] = lambda _: None,
        on_error: Callable[[Document, BeaconMemoryError], None] | None = None,
    ) -> builtins.list[Added]:
        """Add many documents, or pairs of id and text, compressed together; each is stored as soon as it is done.

        Returns what became of each, in the order in which they were done. Interrupted, it has lost only what was
        unfinished: run it again with the same documents, and those that are stored are skipped. `on_error` is told of a
        document that cannot be compressed, and the others go on; without it the error is raised, after all documents
        in front of it were stored.
        """
        added: builtins.list[Added] = []
        waiting: builtins.list[_Job] = []  # handed to the compressor, which keeps their order
        failed: builtins.list[BeaconMemoryError] = []
        compression = self.compressor.compression(compression)
        read = begun = 0
        since = time.perf_counter()

        def note(one: Added) -> None:
            added.append(one)
            on_added(one)

        def advanced(tokens: int) -> None:
            nonlocal read
            read += tokens
            progress(Progress(read, begun))

        def work() -> Iterator[tuple[Sequence[int], Sequence[int]]]:
            nonlocal begun
            for given in documents:
                document = given if isinstance(given, Document) else Document(*given)
                try:
                    job = self._prepare(document, ratio, compression)
                except BeaconMemoryError as error:
                    if on_error is None:
                        failed.append(error)
                        return
                    on_error(document, error)
                    continue
                if isinstance(job, Added):
                    note(job)
                    continue
                begun += len(job.text.ids)
                waiting.append(job)
                yield job.text.ids, job.ratios

        for compressed in self.compressor.compress(work(), advanced, compression=compression):
            now = time.perf_counter()
            note(self._put(waiting.pop(0), compressed, compression, now - since))
            since = now
        if failed:
            raise failed[0]
        return added

    def _prepare(self, document: Document, ratio: Ratio, compression: str) -> _Job | Added:
        """Check a document before any work on it; says `unchanged` if there is none."""
        check_id(document.id)
        digest = content_hash(document.text)
        if document.metadata is not None:
            check_metadata(document.metadata)
        compressor = self.compressor
        text = compressor.tokenize(document.text)
        try:
            ratios = compressor.ratios(len(text.ids), ratio)
        except BeaconMemoryError as error:
            raise type(error)(f"document {document.id!r}: {error}") from error
        if self._is_stored(document.id, digest, ratios, compression):
            row = self.store.row(document.id)
            if document.metadata is not None and document.metadata != row.metadata:
                row = self.store.set_metadata(document.id, document.metadata)
            return Added(row.id, "unchanged", row.tokens, row.slots, row.bytes, row.ratios, row.compression, 0.0)
        return _Job(document, digest, text, ratios)

    def _is_stored(self, id: str, digest: str, ratios: builtins.list[int], compression: str) -> bool:
        """Whether this very text is stored whole, compressed in this way and by this model."""
        try:
            row = self.store.row(id)
            wanted = (digest, self.model.fingerprint.digest, compression)
            if (row.content_hash, row.fingerprint, row.compression) != wanted:
                return False
            return [window.ratio for window in self.store.check(id).windows] == ratios
        except (DocumentNotFoundError, CorruptFileError):
            return False

    def _put(self, job: _Job, compressed: CompressedDocument, compression: str, seconds: float) -> Added:
        ids, offsets, document = job.text.ids, job.text.offsets, job.document
        spans = tuple(
            WindowSpan(w.tokens, w.ratio, offsets[w.first][0], offsets[w.first + w.tokens - 1][1])
            for w in compressed.windows
        )
        last = compressed.windows[-1]
        header = DocumentHeader(
            id=document.id,
            content_hash=job.content_hash,
            tokens=compressed.tokens,
            windows=spans,
            tail_ids=tuple(ids[last.first :]) if last.tokens < self.model.config.beacon_window else (),
            fingerprint=self.model.fingerprint,
            compression=compression,
            span=compressed.kv.span,
        )
        status: Literal["added", "replaced"] = "replaced" if document.id in self.store else "added"
        row = self.store.put(header, compressed.kv.to("cpu"), document.text, document.metadata)
        return Added(row.id, status, row.tokens, row.slots, row.bytes, row.ratios, row.compression, seconds)

    def ask(
        self,
        question: Messages,
        ids: str | Sequence[str] | None = None,
        *,
        limit: int = DEFAULT_DOCUMENTS,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Answer:
        """Answer a question from the memory of some documents.

        question: a text, or a conversation as dicts with `role` and `content`.
        ids:      documents to answer from, loaded in this order; None picks up to `limit` by full-text search.
        stop:     strings at which the answer ends. seed: of sampling.
        options:  as for transformers' `generate`: max_new_tokens (256), temperature, top_p, num_beams, ...

        Raises DocumentNotFoundError, CapacityError (before any work) if memory, prompt and answer exceed the model's
        positions, or FingerprintMismatchError for a document that another model compressed.
        """
        asked = self._question(question, ids, limit, stop, options)
        ((generation, *_),) = generate(self.model, [asked.request], asked.config, seed=seed)
        return asked.answer(generation)

    def stream(
        self,
        question: Messages,
        ids: str | Sequence[str] | None = None,
        *,
        limit: int = DEFAULT_DOCUMENTS,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Iterator[str | Answer]:
        """Like `ask`, but yields pieces of the answer as they come, and the whole Answer last."""
        asked = self._question(question, ids, limit, stop, options)
        if (asked.config.num_beams or 1) > 1:
            raise InputError(f"num_beams={asked.config.num_beams} cannot be streamed: beams are only known at the end")
        return self._stream(asked, seed)

    def _stream(self, asked: _Question, seed: int | None) -> Iterator[str | Answer]:
        for piece in stream(self.model, asked.request, asked.config, seed=seed):
            yield piece if isinstance(piece, str) else asked.answer(piece)

    def _question(
        self,
        question: Messages,
        ids: str | Sequence[str] | None,
        limit: int,
        stop: str | Sequence[str] | None,
        options: Mapping[str, Any],
    ) -> _Question:
        model = self.model  # loading it, when it is first needed, is no part of an answer's time
        started = time.perf_counter()
        config = generation_config(model, stop, options)
        if (config.num_return_sequences or 1) > 1:
            raise InputError(f"num_return_sequences={config.num_return_sequences}: ask gives one answer; ask again")
        sink = self.compressor.sink
        prompt = chat_prompt(model, question, behind_memory=bool(sink.slots) or ids != [])
        room = model.max_positions - sink.slots - len(prompt) - (config.max_new_tokens or 0)
        chosen = self.pick(question, limit, room) if ids is None else [ids] if isinstance(ids, str) else list(ids)
        rows = [self.store.row(id) for id in chosen]
        require_room(model, sink.slots + sum(row.slots for row in rows), len(prompt), config.max_new_tokens or 0)
        prefix = MemoryKV.concat([MemoryKV.of(sink), *(self._load(id) for id in chosen)], room + sink.slots)
        return _Question(tuple(chosen), Request(prefix, prompt), config, started)

    def pick(self, question: Messages, limit: int = DEFAULT_DOCUMENTS, room: int | None = None) -> builtins.list[str]:
        """The ids of up to `limit` documents whose passages match a question best, best first.

        A document counts by its best passage, and must reach half the score of the best of all. With `room`, memory
        slots at hand, a document that does not fit beside better ones is left out. A store of one
        document needs no match. Raises DocumentNotFoundError if nothing matches.
        """
        if limit < 1:
            raise InputError(f"limit={limit} must be at least 1")
        text = question if isinstance(question, str) else question[-1]["content"]
        hits = self.store.search(text, _HITS)
        ranked = list(dict.fromkeys(hit.document for hit in hits if hit.score >= _WEAKEST * hits[0].score))
        if not ranked:
            stored = [row.id for row in self.store.list()]
            if len(stored) != 1:
                what = "shares a word with the question; name documents by id" if stored else "is stored yet; add some"
                raise DocumentNotFoundError(f"no document {what}")
            ranked = stored
        chosen: builtins.list[str] = []
        for id in ranked[:limit]:
            slots = self.store.row(id).slots
            if not chosen or room is None or slots <= room:
                chosen.append(id)
                room = None if room is None else room - slots
        return chosen

    def _load(self, id: str) -> MemoryKV:
        stored = self.store.get(id)
        self.model.fingerprint.require(stored.header.fingerprint, id)
        return stored.kv.to(self.model.device, self.model.dtype)

    def list(self) -> builtins.list[DocumentRow]:
        """All stored documents, by id."""
        return self.store.list()

    def show(self, id: str) -> DocumentRow:
        """What is known of a document; raises DocumentNotFoundError."""
        return self.store.row(id)

    def remove(self, id: str) -> DocumentRow:
        """Forget a document; returns what was known of it, or raises DocumentNotFoundError."""
        return self.store.delete(id)

    def verify(self, *, repair: bool = False) -> builtins.list[Problem]:
        """What is wrong with the stored files; see `MemoryStore.verify`."""
        return self.store.verify(repair=repair)
