"""What the catalog knows of a document, and how it is checked against damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from beacon_memory.documents import Label
from beacon_memory.errors import CorruptFileError

__all__ = ["COLUMNS", "DamagedRow", "DocumentRow", "Totals", "checksum", "from_record", "properties_of", "to_record"]

_JSON = ("ratios", "metadata", "tags")
_NOT_CHECKED = ("used_at", "checksum")
_ENCODER = json.JSONEncoder(sort_keys=True, default=repr)


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """What the catalog knows of a document, its text apart.

    file:         name of the K/V file, relative to the store's folder, with forward slashes
    content_hash: sha256 of the text, in hexadecimal
    fingerprint:  digest of the `Fingerprint` of the K/V
    compression:  the name of the method that made slots of the text
    precision:    what the K/V are kept in, one of `document.PRECISIONS`; empty in rows older than the choice
    tokens, slots, bytes: raw tokens of the text; memory slots (of a head, the mean over all) and bytes of its K/V
    ratios:       the different ratios of its windows, ascending; the file's header has each window's own
    metadata, tags, pinned, expires_at: see `Label`
    created_at, updated_at: ISO 8601, UTC; the first survives replacement
    used_at:      when it was last read or written, in seconds since 1970, to a minute or so
    method:       the parameters of the compression method; None in rows older than the column
    """

    id: str
    file: str
    content_hash: str
    fingerprint: str
    compression: str
    precision: str
    tokens: int
    slots: int
    bytes: int
    ratios: tuple[int, ...]
    metadata: Mapping[str, object]
    tags: tuple[str, ...]
    pinned: bool
    expires_at: str | None
    created_at: str
    updated_at: str
    used_at: int = 0
    method: Mapping[str, str | int] | None = None

    @property
    def label(self) -> Label:
        """What may be changed of it without compressing it anew."""
        return Label(self.metadata, self.tags, self.pinned, self.expires_at)

    def labelled(self, label: Label) -> DocumentRow:
        """The same row with another label."""
        return replace(self, **{field.name: getattr(label, field.name) for field in fields(Label)})


@dataclass(frozen=True, slots=True)
class DamagedRow:
    """A row that is not as it was written.

    number:   where it is.
    id, file: what they read as, in valid UTF-8.
    record:   all of it.
    """

    number: int
    id: str
    file: str
    message: str
    record: Mapping[str, Any]

    def believed(self) -> DocumentRow:
        """What it says, true or not; raises CorruptFileError if that can be no row."""
        try:
            json.dumps(self.record, ensure_ascii=False).encode()  # as the catalog would
            row = from_record({**self.record, "checksum": checksum(self.record)})
            return row.labelled(row.label)
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptFileError(f"the row of {self.id!r} says nothing that could be: {error}") from None


@dataclass(frozen=True, slots=True)
class Totals:
    """Documents, and bytes of all K/V."""

    documents: int
    bytes: int


COLUMNS = (*(field.name for field in fields(DocumentRow)), "checksum")


def to_record(row: DocumentRow) -> dict[str, Any]:
    """The values of the catalog's columns for a row, the checksum among them."""
    record = asdict(row) | {name: json.dumps(getattr(row, name)) for name in _JSON} | {"pinned": int(row.pinned)}
    record["method"] = None if row.method is None else json.dumps(dict(row.method))
    return record | {"checksum": checksum(record)}


def from_record(record: Mapping[str, Any]) -> DocumentRow:
    """The row of some columns' values; raises CorruptFileError if they are not those that were written."""
    if record["checksum"] != checksum(record):
        raise CorruptFileError(
            f"the catalog's row of {record['id']!r} is damaged; `beacon-memory repair` makes it anew from its file"
        )
    values = dict(record)
    del values["checksum"]
    written = [*map(values.__getitem__, _JSON), values.get("method") or "null"]
    ratios, metadata, tags, method = json.loads(f"[{', '.join(written)}]")  # at once, which is faster
    values |= {"ratios": tuple(ratios), "metadata": metadata, "tags": tuple(tags), "pinned": bool(record["pinned"])}
    values["method"] = None if method is None else dict(method)
    return DocumentRow(**values)


def properties_of(metadata: Mapping[str, object], tags: Iterable[str]) -> Iterator[tuple[str, str]]:
    """What a document can be found by, as names and values: its tags, and plain values at the top of its metadata."""
    for tag in tags:
        yield "tag", tag
    for name, value in metadata.items():
        if not isinstance(value, (dict, list)):
            yield f"metadata.{json.dumps(name)}", json.dumps(value)  # JSON: a name may hold what has no UTF-8 form


def checksum(record: Mapping[str, Any]) -> str:
    """A short hash of a row's values; a step of `migrations` that changes them checks all rows anew."""
    checked = dict(record)
    for name in _NOT_CHECKED:
        checked.pop(name, None)
    if checked.get("method") is None:  # as in rows older than the column, whose checksums go on
        checked.pop("method", None)
    return hashlib.sha256(_ENCODER.encode(checked).encode()).hexdigest()[:32]
