"""Documents on their way into a store: what has to be read of them, and what is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import CompressedDocument, Ratio, TokenizedText, Work
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.header import DocumentHeader, WindowSpan
from beacon_memory.storage.files.kv_file import StoredFile, read_header
from beacon_memory.storage.files.stored_kv import StoredKV
from beacon_memory.storage.store import MemoryStore

from .documents import Document, Label, check_id, content_hash
from .errors import BeaconMemoryError, ConflictError, CorruptFileError, DocumentNotFoundError, StoreError
from .results import Added, Progress, Status

__all__ = ["Ingestion"]

_TRIES = 5  # times that a document may be changed by others while it is being continued
_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}

OnAdded = Callable[[Added], None]
OnError = Callable[[Document, BeaconMemoryError], None]
_Done = TypeVar("_Done")


@dataclass(frozen=True, slots=True)
class _Job:
    """A document that is being compressed.

    stored:    what the document had, if it grows.
    replacing: the K/V file that the document must still have when it is stored, if that matters.
    """

    document: Document
    text: TokenizedText
    work: Work
    compression: str
    precision: str
    status: Status
    label: Label | None = None
    stored: StoredKV | None = None
    replacing: str | None = None
    keep_version: bool = False


class _Run:
    """Documents through one compression, in their order.

    waiting: handed to the compressor. failed: what ends the run, if nobody is told of errors one by one.
    """

    def __init__(
        self,
        prepare: Callable[[Document], _Job | Added],
        progress: Callable[[Progress], None],
        on_added: OnAdded,
        on_error: OnError | None,
    ) -> None:
        self.prepare, self.progress, self.on_added, self.on_error = prepare, progress, on_added, on_error
        self.added: list[Added] = []
        self.waiting: list[_Job] = []
        self.failed: list[BeaconMemoryError] = []
        self.read = self.begun = 0

    def work(self, documents: Iterable[Document]) -> Iterator[Work]:
        for document in documents:
            job = self.attempt(document, partial(self.prepare, document))
            if self.failed:
                return
            if isinstance(job, _Job):
                self.begun += len(job.text.ids)
                self.waiting.append(job)
                yield job.work
            else:
                self.take(job)

    def advanced(self, tokens: int) -> None:
        self.read += tokens
        self.progress(Progress(self.read, self.begun))

    def attempt(self, document: Document, work: Callable[[], _Done]) -> _Done | None:
        try:
            return work()
        except BeaconMemoryError as error:
            if self.on_error is None:
                self.failed.append(error)
            else:
                self.on_error(document, error)
            return None

    def take(self, one: Added | None) -> None:
        if one is not None:
            self.added.append(one)
            self.on_added(one)


class Ingestion:
    """What compresses documents and puts them into a store."""

    def __init__(self, store: MemoryStore, compressor: BeaconCompressor) -> None:
        self.store = store
        self.compressor = compressor

    def add_many(
        self,
        documents: Iterable[Document | tuple[str, str]],
        ratio: Ratio,
        compression: str,
        precision: str,
        progress: Callable[[Progress], None],
        on_added: OnAdded,
        on_error: OnError | None,
    ) -> list[Added]:
        """See `BeaconMemory.add_many`."""
        compression = self.compressor.compression(compression)

        def prepare(document: Document) -> _Job | Added:
            return self._prepare(document, ratio, compression, precision)

        given = (one if isinstance(one, Document) else Document(*one) for one in documents)
        return self._run(given, prepare, compression, progress, on_added, on_error)

    def append(self, id: str, text: str, ratio: int | None) -> Added:
        """See `BeaconMemory.append`."""
        content_hash(text)  # refuses what has no UTF-8 form
        if ratio is not None:
            self.compressor.model.config.require_ratio(ratio)
        for _ in range(_TRIES):
            row, file = self.store.read(id)
            if not text:
                return _added(row, "unchanged", 0.0)
            started = time.perf_counter()
            job = self._continue(row, file, text, ratio)
            (compressed,) = self.compressor.compress([job.work], compression=job.compression)
            try:
                return self._put(job, compressed, time.perf_counter() - started)
            except ConflictError:
                continue  # somebody else was faster: go on from what they stored
        raise StoreError(f"document {id!r} was changed {_TRIES} times while a text was appended; try again")

    def recompress(
        self,
        rows: Sequence[DocumentRow],
        progress: Callable[[Progress], None],
        on_added: OnAdded,
        on_error: OnError | None,
        *,
        keep_versions: bool,
    ) -> list[Added]:
        """Compress documents anew from their texts, as they were compressed before."""
        done = []
        ordered = sorted(rows, key=lambda row: row.compression)  # one compression at a time
        for compression, same in groupby(ordered, key=lambda row: row.compression):
            by_id = {row.id: row for row in same}

            def renew(document: Document, by_id: dict[str, DocumentRow] = by_id) -> _Job:
                return self._renew(by_id[document.id], keep_versions)

            documents = (Document(id, "") for id in by_id)
            chosen = self.compressor.compression(compression)
            done += self._run(documents, renew, chosen, progress, on_added, on_error)
        return done

    def _run(
        self,
        documents: Iterable[Document],
        prepare: Callable[[Document], _Job | Added],
        compression: str,
        progress: Callable[[Progress], None],
        on_added: OnAdded,
        on_error: OnError | None,
    ) -> list[Added]:
        run = _Run(prepare, progress, on_added, on_error)
        since = time.perf_counter()
        for compressed in self.compressor.compress(run.work(documents), run.advanced, compression=compression):
            now, job = time.perf_counter(), run.waiting.pop(0)
            run.take(run.attempt(job.document, partial(self._put, job, compressed, now - since)))
            if run.failed:
                break
            since = now
        if run.failed:
            raise run.failed[0]
        return run.added

    def _prepare(self, document: Document, ratio: Ratio, compression: str, precision: str) -> _Job | Added:
        """Check a document before any work on it; says `unchanged` if there is none."""
        check_id(document.id)
        digest = content_hash(document.text)
        row = self._row(document.id)
        label = _label(document, row)
        text = self.compressor.tokenize(document.text)
        ratios = self._ratios(document.id, text, ratio)
        if precision == "auto":
            precision = self.store.settings.precision
        if row is not None and self._is_stored(row, digest, ratios, compression, precision):
            if row.precision != precision != "auto":
                row = self.store.convert(row.id, precision)
            if label != row.label:
                row = self.store.update(
                    row.id, metadata=label.metadata, tags=label.tags, pinned=label.pinned, expires_at=label.expires_at
                )
            return _added(row, "unchanged", 0.0)
        status: Status = "replaced" if row else "added"
        return _Job(document, text, Work(text.ids, ratios), compression, precision, status, label)

    def _continue(self, row: DocumentRow, file: StoredFile, text: str, ratio: int | None) -> _Job:
        """What has to be read when a text is appended: from the first window on that is not what it was, or not full.

        The text is tokenized as a whole, since its end may merge with what follows into other tokens.
        """
        header, window = file.header, self.compressor.model.config.beacon_window
        self.compressor.model.fingerprint.require(header.fingerprint, row.id)
        before = self.store.text(row.id)
        old, new = self.compressor.tokenize(before), self.compressor.tokenize(before + text)
        same = next((n for n, (a, b) in enumerate(zip(old.ids, new.ids, strict=False)) if a != b), len(old.ids))
        windows = min(same, len(new.ids)) // window
        if header.compression != "beacon" and header.method != self.compressor.method(header.compression):
            windows = 0
        ratios = [one.ratio for one in header.windows][: -(-len(new.ids) // window)]
        ratios += [ratios[-1] if ratio is None else ratio] * (-(-len(new.ids) // window) - len(ratios))
        kept = file.memory().between(0, sum(one.span for one in header.windows[:windows]))
        return _Job(
            Document(row.id, before + text),
            new,
            Work(new.ids, self._ratios(row.id, new, ratios), kept, windows),
            row.compression,
            row.precision or "auto",
            "appended",
            stored=file.kv,
            replacing=row.file,
        )

    def _renew(self, row: DocumentRow, keep_version: bool) -> _Job:
        """A document as it was compressed before: at the same ratios, if its windows can still be told."""
        document = Document(row.id, self.store.text(row.id))
        text = self.compressor.tokenize(document.text)
        ratios: Ratio = row.ratios[0]
        if len(row.ratios) > 1:
            try:
                windows = read_header(self.store.files.fetch(row.file)).windows
            except (CorruptFileError, FileNotFoundError):
                windows = ()
            count = -(-len(text.ids) // self.compressor.model.config.beacon_window)
            ratios = [window.ratio for window in windows] if len(windows) == count else "auto"
        work = Work(text.ids, self._ratios(row.id, text, ratios))
        return _Job(
            document,
            text,
            work,
            row.compression,
            row.precision or "auto",
            "recompressed",
            replacing=row.file,
            keep_version=keep_version,
        )

    def _row(self, id: str) -> DocumentRow | None:
        try:
            return self.store.row(id)
        except DocumentNotFoundError:
            return None

    def _ratios(self, id: str, text: TokenizedText, ratio: Ratio) -> list[int]:
        try:
            return self.compressor.ratios(len(text.ids), ratio)
        except BeaconMemoryError as error:
            raise type(error)(f"document {id!r}: {error}") from error

    def _is_stored(self, row: DocumentRow, digest: str, ratios: list[int], compression: str, precision: str) -> bool:
        """Whether this very text is stored whole, compressed in this way and by this model, and not too coarsely."""
        wanted = (digest, self.compressor.model.fingerprint.digest, compression)
        if (row.content_hash, row.fingerprint, row.compression) != wanted:
            return False
        if precision != "auto" and _BITS.get(row.precision, 0) < _BITS[precision]:
            return False
        try:
            header = self.store.read(row.id)[1].header
        except (DocumentNotFoundError, CorruptFileError):
            return False
        same_method = header.method in (None, self.compressor.method(compression))
        return same_method and [window.ratio for window in header.windows] == ratios

    def _put(self, job: _Job, compressed: CompressedDocument, seconds: float) -> Added:
        ids, offsets = job.text.ids, job.text.offsets
        spans = tuple(
            WindowSpan(w.tokens, w.ratio, offsets[w.first][0], offsets[w.first + w.tokens - 1][1], w.span)
            for w in compressed.windows
        )
        last, model = compressed.windows[-1], self.compressor.model
        header = DocumentHeader(
            id=job.document.id,
            content_hash=content_hash(job.document.text),
            tokens=compressed.tokens,
            windows=spans,
            tail_ids=tuple(ids[last.first :]) if last.tokens < model.config.beacon_window else (),
            compression=job.compression,
            span=compressed.kv.span,
            fingerprint=model.fingerprint,
            method=self.compressor.method(job.compression),
        )
        new = compressed.kv.to("cpu")
        kv: StoredKV = new
        if job.stored is not None and job.work.read is not None:
            start = job.work.read.span  # what stands before it stays as it was stored, bit for bit
            kv = job.stored.grown(start, new.between(start, new.span))
        evicted: list[str] = []
        row = self.store.put(
            header,
            kv,
            job.document.text,
            job.label,
            precision=job.precision,
            replacing=job.replacing,
            keep_version=job.keep_version,
            on_evicted=lambda gone: evicted.append(gone.id),
        )
        return replace(_added(row, job.status, seconds), evicted=tuple(evicted))


def _label(document: Document, row: DocumentRow | None) -> Label:
    """The label that a document shall have: what is given of it, else what it has already."""
    given: dict[str, Any] = {
        "metadata": document.metadata,
        "tags": document.tags,
        "pinned": document.pinned,
        "expires_at": document.expires_at,
    }
    return replace(row.label if row else Label(), **{name: one for name, one in given.items() if one is not None})


def _added(row: DocumentRow, status: Status, seconds: float) -> Added:
    return Added(row.id, status, row.tokens, row.slots, row.bytes, row.ratios, row.compression, row.precision, seconds)
