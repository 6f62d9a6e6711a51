"""Removing documents that nobody removes by hand: those over the quota, and those that have expired."""

from __future__ import annotations

import contextlib
import threading
import time

from beacon_memory.documents import utc_now
from beacon_memory.errors import QuotaError, StoreError
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.locks import renew_in_forks

from .parts import StoreParts

__all__ = ["NOTE_SECONDS", "UseLog", "delete_expired", "make_room"]

NOTE_SECONDS = 60  # how often a process notes in the catalog which documents it used
_BATCH = 100  # documents that are looked at together


class UseLog:
    """When documents were last used. The catalog is told now and then only: no reading may wait for a write."""

    def __init__(self, parts: StoreParts) -> None:
        self._parts = parts
        self._lock = threading.Lock()
        self._used: dict[str, int] = {}
        self._noted = time.monotonic()
        renew_in_forks(self)

    def _renew(self) -> None:
        """Replace the lock, which a thread may have held when this process was forked; see `renew_in_forks`."""
        self._lock = threading.Lock()

    def add(self, id: str) -> None:
        """Note that a document is used now."""
        with self._lock:
            self._used[id] = int(time.time())
            due = time.monotonic() - self._noted > NOTE_SECONDS
        if due:
            self.flush()

    def flush(self) -> None:
        """Tell the catalog, if it is open and can be written; what it could not be told is kept for the next time."""
        with self._lock:
            used, self._used, self._noted = self._used, {}, time.monotonic()
        catalog = self._parts.open_catalog
        noted = False
        if used and catalog is not None:
            with contextlib.suppress(StoreError):  # of a store that cannot be written, reading must go on
                noted = catalog.documents.touch(used)
        if not noted:
            with self._lock:
                self._used = used | self._used


def delete_expired(catalog: Catalog) -> tuple[list[str], list[str]]:
    """Delete the rows of documents that have expired; returns their ids, and the files to remove."""
    ids = catalog.documents.expired(utc_now())
    return ids, [file for id in ids for file in catalog.documents.delete(id)]


def make_room(catalog: Catalog, row: DocumentRow, quota: int | None) -> tuple[list[DocumentRow], list[str]]:
    """Delete the rows of documents that were not used for longest, until the quota is kept with `row` in the store.

    Returns the rows that were deleted, and the files to remove. Raises QuotaError if there is no room, whatever goes.
    """
    evicted: list[DocumentRow] = []
    gone: list[str] = []
    if quota is None:
        return evicted, gone
    old = catalog.documents.get(row.id)
    room = quota - row.bytes + (old.bytes if old else 0)
    while (over := catalog.properties.count("bytes") - room) > 0:
        victims = [one for one in catalog.documents.least_used(_BATCH) if one.id != row.id]
        if not victims:
            raise QuotaError(
                f"{row.id!r} takes {row.bytes:,} bytes, and with all that is pinned that is {over:,} more than the "
                f"quota of {quota:,}; unpin or remove documents, raise the quota, or compress more strongly"
            )
        for victim in victims:
            if catalog.properties.count("bytes") > room:
                gone += catalog.documents.delete(victim.id)
                evicted.append(victim)
    return evicted, gone
