"""The writer: the one process of a job that has the catalog. Workers ask it for rows, and hand over finished documents.

Whoever comes while rows are being committed waits, and all who have waited are committed in the next transaction.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from beacon_memory.errors import BeaconMemoryError, DocumentNotFoundError, InputError
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.deliveries import Deliveries, Delivery, Taken
from beacon_memory.storage.files.backend import FilesBackend
from beacon_memory.storage.settings import Settings
from beacon_memory.storage.store import MemoryStore

__all__ = ["Known", "Origin", "Writer", "twice"]

Results = list[Taken | BeaconMemoryError]


@dataclass(frozen=True, slots=True)
class Origin:
    """Tell a worker where the files of a store lie; for place, namespace and files see `MemoryStore`.

    owner: identity of the catalog, for which the place of the files is reserved.
    """

    place: str
    namespace: str
    files: FilesBackend | str | None
    settings: Settings
    owner: str


@dataclass(frozen=True, slots=True)
class Known:
    """Tell a worker what is known of a document: its row, and how often workers have begun it without an end."""

    row: DocumentRow | None
    begun: int


class Writer:
    """Look rows up, reserve names of files, and write rows; used by many threads at a time."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._deliveries = Deliveries(store)
        self._hashes: dict[str, str] = {}
        self._begun: Counter[str] = Counter()
        self._reserved: set[str] = set()
        self._waiting: list[tuple[Sequence[Delivery], Future[Results]]] = []
        self._committing = threading.Lock()
        self._noting = threading.Lock()

    def origin(self) -> Origin:
        """Return where the files lie; raises StoreError if a store in a database has no place for them."""
        _ = self._store.files
        owner = str(self._store.parts.catalog(create=True).properties.get("identity"))
        given = self._store.parts.given
        return Origin(self._store.place, self._store.namespace, given, self._store.settings, owner)

    def begin(self, hashes: Mapping[str, str]) -> dict[str, Known | BeaconMemoryError]:
        """Look up documents that a worker will work on, by their ids with the sha256 of their texts.

        Those that nobody has begun before count as begun from now on, see `begin_again`. Errors: InputError for an id
        that came with another text before, and CorruptFileError for a damaged row.
        """
        found: dict[str, Known | BeaconMemoryError] = {}
        for id, sha256 in hashes.items():
            with self._noting:
                same = self._hashes.setdefault(id, sha256) == sha256
                begun = self._begun[id]
                self._begun[id] += not begun
            if not same:
                found[id] = twice(id)
                continue
            try:
                found[id] = Known(self._store.row(id), begun)
            except DocumentNotFoundError:
                found[id] = Known(None, begun)
            except BeaconMemoryError as error:
                found[id] = error
        return found

    def begin_again(self, id: str) -> None:
        """Count a document as begun once more, by itself: if its worker dies now, it is the one to blame."""
        with self._noting:
            self._begun[id] += 1

    def end(self, ids: Sequence[str]) -> None:
        """Note that a worker is done with documents, whatever became of them."""
        with self._noting:
            for id in ids:
                del self._begun[id]

    def reserve(self, id: str) -> str:
        """Return a name for a new K/V file of a document."""
        (name,) = self._deliveries.reserve([id])
        with self._noting:
            self._reserved.add(name)
        return name

    def take(self, deliveries: Sequence[Delivery]) -> Results:
        """Store documents whose files have arrived, as `Deliveries.take` does, together with those of others."""
        result: Future[Results] = Future()
        with self._noting:
            self._waiting.append((deliveries, result))
        with self._committing:
            with self._noting:
                waiting, self._waiting = self._waiting, []
            if waiting:  # else whoever held the lock before has taken these along
                self._take(waiting)
        return result.result()

    def _take(self, waiting: Sequence[tuple[Sequence[Delivery], Future[Results]]]) -> None:
        together = [one for deliveries, _ in waiting for one in deliveries]
        try:
            done = self._deliveries.take(together)
        except BaseException as error:
            for _, result in waiting:
                result.set_exception(error)
            raise
        with self._noting:
            self._reserved.difference_update(one.name for one in together)
        for deliveries, result in waiting:
            result.set_result(done[: len(deliveries)])
            done = done[len(deliveries) :]

    def convert(self, id: str, precision: str) -> DocumentRow:
        """Keep a document in another precision, as `MemoryStore.convert` does."""
        return self._store.convert(id, precision)

    def update(self, id: str, label: Mapping[str, object]) -> DocumentRow:
        """Give a document another label, as `MemoryStore.update` does."""
        return self._store.update(id, **label)  # type: ignore[arg-type]  # by name

    def close(self) -> None:
        """End the job: remove the files that no row names, of workers that were lost, and close the store."""
        self._deliveries.release(self._reserved)
        self._reserved = set()
        self._store.close()


def twice(id: str) -> InputError:
    """Return the error for a document that comes with two texts."""
    return InputError(f"the dataset has {id!r} twice, with different texts; give each an id of its own")
