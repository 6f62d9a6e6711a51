"""Jobs: what has to be read of a document, and how, before it can be stored."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from beacon_memory.compression.compressor import PACKAGE, BeaconCompressor
from beacon_memory.compression.work import Ratio, TokenizedText, Work
from beacon_memory.modeling.model import require_made
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.kv_file import StoredFile
from beacon_memory.storage.files.stored_kv import StoredKV
from beacon_memory.storage.store import MemoryStore
from beacon_memory.storage.unfinished import UnfinishedDocument

from .documents import Document, Label, Precision, PrecisionRule, Text, check_id
from .errors import BeaconMemoryError, CorruptFileError, DocumentNotFoundError, InputError
from .results import Added, Status

__all__ = ["Job", "Preparation", "as_added", "due_ratios", "for_windows", "package_of"]

_MOST_IN_RAM = 16  # windows of a document; what is read of a longer one is kept on disk until it is stored


@dataclass(frozen=True, slots=True)
class Job:
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


class Preparation:
    """Make jobs of documents: of new ones, and of those that a store has."""

    def __init__(self, store: MemoryStore, compressor: BeaconCompressor) -> None:
        self.store = store
        self.compressor = compressor

    def prepare(self, document: Document, ratio: Ratio, compression: str, precision: str) -> Job | Added:
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
            return as_added(row, "unchanged", 0.0)
        status: Status = "replaced" if row else "added"
        job = Job(document, text, tokens.offsets, Work(tokens.ids, ratios), compression, precision, status, label)
        return (self._compacting(row, job) if row is not None else None) or self._on_disk(job)

    def preview(self, document: Document, ratio: Ratio, compression: str, precision: str) -> tuple[Status, int]:
        """Tell what `add_many` would make of a document, and how many tokens it has; raises what it would raise."""
        compression = self.compressor.compression(compression)
        text, tokens, ratios = self._tokenized(document, ratio, compression)
        row = self._row(document.id)
        if row is None:
            return "added", len(tokens.ids)
        stored = self._is_stored(row, text, ratios, compression, self._wanted(precision))
        return "unchanged" if stored else "replaced", len(tokens.ids)

    def continued(
        self, row: DocumentRow, file: StoredFile, before: str, text: str, ratio: int | None, status: Status
    ) -> Job:
        """Prepare a document that a text is appended to: it is read again from the first window that changes.

        That is one that was not full, or whose tokens differ: the text is tokenized as a whole, since its end may merge
        with what follows into other tokens. All windows change if the method has other parameters now, or if the text
        was cut into other tokens than now.
        """
        header, window = file.header, self.compressor.model.config.beacon_window
        require_made(self.compressor.model, header.fingerprint, row.id, row.precision)
        parameters = self.compressor.parameters(header.compression, package_of(header.method))
        settled, whole = header.settled, Text(before + text)
        read = before if settled == header.windows else before[: header.windows[len(settled)].start]
        old, new = self.compressor.tokenize(read), self.compressor.tokenize(whole.value)
        same = next((n for n, (a, b) in enumerate(zip(old.ids, new.ids, strict=False)) if a != b), len(old.ids))
        windows = min(same, len(new.ids)) // window if (header.method or {}) == parameters else 0
        if windows and [one.stop for one in settled[windows - 1 : windows]] != [new.offsets[windows * window - 1][1]]:
            windows = 0  # it was cut into tokens by other rules
        ratios = for_windows(-(-len(new.ids) // window), due_ratios(header, window), ratio)
        kept = file.memory().between(0, sum(one.span for one in header.windows[:windows]))
        return Job(
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

    def renewed(self, row: DocumentRow, keep_version: bool) -> Job:
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
                due = due_ratios(self.store.index(row)[1].header, window)
                ratios = due if len(due) == -(-len(tokens.ids) // window) else "auto"
        job = Job(
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

    def _compacting(self, row: DocumentRow, job: Job) -> Job | None:
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
        if due_ratios(header, self.compressor.model.config.beacon_window) != job.work.ratios or _coarser(
            row, job.precision
        ):
            return None
        compacting = self.continued(row, file, job.text.value, "", None, "compacted")
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

        def alike(method: Mapping[str, str | int] | None) -> bool:
            return method == self.compressor.choosing_as(method).parameters(compression)

        try:
            if row.method is not None and len(row.ratios) == 1 and 0 not in row.ratios:
                return alike(row.method) and self.store.has_file(row)
            now, index = self.store.index(row)
        except (FileNotFoundError, CorruptFileError, DocumentNotFoundError):
            return False
        header = index.header
        whole = now.root == row.root and header.settled == header.windows
        same = header.method is None or alike(header.method)
        return whole and same and [window.ratio for window in header.windows] == ratios

    def _tokenized(self, document: Document, ratio: Ratio, compression: str) -> tuple[Text, TokenizedText, list[int]]:
        """Check a document; returns its text, the tokens of that, and the ratio of each window."""
        check_id(document.id)
        text = Text(document.text)
        if not text.value.strip():
            raise InputError(f"document {document.id!r}: the document is empty or blank: there is nothing to compress")
        tokens = self.compressor.tokenize(text.value)
        return text, tokens, self._ratios(document.id, len(tokens.ids), ratio, compression)

    def _ratios(self, id: str, tokens: int, ratio: Ratio, compression: str) -> list[int]:
        try:
            return self.compressor.ratios(tokens, ratio, compression)
        except BeaconMemoryError as error:
            raise type(error)(f"document {id!r}: {error}") from error

    def _on_disk(self, job: Job) -> Job:
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

    def _wanted(self, precision: str) -> str:
        return self.store.settings.precision if precision == PrecisionRule.AUTO else precision

    def _row(self, id: str) -> DocumentRow | None:
        try:
            return self.store.row(id)
        except DocumentNotFoundError:
            return None


def as_added(row: DocumentRow, status: Status, seconds: float) -> Added:
    """Return what became of a document that has this row now."""
    return Added(row.id, status, row.tokens, row.slots, row.bytes, row.ratios, row.compression, row.precision, seconds)


def due_ratios(header: DocumentHeader, window: int) -> list[int]:
    """Return the ratios that the windows of a document have once all of them are compressed.

    What is due to be compressed and an incomplete window before it are one window.
    """
    ratios = [one.ratio for one in header.settled]
    if sum(one.tokens for one in header.settled) % window == 0:
        ratios += [one.due for one in header.windows[len(ratios) :][:1] if one.due is not None]
    return ratios


def for_windows(count: int, ratios: list[int], ratio: int | None) -> list[int]:
    """Return `count` ratios: those of the first windows, and `ratio` for others, by default that of the last one."""
    return ratios[:count] + [ratios[-1] if ratio is None else ratio] * (count - len(ratios))


def package_of(method: Mapping[str, str | int] | None) -> str | None:
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


def _coarser(row: DocumentRow, precision: str) -> bool:
    """Tell whether a document is kept more coarsely than it shall be."""
    if precision == PrecisionRule.AUTO:
        return False
    return not row.precision or Precision(row.precision).bits < Precision(precision).bits
