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
from weakref import WeakKeyDictionary

from sqlite_utils import Database

from beacon_memory.errors import CorruptFileError

from .connections import Connections
from .rows import checksum

__all__ = ["COUNTS", "Properties"]

COUNTS = ("documents", "bytes", "last")


class Properties:
    """The properties of a catalog by name."""

    def __init__(self, connections: Connections, path: Path | str) -> None:
        self._connections = connections
        self._path = path
        self._known: WeakKeyDictionary[Database, tuple[object, Mapping[str, Any]]] = WeakKeyDictionary()

    def all(self) -> Mapping[str, Any]:
        """Return all properties but the counts; raises CorruptFileError if one is damaged.

        They are read again only if the database has been written to since, by this process or another one.
        """
        with self._connections.use() as db:
            if db.conn.in_transaction:  # what is read here may be undone
                return self._read_all()
            # The first number changes when others have committed something, the second with what is written here.
            state = (db.execute("PRAGMA data_version").fetchone()[0], db.conn.total_changes)
            known = self._known.get(db)
            if known is None or known[0] != state:
                known = self._known[db] = (state, self._read_all())
        return known[1]

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
                db.table("properties").upsert(kept | {"checksum": checksum(kept)}, pk="name")

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
        return found[0] if found is not None and type(found[0]) is int else None

    def sound_and_damaged(self) -> tuple[dict[str, Any], list[str]]:
        """Return all properties but the counts that are as they were written, and the names of the others."""
        with self._connections.use() as db:
            found = list(db.query("SELECT name, value, checksum FROM properties"))
        properties = [one for one in found if one["name"] not in COUNTS]
        damaged = [str(one["name"]) for one in properties if one["checksum"] != checksum(one)]
        return {one["name"]: one["value"] for one in properties if one["name"] not in damaged}, damaged

    def _read_all(self) -> dict[str, Any]:
        sound, damaged = self.sound_and_damaged()
        if damaged:
            names = ", ".join(map(repr, damaged))
            raise CorruptFileError(f"{self._path}: what it says of {names} is damaged; `beacon-memory repair` mends it")
        return sound
