"""Documents on their way into a store: compressed and put away, as they were prepared."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import CompressedDocument, Ratio, Work
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.modeling.model import require_made
from beacon_memory.storage.catalog.passages import split_passages
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.header import DocumentHeader, WindowSpan
from beacon_memory.storage.files.kv_file import StoredFile
from beacon_memory.storage.files.stored_kv import StoredKV, WindowedKV
from beacon_memory.storage.store import MemoryStore

from .documents import Document, Label, Precision, PrecisionRule, Text, content_hash, utc_now
from .errors import (
    BeaconMemoryError,
    ConfigError,
    ConflictError,
    StoreError,
)
from .outbox import OnAdded, OnError, Outbox, tell
from .preparing import Job, Preparation, as_added, due_ratios, for_windows, package_of
from .results import Added, Progress, Status

__all__ = ["Ingestion"]

_TRIES = 5  # times that a document may be changed by others while it is being continued


@dataclass(frozen=True, slots=True)
class _Made:
    """A document as it is to be stored; for the other fields see `Job`.

    behind: the row of the document that header and K/V are put behind, if they are not all of it.
    """

    header: DocumentHeader
    kv: StoredKV | WindowedKV
    text: Text
    precision: str
    status: Status
    label: Label | None = None
    replacing: DocumentRow | None = None
    keep_version: bool = False
    behind: DocumentRow | None = None


class Ingestion:
    """Compress documents and put them into a store."""

    def __init__(self, store: MemoryStore, compressor: BeaconCompressor) -> None:
        self.store = store
        self.compressor = compressor
        self.preparation = Preparation(store, compressor)

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

        def prepare(document: Document) -> Job | Added:
            return self.preparation.prepare(document, ratio, compression, precision)

        given = (one if isinstance(one, Document) else Document(*one) for one in documents)
        ahead = isinstance(documents, Sequence)  # what is at hand can be taken early; others may have to be waited for
        return self._run(given, prepare, compression, progress, on_added, on_error, ahead=ahead)

    def append(self, id: str, text: str, ratio: int | None) -> Added:
        """Append a text to a document, as `BeaconMemory.append` does."""
        Text(text)  # refuses what has no UTF-8 form
        if ratio is not None:
            self.compressor.model.config.require_ratio(ratio)

        def grow(row: DocumentRow, file: StoredFile) -> _Made | None:
            if not text:
                return None
            before, same = self.store.text(row.id), self._choosing_as(file.header)
            made = same._read_raw(row, file, before, text, ratio)
            return made or same._compressed(same.preparation.continued(row, file, before, text, ratio, "appended"))

        return self._change(id, grow, "a text was appended")

    def compact(self, id: str) -> Added:
        """Compress what was appended to a document, as `BeaconMemory.compact` does."""

        def settle(row: DocumentRow, file: StoredFile) -> _Made | None:
            if file.header.settled == file.header.windows:
                return None
            same = self._choosing_as(file.header)
            return same._compressed(same.preparation.continued(row, file, self.store.text(id), "", None, "compacted"))

        row = self.store.row(id)
        if 0 not in row.ratios:  # so its file need not be read
            return as_added(row, "unchanged", 0.0)
        return self._change(id, settle, "it was compacted")

    def _change(self, id: str, change: Callable[[DocumentRow, StoredFile], _Made | None], what: str) -> Added:
        """Store what `change` makes of a document, None to leave it; what others store meanwhile is changed instead."""
        for _ in range(_TRIES):
            row, file = self.store.read(id)
            started = time.perf_counter()
            made = change(row, file)
            if made is None:
                return as_added(row, "unchanged", 0.0)
            with contextlib.suppress(ConflictError):  # somebody else was faster: go on from what they stored
                return self._put(made, time.perf_counter() - started)
        raise StoreError(f"document {id!r} was changed {_TRIES} times while {what}; try again")

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
                self.compressor.parameters(compression, package_of(next(iter(by_id.values())).method))
            except ConfigError as error:  # the method is not installed, or not for this model
                for id in by_id:
                    tell(on_error, Document(id, ""), error)
                continue

            def renew(document: Document, by_id: dict[str, DocumentRow] = by_id) -> Job:
                return self.preparation.renewed(by_id[document.id], keep_versions)

            documents = (Document(id, "") for id in by_id)
            done += self._run(documents, renew, compression, progress, on_added, on_error, ahead=True)
        return done

    def _run(
        self,
        documents: Iterable[Document],
        prepare: Callable[[Document], Job | Added],
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

        with contextlib.ExitStack() as opened, ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as reader:
            outbox = Outbox(writer, take, on_error)

            def jobs() -> Iterator[tuple[Job, Work]]:
                nonlocal begun, read
                for document, prepared in self._prepared(documents, prepare, outbox, reader if ahead else None):
                    try:
                        job = prepared()
                    except BeaconMemoryError as error:
                        outbox.leave(document)
                        tell(on_error, document, error)
                        continue
                    if isinstance(job, Added):
                        outbox.put(document, 0, partial(_same, job))
                    else:
                        begun += len(job.work.ids)
                        read += self.compressor.model.config.beacon_window * job.work.windows_before
                        if job.unfinished is not None:
                            opened.callback(job.unfinished.close)
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
                    store = partial(self._store, job, compressed, now - since)
                    in_ram = 0 if job.unfinished is not None else sum(part.nbytes for part in compressed.parts)
                    outbox.put(job.document, in_ram, store)
                    since = now
            finally:
                outbox.settle(wait=True)
        return added

    def _prepared(
        self,
        documents: Iterable[Document],
        prepare: Callable[[Document], Job | Added],
        outbox: Outbox,
        reader: ThreadPoolExecutor | None,
    ) -> Iterator[tuple[Document, Callable[[], Job | Added]]]:
        """Iterate over documents and what prepares them, which `reader` does while the one before is in use.

        What a document finds in the store must be settled before: one with the id of another that is still on its way,
        or any, where others may have to go for room, is prepared when those before it are stored.
        """
        last: tuple[Document, Callable[[], Job | Added]] | None = None
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

    def _choosing_as(self, header: DocumentHeader) -> Ingestion:
        """Return what goes on choosing tokens as a document's were chosen, where that is left to us."""
        return Ingestion(self.store, self.compressor.choosing_as(header.method))

    def _read_raw(self, row: DocumentRow, file: StoredFile, before: str, text: str, ratio: int | None) -> _Made | None:
        """Read a text that is appended to a document, and nothing else: all its tokens are kept until they are due.

        Returns None where windows are to be read anew at once: because the last one is full with it, because there is
        no room for so many slots, or because all of them change, see `_continue`.
        """
        header, window = file.header, self.compressor.model.config.beacon_window
        require_made(self.compressor.model, header.fingerprint, row.id, row.precision)
        parameters = self.compressor.parameters(header.compression, package_of(header.method))
        last = header.windows[header.tokens // window :] or header.windows[-1:]
        tokens = self.compressor.tokenize_behind(before[last[0].start :], text)
        count = len(tokens.ids)
        full = header.tokens % window + count >= window
        if (
            not count
            or full
            or (header.method or {}) != parameters
            or not self.compressor.fits(header.slots + count, header.compression)
        ):
            return None
        shifted = [(last[0].start + start, last[0].start + stop) for start, stop in tokens.offsets]
        shifted[0] = (len(before), shifted[0][1])
        due = for_windows(-(-(header.tokens + count) // window), due_ratios(header, window), ratio)[-1]
        whole = Text(before + text)
        begin = next((at for one in reversed(header.windows) for _, at in reversed(one.cuts)), 0)
        breaks = [start for start, _ in split_passages(whole.value, begin)]
        added = replace(
            header,
            content_hash=content_hash(text),
            tokens=count,
            windows=(replace(WindowSpan.of(count, 0, count, shifted, breaks), due=due),),
            tail_ids=tuple(tokens.ids),
            span=count,
            created_at=utc_now(),
        )
        raw = self.compressor.read_raw(file.memory(), tokens.ids).to("cpu")
        return _Made(added, raw, whole, row.precision, "appended", behind=row)

    def _compressed(self, job: Job) -> _Made:
        return self._made(job, self.compressor.compress_one(job.work, compression=job.compression))

    def _made(self, job: Job, compressed: CompressedDocument) -> _Made:
        """Describe a compressed document, with the K/V that stay as they were stored."""
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
            span=sum(one.span for one in spans),
            fingerprint=model.fingerprint,
            method=self.compressor.parameters(job.compression),
        )
        if job.unfinished is not None:
            precision = Precision(str(model.kv_dtype).removeprefix("torch."))
            kv: StoredKV | WindowedKV = WindowedKV(job.unfinished, precision)
        else:
            kv = new = compressed.kv.to("cpu")
            if job.precision == PrecisionRule.AUTO:  # coarser where the processor computes in float32 for speed
                kv = new = new.to(dtype=model.kv_dtype)
            if job.stored is not None and job.work.read is not None:
                start = job.work.read.span  # what stands before it stays as it was stored, bit for bit
                kv = _grown(job.stored, start, new.between(start, new.span), header)
        return _Made(header, kv, job.text, job.precision, job.status, job.label, job.replacing, job.keep_version)

    def _store(self, job: Job, compressed: CompressedDocument, seconds: float) -> Added:
        added = self._put(self._made(job, compressed), seconds)
        if job.unfinished is not None:
            job.unfinished.remove()
        return added

    def _put(self, made: _Made, seconds: float) -> Added:
        """Store a document."""
        evicted: list[str] = []

        def on_evicted(gone: DocumentRow) -> None:
            evicted.append(gone.id)

        if made.behind is not None and not isinstance(made.kv, WindowedKV):  # what goes behind a document is short
            row = self.store.append(made.behind, made.header, made.kv, made.text, on_evicted=on_evicted)
        else:
            row = self.store.put(
                made.header,
                made.kv,
                made.text,
                made.label,
                precision=made.precision,
                replacing=made.replacing,
                keep_version=made.keep_version,
                on_evicted=on_evicted,
            )
        return replace(as_added(row, made.status, seconds), evicted=tuple(evicted))


def _same(one: Added) -> Added:
    return one


def _grown(stored: StoredKV, start: int, new: MemoryKV, header: DocumentHeader) -> StoredKV:
    """Return K/V with `new` in place of everything from position `start` on, for a document with this header."""
    if isinstance(stored, QuantizedKV):
        return stored.grown(start, new, header.window_starts)
    return stored.grown(start, new)
