"""The rows of conversations: their recent turns, and which documents the older ones were folded into."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from beacon_memory.conversation import Conversation
from beacon_memory.documents import check_id
from beacon_memory.errors import CorruptFileError, InputError

from .database import Connections
from .rows import DamagedRow, checksum, printable

__all__ = ["Conversations"]

_JSON = ("turns", "parts", "folding")
_COLUMNS = (*(field.name for field in fields(Conversation)), "checksum")
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM conversations"  # noqa: S608  # our own names
_UPSERT = f"""
    INSERT INTO conversations ({", ".join(_COLUMNS)}) VALUES ({", ".join(f":{one}" for one in _COLUMNS)})
    ON CONFLICT (id) DO UPDATE SET {", ".join(f"{one} = excluded.{one}" for one in _COLUMNS if one != "id")}
"""  # noqa: S608  # our own names


class Conversations:
    """The conversations of a catalog. Whoever reads a damaged row gets a CorruptFileError."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def get(self, id: str) -> Conversation | None:
        """Return a conversation, or None."""
        with self._connections.use() as db:
            found = list(db.query(f"{_SELECT} WHERE id = ?", [check_id(id)]))
        return _from_record(found[0]) if found else None

    def ids(self) -> list[str]:
        """Return the ids of all conversations, sorted."""
        with self._connections.use() as db:
            return [str(id) for (id,) in db.execute("SELECT id FROM conversations ORDER BY id").fetchall()]

    def count(self) -> int:
        """Count the conversations."""
        with self._connections.use() as db:
            return int(db.execute("SELECT count(*) FROM conversations").fetchone()[0])

    def scan(self) -> Iterator[Conversation | DamagedRow]:
        """Yield all conversations in the order of their ids, damaged rows too."""
        with self._connections.use() as db:
            numbers = [number for (number,) in db.execute("SELECT rowid FROM conversations ORDER BY id").fetchall()]
        for number in numbers:
            with self._connections.use() as db:
                found = list(db.query(f"{_SELECT} WHERE rowid = ?", [number]))
            for record in found:  # none, if it was removed since
                try:
                    yield _from_record(record)
                except CorruptFileError as error:
                    yield DamagedRow(number, printable(record["id"]), "", printable(error), record)

    def put(self, conversation: Conversation) -> None:
        """Write the row of a conversation, new or in place of the one it has."""
        record = {field.name: getattr(conversation, field.name) for field in fields(conversation)}
        record |= {name: json.dumps(record[name]) for name in _JSON}
        record["checksum"] = checksum(record)
        with self._connections.transaction() as db:
            db.execute(_UPSERT, record)

    def remove(self, id: str) -> None:
        """Remove a conversation, damaged or not, if there is one."""
        with self._connections.transaction() as db:
            db.execute("DELETE FROM conversations WHERE id = ?", [check_id(id)])

    def forget(self, row: DamagedRow) -> None:
        """Remove a damaged row."""
        with self._connections.transaction() as db:
            db.execute("DELETE FROM conversations WHERE rowid = ?", [row.number])


def _from_record(record: Mapping[str, Any]) -> Conversation:
    """Return the conversation that some values by column are; raises CorruptFileError if they are damaged."""
    values = dict(record)
    try:
        if values.pop("checksum") != checksum(record):
            raise ValueError("its hash differs")
        return Conversation(**{name: json.loads(one) if name in _JSON else one for name, one in values.items()})
    except (ValueError, TypeError, RecursionError, InputError) as error:
        raise CorruptFileError(
            f"the catalog's row of the conversation {printable(record['id'])!r} is damaged ({error}); "
            f"`beacon-memory repair` takes its copy, and Session.clear() removes it"
        ) from error
