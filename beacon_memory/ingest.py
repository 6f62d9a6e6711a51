"""Documents on their way into a store: prepared, compressed, put away."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from beacon_memory.compression.compressor import PACKAGE, BeaconCompressor
from beacon_memory.compression.work import CompressedDocument, Ratio, TokenizedText, Work
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.modeling.model import require_made
from beacon_memory.storage.catalog.passages import split_passages
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.header import DocumentHeader, WindowSpan
from beacon_memory.storage.files.kv_file import StoredFile
from beacon_memory.storage.files.stored_kv import StoredKV, WindowedKV
from beacon_memory.storage.store import MemoryStore
from beacon_memory.storage.unfinished import UnfinishedDocument

from .documents import Document, Label, Precision, PrecisionRule, Text, check_id, content_hash, utc_now
from .errors import (
    BeaconMemoryError,
    ConfigError,
    ConflictError,
    CorruptFileError,
    DocumentNotFoundError,
    InputError,
    StoreError,
)
from .outbox import OnAdded, OnError, Outbox, tell
from .results import Added, Progress, Status

__all__ = ["Ingestion"]

_MOST_IN_RAM = 16  # windows of a document; what is read of a longer one is kept on disk until it is stored
_TRIES = 5  # times that a document may be changed by others while it is being continued


@dataclass(frozen=True, slots=True)
class _Job:
    """A document that is being compressed.

    offsets:   where each token of `work` starts and stops in the text, in characters.
    stored:    the K/V that the document had, if it grows.
    replacing: the row whose K/V the document must still have when it is stored, if that matters.
    unfinished: where the memories of its windows are on disk, if they are.
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
    replacing: DocumentRow | None = None
    keep_version: bool = False
    unfinished: UnfinishedDocument | None = None


@dataclass(frozen=True, slots=True)
class _Made:
    """A document as it is to be stored; for the other fields see `_Job`.

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

    def preview(self, document: Document, ratio: Ratio, compression: str, precision: str) -> tuple[Status, int]:
        """Tell what `add_many` would make of a document, and how many tokens it has; raises what it would raise."""
        compression = self.compressor.compression(compression)
        text, tokens, ratios = self._tokenized(document, ratio, compression)
        row = self._row(document.id)
        if row is None:
            return "added", len(tokens.ids)
        stored = self._is_stored(row, text, ratios, compression, self._wanted(precision))
        return "unchanged" if stored else "replaced", len(tokens.ids)

    def append(self, id: str, text: str, ratio: int | None) -> Added:
        """Append a text to a document, as `BeaconMemory.append` does."""
        Text(text)  # refuses what has no UTF-8 form
        if ratio is not None:
            self.compressor.model.config.require_ratio(ratio)

        def grow(row: DocumentRow, file: StoredFile) -> _Made | None:
            if not text:
                return None
            before = self.store.text(row.id)
            made = self._read_raw(row, file, before, text, ratio)
            return made or self._compressed(self._continue(row, file, before, text, ratio, "appended"))

        return self._change(id, grow, "a text was appended")

    def compact(self, id: str) -> Added:
        """Compress what was appended to a document, as `BeaconMemory.compact` does."""

        def settle(row: DocumentRow, file: StoredFile) -> _Made | None:
            if file.header.settled == file.header.windows:
                return None
            return self._compressed(self._continue(row, file, self.store.text(id), "", None, "compacted"))

        row = self.store.row(id)
        if 0 not in row.ratios:  # so its file need not be read
            return _added(row, "unchanged", 0.0)
        return self._change(id, settle, "it was compacted")

    def _change(self, id: str, change: Callable[[DocumentRow, StoredFile], _Made | None], what: str) -> Added:
        """Store what `change` makes of a document, None to leave it; what others store meanwhile is changed instead."""
        for _ in range(_TRIES):
            row, file = self.store.read(id)
            started = time.perf_counter()
            made = change(row, file)
            if made is None:
                return _added(row, "unchanged", 0.0)
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
                self.compressor.parameters(compression, _package(next(iter(by_id.values())).method))
            except ConfigError as error:  # the method is not installed, or not for this model
                for id in by_id:
                    tell(on_error, Document(id, ""), error)
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

        with contextlib.ExitStack() as opened, ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as reader:
            outbox = Outbox(writer, take, on_error)

            def jobs() -> Iterator[tuple[_Job, Work]]:
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
        prepare: Callable[[Document], _Job | Added],
        outbox: Outbox,
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
        text, tokens, ratios = self._tokenized(document, ratio, compression)
        row = self._row(document.id)
        label, precision = _label(document, row), self._wanted(precision)
        if row is not None and self._is_stored(row, text, ratios, compression, precision):
            if row.precision != precision != PrecisionRule.AUTO:
                row = self.store.convert(row.id, precision)
            if label != row.label:
                row = self.store.update(
                    row.id, metadata=label.metadata, tags=label.tags, pinned=label.pinned, expires_at=label.expires_at
                )
            return _added(row, "unchanged", 0.0)
        status: Status = "replaced" if row else "added"
        job = _Job(document, text, tokens.offsets, Work(tokens.ids, ratios), compression, precision, status, label)
        return (self._compacting(row, job) if row is not None else None) or self._on_disk(job)

    def _tokenized(self, document: Document, ratio: Ratio, compression: str) -> tuple[Text, TokenizedText, list[int]]:
        """Check a document; returns its text, the tokens of that, and the ratio of each window."""
        check_id(document.id)
        text = Text(document.text)
        if not text.value.strip():
            raise InputError(f"document {document.id!r}: the document is empty or blank: there is nothing to compress")
        tokens = self.compressor.tokenize(text.value)
        return text, tokens, self._ratios(document.id, len(tokens.ids), ratio, compression)

    def _wanted(self, precision: str) -> str:
        return self.store.settings.precision if precision == PrecisionRule.AUTO else precision

    def _on_disk(self, job: _Job) -> _Job:
        """Keep what is read of a long document on disk, where an interrupted compression may have left the begin."""
        if len(job.work.ratios) <= _MOST_IN_RAM:
            return job
        model = self.compressor.model
        decides = {
            "id": job.document.id,
            "content_hash": job.text.sha256,
            "fingerprint": model.fingerprint.digest,
            "dtype": str(model.dtype),
            "compression": job.compression,
            "method": self.compressor.parameters(job.compression),
            "ratios": list(job.work.ratios),
        }
        unfinished = self.store.unfinished(decides)
        return replace(job, work=replace(job.work, parts=unfinished), unfinished=unfinished)

    def _read_raw(self, row: DocumentRow, file: StoredFile, before: str, text: str, ratio: int | None) -> _Made | None:
        """Read a text that is appended to a document, and nothing else: all its tokens are kept until they are due.

        Returns None where windows are to be read anew at once: because the last one is full with it, because there is
        no room for so many slots, or because all of them change, see `_continue`.
        """
        header, window = file.header, self.compressor.model.config.beacon_window
        require_made(self.compressor.model, header.fingerprint, row.id, row.precision)
        parameters = self.compressor.parameters(header.compression, _package(header.method))
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
        due = _for_windows(-(-(header.tokens + count) // window), _due(header, window), ratio)[-1]
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

    def _continue(
        self, row: DocumentRow, file: StoredFile, before: str, text: str, ratio: int | None, status: Status
    ) -> _Job:
        """Prepare a document that a text is appended to: it is read again from the first window that changes.

        That is one that was not full, or whose tokens differ: the text is tokenized as a whole, since its end may merge
        with what follows into other tokens. All windows change if the method has other parameters now, or if the text
        was cut into other tokens than now.
        """
        header, window = file.header, self.compressor.model.config.beacon_window
        require_made(self.compressor.model, header.fingerprint, row.id, row.precision)
        parameters = self.compressor.parameters(header.compression, _package(header.method))
        settled, whole = header.settled, Text(before + text)
        read = before if settled == header.windows else before[: header.windows[len(settled)].start]
        old, new = self.compressor.tokenize(read), self.compressor.tokenize(whole.value)
        same = next((n for n, (a, b) in enumerate(zip(old.ids, new.ids, strict=False)) if a != b), len(old.ids))
        windows = min(same, len(new.ids)) // window if (header.method or {}) == parameters else 0
        if windows and [one.stop for one in settled[windows - 1 : windows]] != [new.offsets[windows * window - 1][1]]:
            windows = 0  # it was cut into tokens by other rules
        ratios = _for_windows(-(-len(new.ids) // window), _due(header, window), ratio)
        kept = file.memory().between(0, sum(one.span for one in header.windows[:windows]))
        return _Job(
            Document(row.id, whole.value),
            whole,
            new.offsets,
            Work(new.ids, self._ratios(row.id, len(new.ids), ratios, row.compression), kept, windows),
            row.compression,
            row.precision or "auto",
            status,
            stored=file.kv,
            replacing=row,
        )

    def _renew(self, row: DocumentRow, keep_version: bool) -> _Job:
        """Prepare a document to be compressed as before: at the same ratios, if its windows can still be told."""
        # `repair` keeps no version: it has lost the file, and has looked whether the text is an old one
        texts = self.store if keep_version else self.store.parts.catalog().documents
        text = Text(texts.text(row.id))
        tokens = self.compressor.tokenize(text.value)
        ratios: Ratio = row.ratios[0]
        if len(row.ratios) > 1:
            window = self.compressor.model.config.beacon_window
            compressed = [ratio for ratio in row.ratios if ratio]  # 0 may be of what was appended
            ratios = compressed[0] if len(compressed) == 1 else "auto"
            with contextlib.suppress(CorruptFileError, DocumentNotFoundError):
                due = _due(self.store.index(row)[1].header, window)
                ratios = due if len(due) == -(-len(tokens.ids) // window) else "auto"
        job = _Job(
            Document(row.id, text.value),
            text,
            tokens.offsets,
            Work(tokens.ids, self._ratios(row.id, len(tokens.ids), ratios, row.compression)),
            row.compression,
            row.precision or "auto",
            "recompressed",
            replacing=row,
            keep_version=keep_version,
        )
        return self._on_disk(job)

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

    def _compacting(self, row: DocumentRow, job: _Job) -> _Job | None:
        """Prepare a document to be compacted where that is what `job` would make of it; None where it is not."""
        wanted = (job.text.sha256, self.compressor.model.fingerprint.digest, job.compression)
        if (row.content_hash, row.fingerprint, row.compression) != wanted or 0 not in row.ratios:
            return None
        try:
            row, file = self.store.read(row)
        except CorruptFileError:
            return None
        header = file.header
        if header.content_hash != job.text.sha256 or header.settled == header.windows:
            return None
        if _due(header, self.compressor.model.config.beacon_window) != job.work.ratios or _coarser(row, job.precision):
            return None
        compacting = self._continue(row, file, job.text.value, "", None, "compacted")
        kept = compacting.precision if job.precision == PrecisionRule.AUTO else job.precision
        return replace(compacting, label=job.label, precision=kept, replacing=None)

    def _is_stored(self, row: DocumentRow, text: Text, ratios: list[int], compression: str, precision: str) -> bool:
        """Tell whether this very text is stored, compressed in this way and by this model, and not too coarsely.

        The row tells, and of the file only that it is there: whether it is sound, `verify` finds out. The file's header
        is read where the windows' ratios differ, and for a row of a time before rows had the parameters of the method.
        """
        wanted = (text.sha256, self.compressor.model.fingerprint.digest, compression, tuple(sorted(set(ratios))))
        if not row.root or (row.content_hash, row.fingerprint, row.compression, row.ratios) != wanted:
            return False
        if _coarser(row, precision):
            return False
        parameters = self.compressor.parameters(compression)
        try:
            if row.method is not None and len(row.ratios) == 1 and 0 not in row.ratios:
                return row.method == parameters and self.store.has_file(row)
            now, index = self.store.index(row)
        except (FileNotFoundError, CorruptFileError, DocumentNotFoundError):
            return False
        header = index.header
        whole = now.root == row.root and header.settled == header.windows
        return whole and [window.ratio for window in header.windows] == ratios and header.method in (None, parameters)

    def _compressed(self, job: _Job) -> _Made:
        return self._made(job, self.compressor.compress_one(job.work, compression=job.compression))

    def _made(self, job: _Job, compressed: CompressedDocument) -> _Made:
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

    def _store(self, job: _Job, compressed: CompressedDocument, seconds: float) -> Added:
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
        return replace(_added(row, made.status, seconds), evicted=tuple(evicted))


def _same(one: Added) -> Added:
    return one


def _coarser(row: DocumentRow, precision: str) -> bool:
    """Tell whether a document is kept more coarsely than it shall be."""
    if precision == PrecisionRule.AUTO:
        return False
    return not row.precision or Precision(row.precision).bits < Precision(precision).bits


def _grown(stored: StoredKV, start: int, new: MemoryKV, header: DocumentHeader) -> StoredKV:
    """Return K/V with `new` in place of everything from position `start` on, for a document with this header."""
    if isinstance(stored, QuantizedKV):
        return stored.grown(start, new, header.window_starts)
    return stored.grown(start, new)


def _due(header: DocumentHeader, window: int) -> list[int]:
    """Return the ratios that the windows of a document have once all of them are compressed.

    What is due to be compressed and an incomplete window before it are one window.
    """
    ratios = [one.ratio for one in header.settled]
    if sum(one.tokens for one in header.settled) % window == 0:
        ratios += [one.due for one in header.windows[len(ratios) :][:1] if one.due is not None]
    return ratios


def _for_windows(count: int, ratios: list[int], ratio: int | None) -> list[int]:
    """Return `count` ratios: those of the first windows, and `ratio` for others, by default that of the last one."""
    return ratios[:count] + [ratios[-1] if ratio is None else ratio] * (count - len(ratios))


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
