"""Documents whose K/V files others write: workers on many machines publish them, and one writer lets the rows follow.

    name, = deliveries.reserve([header.id])                       # the writer: from now on the file is on its way
    delivery = deliver(files, name, header, kv, text, label)      # a worker: the file is on disk, or in the bucket
    taken, = deliveries.take([delivery])                          # the writer: the row is on disk

A worker needs the place of the files and nothing else. The writer alone has the catalog, and commits the rows of many
documents at once. What a crash leaves are files that are marked as on their way, as of any document that was being
stored: `repair` removes them. If it does so while a worker is still at it, the document is refused, to be made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from beacon_memory.documents import Label, Precision, Text
from beacon_memory.errors import BeaconMemoryError, ConflictError
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.connections import may_come_back
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.access import Files
from beacon_memory.storage.files.durable import identity, unlink
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.kv_file import stage_kv_file
from beacon_memory.storage.files.marks import mark_of
from beacon_memory.storage.files.names import number_of
from beacon_memory.storage.files.stored_kv import StoredKV, WindowedKV, precision_of

from .publishing import NewFile, Publisher, write_label
from .store import MemoryStore, put_row

__all__ = ["Deliveries", "Delivery", "Taken", "deliver"]

_LABELS_AT_ONCE = 8  # each waits for the disk or the network


@dataclass(frozen=True, slots=True)
class Delivery:
    """A document whose K/V file is published and whose row is not written yet.

    name, root, nbytes: of the file, see `StagedFile`.
    label: None for the one that the document has already.
    """

    name: str
    root: str
    nbytes: int
    header: DocumentHeader
    precision: Precision
    text: Text
    label: Label | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """A document that is stored: its row, and the ids of those that had to go for it, see `Settings.quota`."""

    row: DocumentRow
    evicted: tuple[str, ...] = ()


def deliver(
    files: Files, name: str, header: DocumentHeader, kv: StoredKV | WindowedKV, text: Text, label: Label | None = None
) -> Delivery:
    """Write and publish a K/V file under a reserved name; header and K/V: as `MemoryStore.fitting` returns them.

    When this returns, the file outlasts a power cut. Raises as `stage_kv_file`, and StoreError if it cannot be
    published; nothing is left behind then.
    """
    files.make_staging()
    staged = stage_kv_file(files.staging, header, kv, text)
    try:
        files.publish(staged.path, name)
    finally:
        unlink(staged.path)
    return Delivery(name, staged.root, staged.nbytes, header, precision_of(kv), text, label)


class Deliveries:
    """The writer's side: names for files, and rows for those that have arrived."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._parts = store.parts
        self._publisher = Publisher(store.parts)

    def reserve(self, ids: Sequence[str]) -> list[str]:
        """Return names for new K/V files of these documents; `take` or `release` each. Raises InputError for an id."""
        return self._publisher.reserve(ids)

    def take(self, deliveries: Sequence[Delivery]) -> list[Taken | BeaconMemoryError]:
        """Store documents whose files have arrived, all of them in one transaction, as `MemoryStore.put` does each.

        Returns what became of each. One that was taken before is not stored twice. Errors: ConflictError for a file
        that `repair` has removed meanwhile, and all that `put` raises; the files of these documents are removed.
        """
        self._store.uses.flush()  # eviction goes by it
        try:
            with self._parts.writing(create=True) as catalog:
                return self._take(catalog, self._parts.files, deliveries)
        except BeaconMemoryError as error:
            if may_come_back(error):
                self._parts.catalog().overwrite()
            if len(deliveries) == 1:
                self.release([deliveries[0].name])
                return [error]
        return [found for delivery in deliveries for found in self.take([delivery])]

    def release(self, names: Iterable[str]) -> None:
        """Remove files whose names were reserved, and that no row names: nobody delivers them any more."""
        with self._parts.writing(create=True) as catalog:
            files = self._parts.files
            for name in names:
                named = catalog.file_names.beginning(name.rpartition("-")[0])
                if name in named or self._publisher.remove([name]):
                    unlink(mark_of(files, name))

    def _take(self, catalog: Catalog, files: Files, deliveries: Sequence[Delivery]) -> list[Taken | BeaconMemoryError]:
        done: list[Taken | BeaconMemoryError] = []
        new: list[NewFile] = []
        with catalog.transaction():
            on_their_way = catalog.file_names.begun() if catalog.shared else None
            for one in deliveries:
                known = catalog.documents.get(one.header.id)
                if known is not None and known.file == one.name:  # the answer was lost on the way
                    done.append(Taken(known))
                    continue
                marked = identity(mark_of(files, one.name)) is not None
                if not marked or (on_their_way is not None and number_of(one.name) not in on_their_way):
                    done.append(
                        ConflictError(
                            f"the K/V file of {one.header.id!r} was removed by `repair` before its row was written; "
                            "add the document again"
                        )
                    )
                    continue
                file = NewFile(catalog, one.name, one.root, one.nbytes)
                try:
                    with catalog.transaction():  # of its own: what cannot be stored leaves the others
                        quota = self._store.settings.quota
                        row, evicted = put_row(file, one.header, one.precision, one.text, one.label, quota)
                except BeaconMemoryError as error:
                    done.append(error)
                else:
                    new.append(file)
                    done.append(Taken(row, tuple(gone.id for gone in evicted)))
            superseded = [name for file in new for name in file.superseded]
            rows = [found.row for found in done if isinstance(found, Taken) and found.row.file not in superseded]
            with ThreadPoolExecutor(_LABELS_AT_ONCE) as threads:
                list(threads.map(lambda row: write_label(self._parts, row), rows))
        for file in new:
            unlink(mark_of(files, file.name))
        self._publisher.remove(superseded)
        self.release([one.name for one, found in zip(deliveries, done, strict=True) if not isinstance(found, Taken)])
        return done
