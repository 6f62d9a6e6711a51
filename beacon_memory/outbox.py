"""Documents that are on their way into a store while others are computed."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from .documents import Document
from .errors import BeaconMemoryError
from .results import Added

__all__ = ["OnAdded", "OnError", "Outbox", "tell"]

_MOST_BYTES = 1 << 28  # of K/V that wait to be stored while more are computed

OnAdded = Callable[[Added], None]
OnError = Callable[[Document, BeaconMemoryError], None]


class Outbox:
    """Store documents in a thread, in their order, beside what is computed meanwhile.

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
        """Note that a document is on its way."""
        self._ids[str(document.id)] += 1

    def leave(self, document: Document) -> None:
        """Note that a document is not on its way any more."""
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
            tell(self._on_error, document, error)
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


def tell(on_error: OnError | None, document: Document, error: BeaconMemoryError) -> None:
    """Hand an error to whoever wants to be told of it, so that the other documents go on; else raise it."""
    if on_error is None:
        raise error
    on_error(document, error)
