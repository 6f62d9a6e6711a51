"""The index of what is stored, in one SQLite database.

    documents      a row for each document, found by id or by filters
    texts          their source texts in passages, with a full-text index
    versions       K/V of other models that are kept beside a document's own
    conversations  a row for each conversation, with its recent turns
    file_names     which K/V files there are, and numbers for new ones
    properties     what is kept once for all: identity, settings, counts

Each of these is a class in a module of its own; `Catalog` opens the database and has one of each:

    catalog = Catalog(folder / "catalog.sqlite3")
    with catalog.transaction():
        catalog.documents.put(row, text)
        catalog.versions.drop(row.id)

Nothing here imports torch. The K/V themselves are files; `storage.store` keeps the two in step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from beacon_memory.errors import StoreError
from beacon_memory.storage.files.durable import sync_file

from .connections import BUSY_SECONDS, Connections
from .conversations import Conversations
from .documents import Documents
from .file_names import FileNames
from .migrations import migrate
from .properties import Properties
from .texts import Texts
from .versions import Versions

__all__ = ["Catalog"]


class Catalog:
    """The SQLite database of a store, safe to use from several threads and processes at a time.

    Errors of SQLite are raised as StoreError. `path` may be ":memory:" for a catalog that vanishes when it is closed.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self.connections = Connections(path)
        self.properties = Properties(self.connections, path)
        self.texts = Texts(self.connections)
        self.documents = Documents(self.connections, self.texts)
        self.versions = Versions(self.connections)
        self.conversations = Conversations(self.connections)
        self.file_names = FileNames(self.connections, self.properties)
        try:
            with self.connections.use() as db:
                migrate(db)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections; the next use opens one again."""
        self.connections.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the write lock: what is written inside is committed together, or not at all if anything raises.

        Raises StoreError if another process holds the lock for more than 30 seconds.
        """
        with self.connections.transaction():
            yield

    def sync(self) -> None:
        """Wait until all that can be read outlasts a power cut; raises StoreError.

        Whoever commits waits for that, but may be killed before it is so, and others see the commit all the same.
        """
        try:
            with contextlib.suppress(FileNotFoundError):
                sync_file(Path(f"{self.path}-wal"))
        except OSError as error:
            raise StoreError(f"{self.path}-wal cannot be written: {error.strerror}; see to the disk") from error

    def wipe(self) -> None:
        """Write the whole database anew, and empty its log, so that nothing is left of rows that were removed.

        The index is made anew, since it keeps the words of removed texts until it happens to be merged; FTS5's
        `secure-delete` would not, but SQLite before 3.42 cannot read an index that was written with it. VACUUM, since
        pages keep copies of what they once held.

        Takes as much room once more. Raises StoreError if others read from the log for more than 30 seconds.
        """
        with self.transaction(), self.connections.use() as db:
            db.execute("INSERT INTO passages_fts(passages_fts) VALUES('rebuild')")
        with self.connections.use() as db:
            db.execute("VACUUM")
            busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy:
            raise StoreError(
                f"{self.path}: another process has been reading for {BUSY_SECONDS:.0f} s, so that its log, which holds "
                f"what was removed, cannot be emptied; try again"
            )
        self.sync()  # SQLite does not: a power cut could fill the log again

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Show the catalog as it is now to all that is read inside, whatever others write meanwhile."""
        with self.connections.reading():
            yield
