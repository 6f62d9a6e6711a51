"""Properties of the catalog as a whole: its identity, the settings of the store, and counts.

    identity           a random text, of this catalog alone
    namespace          the name of the namespace that the catalog belongs to; none outside of all namespaces
    precision, ...     the settings of the store, one property each
    documents, bytes   how many documents there are, and bytes of K/V, those of kept versions included
    last               the last number that a file was given, see `FileNames.take_number`

The last three are `COUNTS`: triggers and each new file change them, so they have no checksum; the others have.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beacon_memory.errors import CorruptFileError

from .database import Connections
from .rows import checksum

__all__ = ["COUNTS", "Properties"]

COUNTS = ("documents", "bytes", "last")

_UPSERT = """
    INSERT INTO properties (name, value, checksum) VALUES (?, ?, ?)
    ON CONFLICT (name) DO UPDATE SET value = excluded.value, checksum = excluded.checksum
"""


class Properties:
    """The properties of a catalog by name."""

    def __init__(self, connections: Connections, path: Path | str) -> None:
        self._connections = connections
        self._path = path

    def all(self) -> Mapping[str, Any]:
        """Return all properties but the counts; raises CorruptFileError if one is damaged."""
        sound, damaged = self.sound_and_damaged()
        if damaged:
            names = ", ".join(map(repr, damaged))
            raise CorruptFileError(f"{self._path}: what it says of {names} is damaged; `beacon-memory repair` mends it")
        return sound

    def get(self, name: str) -> Any:
        """Return the property of this name, None if there is none; raises CorruptFileError if any is damaged."""
        return self.all().get(name)

    def set(self, name: str, value: object) -> None:
        """Set a property; None removes it."""
        with self._connections.transaction() as db:
            if value is None:
                db.execute("DELETE FROM properties WHERE name = ?", [name])
            else:
                kept = {"name": name, "value": value}
                db.execute(_UPSERT, [name, self._to_column(value), checksum(kept)])

    def count(self, name: str) -> int:
        """Return one of the `COUNTS`; raises CorruptFileError if it is lost."""
        value = self.find_count(name)
        if value is None:
            raise CorruptFileError(f"{self._path}: the number of {name} is lost; `beacon-memory repair` finds it again")
        return value

    def find_count(self, name: str) -> int | None:
        """Return one of the `COUNTS`, None if it is lost."""
        with self._connections.use() as db:
            found = db.execute("SELECT value FROM properties WHERE name = ?", [name]).fetchone()
        value = None if found is None else self._from_column(found[0])
        return value if type(value) is int else None

    def sound_and_damaged(self) -> tuple[dict[str, Any], list[str]]:
        """Return all properties but the counts that are as they were written, and the names of the others."""
        with self._connections.use() as db:
            found = list(db.query("SELECT name, value, checksum FROM properties"))
        properties = [one | {"value": self._from_column(one["value"])} for one in found if one["name"] not in COUNTS]
        damaged = [str(one["name"]) for one in properties if one["checksum"] != checksum(one)]
        return {one["name"]: one["value"] for one in properties if one["name"] not in damaged}, damaged

    def forget(self, name: str) -> None:
        """Remove a damaged property, whatever its name has become."""
        with self._connections.transaction() as db:
            db.execute("DELETE FROM properties WHERE name = ?", [name])

    def _to_column(self, value: object) -> object:
        """Return what is written for a value."""
        return value

    def _from_column(self, written: object) -> Any:
        """Return the value that was written; of what is damaged, anything."""
        return written
