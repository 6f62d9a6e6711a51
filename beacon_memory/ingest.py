"""Documents on their way into a store: prepared, compressed, put away."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from beacon_memory.compression.compressor import PACKAGE, BeaconCompressor
from beacon_memory.compression.work import CompressedDocument, Ratio, Work
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.modeling.model import require_made
from beacon_memory.storage.catalog.passages import split_passages
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.access import read_file
from beacon_memory.storage.files.header import DocumentHeader, WindowSpan
from beacon_memory.storage.files.kv_file import StoredFile, read_header
from beacon_memory.storage.files.stored_kv import StoredKV
from beacon_memory.storage.store import MemoryStore

from .documents import Document, Label, Precision, PrecisionRule, Text, check_id
from .errors import (
    BeaconMemoryError,
    ConfigError,
    ConflictError,
    CorruptFileError,
    DocumentNotFoundError,
    InputError,
    StoreError,
)
from .results import Added, Progress, Status

__all__ = ["Ingestion"]

_MOST_BYTES = 1 << 28  # of K/V that wait to be stored while more are computed
_TRIES = 5  # times that a document may be changed by others while it is being continued

OnAdded = Callable[[Added], None]
OnError = Callable[[Document, BeaconMemoryError], None]


@dataclass(frozen=True, slots=True)
class _Job:
    """A document that is being compressed.

    offsets:   where each token of `work` starts and stops in the text, in characters.
    stored:    the K/V that the document had, if it grows.
    replacing: the K/V file that the document must still have when it is stored, if that matters.
    """

    document: Document
    text: Text
    offsets: Sequence[tuple[int, int]]
    work: Work
    compression: str
    precision: str
    status: Status
    label: Label | None = None
    stored: StoredKV | None = None
    replacing: str | None = None
    keep_version: bool = False


class Ingestion:
    """Compress documents and put them into a store."""

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
        """Add documents, as `BeaconMemory.add_many` does."""
        compression = self.compressor.compression(compression)

        def prepare(document: Document) -> _Job | Added:
            return self._prepare(document, ratio, compression, precision)

        given = (one if isinstance(one, Document) else Document(*one) for one in documents)
        ahead = isinstance(documents, Sequence)  # what is at hand can be taken early; others may have to be waited for
        return self._run(given, prepare, compression, progress, on_added, on_error, ahead=ahead)

    def append(self, id: str, text: str, ratio: int | None) -> Added:
        """Append a text to a document, as `BeaconMemory.append` does."""
        Text(text)  # refuses what has no UTF-8 form
        if ratio is not None:
            self.compressor.model.config.require_ratio(ratio)
        for _ in range(_TRIES):
            row, file = self.store.read(id)
            if not text:
                return _added(row, "unchanged", 0.0)
            started = time.perf_counter()
            job = self._continue(row, file, text, ratio)
            compressed = self.compressor.compress_one(job.work, compression=job.compression)
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
            try:
                self.compressor.parameters(compression, _package(next(iter(by_id.values())).method))
            except ConfigError as error:  # the method is not installed, or not for this model
                for id in by_id:
                    _tell(on_error, Document(id, ""), error)
                continue

            def renew(document: Document, by_id: dict[str, DocumentRow] = by_id) -> _Job:
                return self._renew(by_id[document.id], keep_versions)

            documents = (Document(id, "") for id in by_id)
            done += self._run(documents, renew, compression, progress, on_added, on_error, ahead=True)
        return done

    def _run(
        self,
        documents: Iterable[Document],
        prepare: Callable[[Document], _Job | Added],
        compression: str,
        progress: Callable[[Progress], None],
        on_added: OnAdded,
        on_error: OnError | None,
        *,
        ahead: bool,
    ) -> list[Added]:
        """Prepare, compress and store documents; returns what became of each, in the order in which they were done.

        They are stored in a thread beside the computing, and each is prepared in one while that before it is computed,
        if it may be taken `ahead`. All else is done in the thread of the caller.
        """
        added: list[Added] = []
        begun = read = 0

        def take(one: Added) -> None:
            added.append(one)
            on_added(one)

        with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as reader:
            outbox = _Outbox(writer, take, on_error)

            def jobs() -> Iterator[tuple[_Job, Work]]:
                nonlocal begun
                for document, prepared in self._prepared(documents, prepare, outbox, reader if ahead else None):
                    try:
                        job = prepared()
                    except BeaconMemoryError as error:
                        outbox.leave(document)
                        _tell(on_error, document, error)
                        continue
                    if isinstance(job, Added):
                        outbox.put(document, 0, partial(_same, job))
                    else:
                        begun += len(job.work.ids)
                        yield job, job.work

            def advance(tokens: int) -> None:
                nonlocal read
                read += tokens
                progress(Progress(read, begun))
                outbox.settle()

            since = time.perf_counter()
            try:
                for job, compressed in self.compressor.compress(jobs(), advance, compression=compression):
                    now = time.perf_counter()
                    store = partial(self._put, job, compressed, now - since)
                    outbox.put(job.document, compressed.kv.nbytes, store)
                    since = now
            finally:
                outbox.settle(wait=True)
        return added

    def _prepared(
        self,
        documents: Iterable[Document],
        prepare: Callable[[Document], _Job | Added],
        outbox: _Outbox,
        reader: ThreadPoolExecutor | None,
    ) -> Iterator[tuple[Document, Callable[[], _Job | Added]]]:
        """Iterate over documents and what prepares them, which `reader` does while the one before is in use.

        What a document finds in the store must be settled before: one with the id of another that is still on its way,
        or any, where others may have to go for room, is prepared when those before it are stored.
        """
        last: tuple[Document, Callable[[], _Job | Added]] | None = None
        rest, failure = iter(documents), None
        bounded = self.store.settings.quota is not None
        while True:
            try:
                document = next(rest, None)
            except Exception as error:  # noqa: BLE001  # raised behind what came before
                document, failure = None, error
            apart = document is None or bounded or document in outbox
            if last is not None and apart:
                yield last
                last = None
            if document is None:
                break
            if apart:
                outbox.settle(wait=True)
            outbox.enter(document)
            if reader is None or apart:
                yield document, partial(prepare, document)
                continue
            one = document, reader.submit(prepare, document).result
            if last is not None:
                yield last
            last = one
        if failure is not None:
            raise failure

    def _prepare(self, document: Document, ratio: Ratio, compression: str, precision: str) -> _Job | Added:
        """Check a document before any work on it; returns `unchanged` if there is none."""
        check_id(document.id)
        text = Text(document.text)
        if not text.value.strip():
            raise InputError(f"document {document.id!r}: the document is empty or blank: there is nothing to compress")
        row = self._row(document.id)
        label = _label(document, row)
        tokens = self.compressor.tokenize(text.value)
        ratios = self._ratios(document.id, len(tokens.ids), ratio, compression)
        if precision == PrecisionRule.AUTO:
            precision = self.store.settings.precision
        if row is not None and self._is_stored(row, text, ratios, compression, precision):
            if row.precision != precision != PrecisionRule.AUTO:
                row = self.store.convert(row.id, precision)
            if label != row.label:
                row = self.store.update(
                    row.id, metadata=label.metadata, tags=label.tags, pinned=label.pinned, expires_at=label.expires_at
                )
            return _added(row, "unchanged", 0.0)
        status: Status = "replaced" if row else "added"
        return _Job(document, text, tokens.offsets, Work(tokens.ids, ratios), compression, precision, status, label)

    def _continue(self, row: DocumentRow, file: StoredFile, text: str, ratio: int | None) -> _Job:
        """Prepare a document that a text is appended to: it is read again from the first window that changes.

        That is one that was not full, or whose tokens differ: the text is tokenized as a whole, since its end may merge
        with what follows into other tokens. All windows change if the method has other parameters now, or if the text
        was cut into other tokens than now.
        """
        header, window = file.header, self.compressor.model.config.beacon_window
        require_made(self.compressor.model, header.fingerprint, row.id, row.precision)
        parameters = self.compressor.parameters(header.compression, _package(header.method))
        before = self.store.text(row.id)
        whole = Text(before + text)
        old, new = self.compressor.tokenize(before), self.compressor.tokenize(whole.value)
        same = next((n for n, (a, b) in enumerate(zip(old.ids, new.ids, strict=False)) if a != b), len(old.ids))
        windows = min(same, len(new.ids)) // window if (header.method or {}) == parameters else 0
        if windows and header.windows[windows - 1].stop != new.offsets[windows * window - 1][1]:
            windows = 0  # it was cut into tokens by other rules
        ratios = [one.ratio for one in header.windows][: -(-len(new.ids) // window)]
        ratios += [ratios[-1] if ratio is None else ratio] * (-(-len(new.ids) // window) - len(ratios))
        kept = file.memory().between(0, sum(one.span for one in header.windows[:windows]))
        return _Job(
            Document(row.id, whole.value),
            whole,
            new.offsets,
            Work(new.ids, self._ratios(row.id, len(new.ids), ratios, row.compression), kept, windows),
            row.compression,
            row.precision or "auto",
            "appended",
            stored=file.kv,
            replacing=row.file,
        )

    def _renew(self, row: DocumentRow, keep_version: bool) -> _Job:
        """Prepare a document to be compressed as before: at the same ratios, if its windows can still be told."""
        # `repair` keeps no version: it has lost the file, and has looked whether the text is an old one
        texts = self.store if keep_version else self.store.parts.catalog().documents
        text = Text(texts.text(row.id))
        tokens = self.compressor.tokenize(text.value)
        ratios: Ratio = row.ratios[0]
        if len(row.ratios) > 1:
            try:
                windows = read_file(self.store.files, row.file, read_header).windows
            except (CorruptFileError, FileNotFoundError):
                windows = ()
            count = -(-len(tokens.ids) // self.compressor.model.config.beacon_window)
            ratios = [window.ratio for window in windows] if len(windows) == count else "auto"
        return _Job(
            Document(row.id, text.value),
            text,
            tokens.offsets,
            Work(tokens.ids, self._ratios(row.id, len(tokens.ids), ratios, row.compression)),
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

    def _ratios(self, id: str, tokens: int, ratio: Ratio, compression: str) -> list[int]:
        try:
            return self.compressor.ratios(tokens, ratio, compression)
        except BeaconMemoryError as error:
            raise type(error)(f"document {id!r}: {error}") from error

    def _is_stored(self, row: DocumentRow, text: Text, ratios: list[int], compression: str, precision: str) -> bool:
        """Tell whether this very text is stored, compressed in this way and by this model, and not too coarsely.

        The row tells, and of the file only that it is there: whether it is sound, `verify` finds out. The file's header
        is read where the windows' ratios differ, and for a row of a time before rows had the parameters of the method.
        """
        wanted = (text.sha256, self.compressor.model.fingerprint.digest, compression, tuple(sorted(set(ratios))))
        if not row.root or (row.content_hash, row.fingerprint, row.compression, row.ratios) != wanted:
            return False
        if precision != PrecisionRule.AUTO and (
            not row.precision or Precision(row.precision).bits < Precision(precision).bits
        ):
            return False
        parameters = self.compressor.parameters(compression)
        try:
            path = self.store.files.fetch(row.file)
            if row.method is not None and len(row.ratios) == 1:
                return row.method == parameters and path.exists()
            header = read_file(self.store.files, row.file, read_header)
        except (FileNotFoundError, CorruptFileError):
            return False
        return header.method in (None, parameters) and [window.ratio for window in header.windows] == ratios

    def _put(self, job: _Job, compressed: CompressedDocument, seconds: float) -> Added:
        """Store a compressed document."""
        breaks = [start for start, _ in split_passages(job.text.value)]
        spans = tuple(
            WindowSpan.of(w.tokens, w.ratio, w.span, job.offsets[w.first : w.first + w.tokens], breaks)
            for w in compressed.windows
        )
        last, model = compressed.windows[-1], self.compressor.model
        header = DocumentHeader(
            id=job.document.id,
            content_hash=job.text.sha256,
            tokens=compressed.tokens,
            windows=spans,
            tail_ids=tuple(job.work.ids[last.first :]) if last.tokens < model.config.beacon_window else (),
            compression=job.compression,
            span=compressed.kv.span,
            fingerprint=model.fingerprint,
            method=self.compressor.parameters(job.compression),
        )
        new = compressed.kv.to("cpu")
        if job.precision == PrecisionRule.AUTO:
            new = new.to(dtype=model.kv_dtype)  # which is coarser where the processor computes in float32 for speed
        kv: StoredKV = new
        if job.stored is not None and job.work.read is not None:
            start = job.work.read.span  # what stands before it stays as it was stored, bit for bit
            behind = new.between(start, new.span)
            if isinstance(job.stored, QuantizedKV):
                kv = job.stored.grown(start, behind, header.window_starts)
            else:
                kv = job.stored.grown(start, behind)
        evicted: list[str] = []
        row = self.store.put(
            header,
            kv,
            job.text,
            job.label,
            precision=job.precision,
            replacing=job.replacing,
            keep_version=job.keep_version,
            on_evicted=lambda gone: evicted.append(gone.id),
        )
        return replace(_added(row, job.status, seconds), evicted=tuple(evicted))


class _Outbox:
    """What becomes of documents, in their order: they are stored in a thread, beside what is computed meanwhile.

    take: called with each that is stored, in the thread of the caller. Errors go to on_error, or are raised; then none
    of those behind is stored.
    """

    def __init__(self, writer: ThreadPoolExecutor, take: OnAdded, on_error: OnError | None) -> None:
        self._writer = writer
        self._take = take
        self._on_error = on_error
        self._broken = False
        self._ids: Counter[str] = Counter()
        self._waiting: deque[tuple[Document, Future[Added | None], int]] = deque()

    def __contains__(self, document: Document) -> bool:
        """Tell whether a document with this id is on its way: entered, and neither settled nor left."""
        return self._ids[str(document.id)] > 0  # which nobody has checked yet

    def enter(self, document: Document) -> None:
        self._ids[str(document.id)] += 1

    def leave(self, document: Document) -> None:
        self._ids[str(document.id)] -= 1

    def put(self, document: Document, nbytes: int, store: Callable[[], Added]) -> None:
        """Store a document in the thread; waits while the K/V that wait for it take too many bytes."""
        self._waiting.append((document, self._writer.submit(self._store, store), nbytes))
        while len(self._waiting) > 1 and sum(size for *_, size in self._waiting) > _MOST_BYTES:
            self._settle_first()
        self.settle()

    def settle(self, *, wait: bool = False) -> None:
        """Take what is stored; wait: until all is."""
        while self._waiting and (wait or self._waiting[0][1].done()):
            self._settle_first()

    def _settle_first(self) -> None:
        document, stored, _ = self._waiting.popleft()
        self.leave(document)
        try:
            added = stored.result()
        except BeaconMemoryError as error:
            _tell(self._on_error, document, error)
        else:
            if added is not None:
                self._take(added)

    def _store(self, store: Callable[[], Added]) -> Added | None:
        if self._broken:
            return None
        try:
            return store()
        except BaseException as error:
            self._broken = self._on_error is None or not isinstance(error, BeaconMemoryError)
            raise


def _same(one: Added) -> Added:
    return one


def _tell(on_error: OnError | None, document: Document, error: BeaconMemoryError) -> None:
    """Hand an error to whoever wants to be told of it, so that the other documents go on; else raise it."""
    if on_error is None:
        raise error
    on_error(document, error)


def _package(method: Mapping[str, str | int] | None) -> str | None:
    """Return the package that a stored document's method came with, if it was not built in."""
    package = (method or {}).get(PACKAGE)
    return package if isinstance(package, str) else None


def _label(document: Document, row: DocumentRow | None) -> Label:
    """Return the label that a document shall have: the given parts of it, else those that it has already."""
    given: dict[str, Any] = {
        "metadata": document.metadata,
        "tags": document.tags,
        "pinned": document.pinned,
        "expires_at": document.expires_at,
    }
    return replace(row.label if row else Label(), **{name: one for name, one in given.items() if one is not None})


def _added(row: DocumentRow, status: Status, seconds: float) -> Added:
    return Added(row.id, status, row.tokens, row.slots, row.bytes, row.ratios, row.compression, row.precision, seconds)
