"""The row of a document in the catalog, and the checksum that tells whether it is as it was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from beacon_memory.documents import Label
from beacon_memory.errors import CorruptFileError

__all__ = [
    "COLUMNS",
    "DamagedRow",
    "DocumentRow",
    "Totals",
    "checksum",
    "files_of",
    "from_record",
    "printable",
    "properties_of",
    "to_record",
]

_JSON = ("ratios", "metadata", "tags", "segments")
_NOT_CHECKED = ("used_at", "checksum", "seal")  # seal: the checksum's name while older steps of `migrations` run
_ENCODER = json.JSONEncoder(sort_keys=True, default=repr)


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """The catalog's row of a document, without its text.

    file:         name of the (first) K/V file, relative to the store's folder, with forward slashes
    content_hash: sha256 of the text, in hexadecimal
    fingerprint:  digest of the `Fingerprint` of the K/V
    compression:  the name of the method that made slots of the text
    precision:    what the K/V are kept in, a value of `documents.Precision`; empty in rows older than the choice
    tokens, slots, bytes: raw tokens of the text; memory slots (of a head, the mean over all) and bytes of its K/V
    ratios:       the different ratios of its windows, ascending; the file's header has each window's own
    metadata, tags, pinned, expires_at: see `Label`
    created_at, updated_at: ISO 8601, UTC; the first survives replacement
    used_at:      when it was last read or written, in seconds since 1970, to a minute or so
    method:       the parameters of the compression method; None in rows older than the column
    root:         the hash that stands for the whole K/V file, the last one if there are segments, and so for all; empty
                  in rows older than the column, whose files are of formats that are not read any more
    segments:     names of the files behind the first, in their order
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
    root: str = ""
    segments: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all K/V files, in their order."""
        return self.file, *self.segments

    @property
    def label(self) -> Label:
        """The part of the row that can be changed without compressing the document anew."""
        return Label(self.metadata, self.tags, self.pinned, self.expires_at)

    def labelled(self, label: Label) -> DocumentRow:
        """Return the same row with another label."""
        return replace(self, **{field.name: getattr(label, field.name) for field in fields(Label)})


@dataclass(frozen=True, slots=True)
class DamagedRow:
    """A row that is not as it was written.

    number:   its row number in SQLite.
    id, file: what stands in these columns now, in valid UTF-8.
    message:  what is wrong, for people.
    record:   all columns as they are now.
    """

    number: int
    id: str
    file: str
    message: str
    record: Mapping[str, Any]

    def believed(self) -> DocumentRow:
        """Return a row of the values as they are now, although some of them are wrong.

        This is the last resort of `repair`: where no K/V file can be read, tokens or times that may be off are better
        than a lost document. Raises CorruptFileError if the values can be no row, such as a tag that is no text.
        """
        try:
            json.dumps(self.record, ensure_ascii=False).encode()  # as the catalog would
            row = from_record({**self.record, "checksum": checksum(self.record)})
            return row.labelled(row.label)
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptFileError(f"the row of {self.id!r} says nothing that could be: {error}") from None


@dataclass(frozen=True, slots=True)
class Totals:
    """How many documents a store holds, how many bytes all K/V take, and how many conversations there are."""

    documents: int
    bytes: int
    conversations: int = 0


COLUMNS = (*(field.name for field in fields(DocumentRow)), "checksum")


def to_record(row: DocumentRow) -> dict[str, Any]:
    """Return a row as values by column, with their checksum; `from_record` is the way back."""
    record = asdict(row) | {name: json.dumps(getattr(row, name)) for name in _JSON} | {"pinned": int(row.pinned)}
    record["method"] = None if row.method is None else json.dumps(dict(row.method))
    return record | {"checksum": checksum(record)}


def from_record(record: Mapping[str, Any]) -> DocumentRow:
    """Return the row that some values by column are; raises CorruptFileError if their checksum does not fit."""
    if record["checksum"] != checksum(record):
        raise CorruptFileError(
            f"the catalog's row of {record['id']!r} is damaged; `beacon-memory repair` makes it anew from its file"
        )
    values = dict(record)
    del values["checksum"]
    written = [*map(values.__getitem__, _JSON), values.get("method") or "null"]
    ratios, metadata, tags, segments, method = json.loads(f"[{', '.join(written)}]")  # at once, which is faster
    values |= {"ratios": tuple(ratios), "metadata": metadata, "tags": tuple(tags), "pinned": bool(record["pinned"])}
    values["segments"] = tuple(segments)
    values["method"] = None if method is None else dict(method)
    return DocumentRow(**values)


def files_of(file: object, segments: object) -> list[str]:
    """Return the K/V files that a row names in these columns, as far as they can be read."""
    try:
        more = json.loads(str(segments))
    except ValueError:
        more = []
    return [str(file), *(str(one) for one in (more if isinstance(more, list) else []))]


def properties_of(metadata: Mapping[str, object], tags: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield what a document can be filtered by, as names and values: its tags, and plain values of its metadata.

    Metadata {"year": 1999, "authors": ["A"]} and the tag "math" give ("tag", "math") and ('metadata."year"', "1999").
    """
    for tag in tags:
        yield "tag", tag
    for name, value in metadata.items():
        if not isinstance(value, (dict, list)):
            yield f"metadata.{json.dumps(name)}", json.dumps(value)  # JSON: a name may hold what has no UTF-8 form


def checksum(record: Mapping[str, Any]) -> str:
    """Return a short hash of a row's values. A step of `migrations` that changes them must write all checksums anew."""
    checked = dict(record)
    for name in _NOT_CHECKED:
        checked.pop(name, None)
    # what a column says by default does not count, so the checksums of rows older than the column go on
    for name, default in (("method", None), ("root", ""), ("segments", "[]")):
        if checked.get(name, default) == default:
            checked.pop(name, None)
    return hashlib.sha256(_ENCODER.encode(checked).encode()).hexdigest()[:32]


def printable(damaged: object) -> str:
    """Return something as text that can be shown, even if it is not valid UTF-8."""
    return str(damaged).encode(errors="replace").decode()
