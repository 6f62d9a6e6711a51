"""A worker: one model, to which batches of documents come. What it makes is put into the store's files at once."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs
import pyarrow as pa

from beacon_memory.compression.work import Ratio
from beacon_memory.documents import KEEP, Document, Keep, Label, PrecisionRule, Text
from beacon_memory.errors import (
    BeaconMemoryError,
    ConflictError,
    CorruptFileError,
    DocumentNotFoundError,
    InputError,
    StoreError,
)
from beacon_memory.ingest import Ingestion
from beacon_memory.load_once import ModelSource
from beacon_memory.results import Added
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.deliveries import Delivery, Taken, deliver
from beacon_memory.storage.files.access import Files
from beacon_memory.storage.files.durable import make_folder
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.local import LocalFiles
from beacon_memory.storage.files.names import hash_id
from beacon_memory.storage.files.stored_kv import StoredKV, WindowedKV
from beacon_memory.storage.parts import StoreParts
from beacon_memory.storage.records import row_of
from beacon_memory.storage.settings import Settings, open_files
from beacon_memory.storage.store import MemoryStore
from beacon_memory.storage.unfinished import UnfinishedDocument, remove_unfinished, stale_unfinished

from .rows import REPORTS, document_of, report_of, report_of_error
from .writer import Origin, twice

__all__ = ["How", "Worker", "WorkerStore"]

_HAND_OVER_SECONDS = 10.0  # after which what is finished of a batch is stored: so much work is lost with a worker
_MOST_DEATHS = 3  # of workers that a document may cause
_TRIES = 2  # to write a file: `repair` may have taken the first for a leftover

# A method of the writer by its name, called wherever that is.
Ask = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class How:
    """Say how documents are compressed, as `BeaconMemory.add_many` is told; dry: only tell what would become."""

    ratio: Ratio = "auto"
    compression: str = "auto"
    precision: str = "auto"
    dry: bool = False


class _PartsOfWorker(StoreParts):
    """A store without a catalog: what a worker needs of it was told by the writer."""

    def __init__(self, origin: Origin, cache: Path) -> None:
        in_database = "://" in origin.place
        super().__init__(origin.place, origin.namespace, origin.files, cache if in_database else None)
        # one that has room is found by the writer; and nobody reads here what was written
        self._settings = replace(origin.settings, quota=None, cache_bytes=0)
        folder = self.folder if origin.settings.files is None else cache
        self._worker_files = open_files(self._settings, folder, origin.owner, self._backend)

    @property
    def settings(self) -> Settings:
        return self._settings

    @property
    def files(self) -> Files:
        return self._worker_files

    def catalog(self, *, create: bool = False) -> Catalog:  # noqa: ARG002  # there is none
        raise CorruptFileError(f"a worker has no catalog of {self.catalog_path}: it asks the writer, once a batch")


class WorkerStore(MemoryStore):
    """A store to which documents are added by one worker: rows are those that the writer knew when a batch began.

    `put` writes and publishes a file; the row that it returns is written by `hand_over`, with those of other documents.
    """

    def __init__(self, ask: Ask, origin: Origin) -> None:
        self._scratch = (
            platformdirs.user_cache_path("beacon-memory") / "workers" / hash_id(f"{origin.place} {origin.namespace}")
        )
        make_folder(self._scratch)
        for left in stale_unfinished(self._scratch):
            remove_unfinished(left)
        super().__init__(origin.place, origin.namespace, files=origin.files)
        self.parts = _PartsOfWorker(origin, self._scratch)
        self._ask = ask
        self._rows: Mapping[str, DocumentRow] = {}
        self._made: dict[str, DocumentRow] = {}  # rows that documents have, or will have, since they were put
        self._finished: deque[Delivery] = deque()
        self._taken: dict[str, Taken | BeaconMemoryError] = {}

    def expect(self, rows: Mapping[str, DocumentRow]) -> None:
        """Begin a batch: these are the rows of its documents that have one."""
        self._rows, self._made, self._taken = rows, {}, {}
        self._finished.clear()

    def row(self, id: str, fingerprint: str | None = None) -> DocumentRow:  # noqa: ARG002  # as MemoryStore.row
        """Return the row of a document, as the writer knew it when the batch began."""
        found = self._made.get(id) or self._rows.get(id)
        if found is None:
            raise DocumentNotFoundError(f"no document {id!r} is stored")
        return found

    def has_file(self, row: DocumentRow) -> bool:
        """Tell whether the first file that a row names is there; in object storage the row is believed."""
        return not isinstance(self.files, LocalFiles) or super().has_file(row)

    def put(
        self,
        header: DocumentHeader,
        kv: StoredKV | WindowedKV,
        text: Text | str,
        label: Label | None = None,
        *,
        precision: str = PrecisionRule.AUTO,
        created_at: str | None = None,
        replacing: DocumentRow | None = None,
        only_new: bool = False,
        keep_version: bool = False,
        on_evicted: Callable[[DocumentRow], None] = lambda _: None,
    ) -> DocumentRow:
        """Write and publish the file of a document, and return the row that it will have; of a long one, store it."""
        del created_at, replacing, only_new, keep_version, on_evicted  # nobody adds documents with these
        text = Text.of(text)
        header, kv = self.fitting(header, kv, text, precision)
        one = self._delivered(header, kv, text, label)
        row = row_of(one.name, one.root, header, one.precision, one.nbytes, label or Label(), header.created_at)
        self._made[header.id] = row
        self._finished.append(one)
        if isinstance(kv, WindowedKV):  # whose windows are kept on this machine until it is stored
            self.hand_over()
            if isinstance(error := self._taken[header.id], BeaconMemoryError):
                raise error
        return row

    def _delivered(
        self, header: DocumentHeader, kv: StoredKV | WindowedKV, text: Text, label: Label | None
    ) -> Delivery:
        for left in reversed(range(_TRIES)):
            try:
                return deliver(self.files, self._ask("reserve", header.id), header, kv, text, label)
            except StoreError:
                if not left:
                    raise
        raise AssertionError

    def hand_over(self) -> None:
        """Let the writer store what is finished; what became of it is found in `outcome`."""
        finished: list[Delivery] = []
        with contextlib.suppress(IndexError):
            while True:
                finished.append(self._finished.popleft())
        if finished:
            for one, taken in zip(finished, self._ask("take", finished), strict=True):
                self._taken[one.header.id] = taken
                if isinstance(taken, BeaconMemoryError):
                    del self._made[one.header.id]

    def outcome(self, id: str) -> Taken | BeaconMemoryError | None:
        """Return what became of a document that was handed over; None for one that was not."""
        return self._taken.get(id)

    def convert(self, id: str, precision: str) -> DocumentRow:
        """Let the writer keep a document in another precision."""
        row: DocumentRow = self._ask("convert", id, precision)
        return row

    def update(
        self,
        id: str,
        *,
        metadata: Mapping[str, object] | Keep = KEEP,
        tags: Iterable[str] | Keep = KEEP,
        pinned: bool | Keep = KEEP,
        expires_at: str | Keep | None = KEEP,
    ) -> DocumentRow:
        """Let the writer give a document another label, all of it."""
        label = {"metadata": metadata, "tags": tags, "pinned": pinned, "expires_at": expires_at}
        row: DocumentRow = self._ask("update", id, label)
        return row

    def unfinished(self, decides: Mapping[str, object]) -> UnfinishedDocument:
        """Return what was read of a long document on this machine."""
        return UnfinishedDocument(self._scratch, decides)


class Worker:
    """Compress batches of documents, tables with the columns of `document_of`, and tell what became of each.

    A batch may come again, after its worker has died: what was stored of it is unchanged then, and the rest is done one
    by one, so that a document whose workers die is found out, and left out. All but that is Ray's to do.
    """

    def __init__(self, ask: Ask, source: ModelSource, how: How) -> None:
        self._ask, self._how = ask, how
        self._stopped: BeaconMemoryError | None = None
        try:
            compressor = source.load()
            self._store = WorkerStore(ask, ask("origin"))
            self._ingestion = Ingestion(self._store, compressor)
            compressor.compression(how.compression)
        except BeaconMemoryError as error:  # raised here, Ray would try for ever
            self._stopped = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return a table of `REPORTS`."""
        if self._stopped is not None:
            return _table([report_of_error("", self._stopped, "stopped")])
        given = [(str(row.get("id")), row) for row in batch.to_pylist()]
        rows = dict(reversed(given))  # of two texts the first
        others = [id for id, row in given if row.get("text") != rows[id].get("text")]
        reports = [report_of_error(id, twice(id)) for id in others]
        known = self._ask("begin", {id: _sha256(row.get("text")) for id, row in rows.items()})
        documents, begun = [], {}
        for id, row in reversed(rows.items()):
            try:
                if isinstance(found := known[id], BeaconMemoryError):
                    raise found
                documents.append(document_of(row, found.row.metadata if found.row else {}))
                begun[id] = found.begun
            except BeaconMemoryError as error:
                reports.append(report_of_error(id, error))
        self._store.expect({one.id: row for one in documents if (row := known[one.id].row)})
        left = {one.id: one for one in documents}
        for report in self._together([one for one in documents if not begun[one.id]]):
            reports.append(report)
            del left[report["id"]]
        self._ask("end", [id for id in rows if id not in left])
        for id, one in left.items():
            reports.append(self._alone(one, begun[id]))
            self._ask("end", [id])
        return _table(reports)

    def _together(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """Do documents together; returns what became of them, but of those that are to be done again."""
        done: dict[str, Added | BeaconMemoryError] = {}
        with contextlib.suppress(Exception):  # of one document, which shows when each is done alone
            self._do(documents, done)
        self._store.hand_over()
        return [report for id, one in done.items() if (report := self._report(id, one))]

    def _alone(self, document: Document, begun: int) -> dict[str, Any]:
        """Do a document by itself, and count who dies of it."""
        if begun > _MOST_DEATHS:
            error = StoreError(
                f"{begun} workers have died while they read {document.id!r}: is there memory enough? Cut the document "
                "into several, or give each worker more"
            )
            return report_of_error(document.id, error)
        if begun:
            self._ask("begin_again", document.id)
        done: dict[str, Added | BeaconMemoryError] = {}
        try:
            for _ in range(_TRIES):
                self._do([document], done)
                self._store.hand_over()
                if report := self._report(document.id, done[document.id]):
                    return report
            raise ConflictError(f"the K/V file of {document.id!r} was removed {_TRIES} times; add it again later")
        except Exception as error:  # noqa: BLE001  # whatever it is, the other documents go on
            return report_of_error(document.id, error)

    def _do(self, documents: Sequence[Document], done: dict[str, Added | BeaconMemoryError]) -> None:
        """Add documents, and note what became of each; what is finished is handed over now and then."""
        how, handed_over = self._how, time.monotonic()

        def added(one: Added) -> None:
            nonlocal handed_over
            done[one.id] = one
            if time.monotonic() - handed_over > _HAND_OVER_SECONDS:
                self._store.hand_over()
                handed_over = time.monotonic()

        def failed(document: Document, error: BeaconMemoryError) -> None:
            done[document.id] = error

        if not how.dry:
            ways = how.ratio, how.compression, how.precision
            self._ingestion.add_many(documents, *ways, lambda _: None, added, failed)
            return
        for one in documents:
            try:
                done[one.id] = self._previewed(one)
            except BeaconMemoryError as error:
                failed(one, error)

    def _previewed(self, document: Document) -> Added:
        how = self._how
        status, tokens = self._ingestion.preparation.preview(document, how.ratio, how.compression, how.precision)
        compression = self._ingestion.compressor.compression(how.compression)
        return Added(document.id, status, tokens, 0, 0, (), compression, how.precision, 0.0)

    def _report(self, id: str, done: Added | BeaconMemoryError) -> dict[str, Any] | None:
        """Return what became of a document; None if `repair` took its file for a leftover: then it is done again."""
        outcome = self._store.outcome(id)
        if isinstance(done, BeaconMemoryError):
            return report_of_error(id, done)
        if isinstance(outcome, BeaconMemoryError):
            return None if isinstance(outcome, ConflictError) else report_of_error(id, outcome)
        return report_of(done if outcome is None else replace(done, evicted=outcome.evicted))


def _sha256(text: object) -> str:
    try:
        return Text(text).sha256  # type: ignore[arg-type]  # which it refuses
    except InputError:  # which is said when its turn comes
        return ""


def _table(reports: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(reports, schema=REPORTS)
