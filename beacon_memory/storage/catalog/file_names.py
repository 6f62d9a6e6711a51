"""The names of K/V files: numbers for new ones, those that rows name, and those that are about to be removed.

A file's name holds a number, `kv/<2 hex>/<hash of id>-<number>.safetensors`. When a row loses its file, because the
document is replaced or removed, a trigger keeps the number as *unsettled* until the file is gone, with all segments,
whose names begin with that of the file. So a file that no row names can be told from one whose row was lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from .database import Connections
from .rows import files_of

__all__ = ["FileNames"]


class FileNames(ABC):
    """The names of K/V files that a catalog knows of."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    @abstractmethod
    def take_number(self) -> int:
        """Return a number for a new file: milliseconds since 1970, or if that is not higher, one more than the last."""

    def named(self, id: str | None = None) -> set[str]:
        """Return the files that the rows of a document name, or those of all documents; kept versions included."""
        where = ("WHERE id = ?", "WHERE document = ?") if id is not None else ("", "")
        return self._named(where, [id, id] if id is not None else [])

    def beginning(self, stem: str) -> set[str]:
        """Return the files whose names begin with the stem of a document's, see `file_stem`, and that rows name."""
        where = "WHERE file >= :stem || '-' AND file < :stem || '.'"
        return self._named((where, where), {"stem": stem})

    def _named(self, where: tuple[str, str], values: Sequence[str] | dict[str, str]) -> set[str]:
        """Return the files that some rows of documents and of kept versions name."""
        of_documents, of_versions = "SELECT file, segments FROM documents", "SELECT file, segments FROM versions"
        with self._connections.use() as db:
            found = db.execute(f"{of_documents} {where[0]} UNION ALL {of_versions} {where[1]}", values).fetchall()
        return {name for columns in found for name in files_of(*columns)}

    def unsettled(self) -> set[str]:
        """Return the numbers of files that had a row, and are about to be removed."""
        with self._connections.use() as db:
            return {str(number) for (number,) in db.execute("SELECT number FROM unsettled").fetchall()}

    def begun(self) -> set[str]:
        """Return the numbers of files that are being stored, or whose writer was killed, as far as the catalog knows.

        One that is of one machine knows of none: there, marks beside the files tell.
        """
        return set()

    @abstractmethod
    def settle(self, numbers: Iterable[str]) -> bool:
        """Forget the numbers of files that are gone; False if another process is writing just now."""
