"""The index of what is stored, in one database.

    documents      a row for each document, found by id or by filters
    texts          their source texts in passages, with a full-text index
    versions       K/V of other models that are kept beside a document's own
    conversations  a row for each conversation, with its recent turns
    file_names     which K/V files there are, and numbers for new ones
    properties     what is kept once for all: identity, settings, counts

Each of these is a class in a module of its own; a `Catalog` opens the database and has one of each:

    catalog = SQLiteCatalog(folder / "catalog.sqlite3")
    with catalog.transaction():
        catalog.documents.put(row, text)
        catalog.versions.drop(row.id)

`SQLiteCatalog` is a file beside the K/V, `PostgresCatalog` a database that many machines share. Nothing here imports
torch. The K/V themselves are files; `storage.store` keeps the two in step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from .conversations import Conversations
from .database import Connections
from .documents import Documents
from .file_names import FileNames
from .properties import Properties
from .texts import Texts
from .versions import Versions

__all__ = ["Catalog"]


class Catalog(Protocol):
    """The database of a store, safe to use from several threads and processes at a time.

    Errors of the database are raised as StoreError.
    """

    @property
    def path(self) -> Path | str:
        """Return where the database is, as messages say it."""

    @property
    def shared(self) -> bool:
        """Tell whether many machines share it. Then it keeps its own word, and no machine keeps copies of its rows."""

    @property
    def connections(self) -> Connections:
        """Return the connections that its parts use."""

    @property
    def properties(self) -> Properties:
        """Return what is kept once for all: identity, settings, counts."""

    @property
    def texts(self) -> Texts:
        """Return the source texts of documents, with their full-text index."""

    @property
    def documents(self) -> Documents:
        """Return the rows of documents."""

    @property
    def versions(self) -> Versions:
        """Return the kept versions of documents."""

    @property
    def conversations(self) -> Conversations:
        """Return the rows of conversations."""

    @property
    def file_names(self) -> FileNames:
        """Return the names of K/V files."""

    def close(self) -> None:
        """Close the connections; the next use opens one again."""

    def transaction(self) -> AbstractContextManager[object]:
        """Hold the write lock: what is written inside is committed together, or not at all if anything raises.

        Raises StoreError if another process holds the lock for more than 30 seconds.
        """

    def reading(self) -> AbstractContextManager[object]:
        """Show the catalog as it is now to all that is read inside, whatever others write meanwhile."""

    def overwrite(self) -> None:
        """Make sure that a commit which failed does not come back, whoever is killed now; raises StoreError."""

    def sync(self) -> None:
        """Wait until all that can be read outlasts a power cut; raises StoreError."""

    def wipe(self) -> None:
        """Write the whole database anew, so that nothing is left in it of rows that were removed.

        Takes as much room once more. Raises StoreError if others keep what was removed in sight for more than 30
        seconds.
        """

    def broken(self) -> list[str]:
        """Return what is wrong with the database itself, whatever its rows say, a sentence each; [] if it is sound."""

    def reindex(self) -> None:
        """Make the database's own indexes anew."""
