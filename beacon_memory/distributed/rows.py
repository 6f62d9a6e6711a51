"""Documents as rows of a dataset, and what became of them as rows of another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from beacon_memory import errors
from beacon_memory.documents import PATH, Document
from beacon_memory.errors import BeaconMemoryError, InputError
from beacon_memory.results import Added

__all__ = [
    "REPORTS",
    "ROWS",
    "added_of",
    "document_of",
    "error_of",
    "report_of",
    "report_of_error",
    "rows_of",
    "table_of",
]

ROWS = pa.schema(
    {
        "id": pa.string(),
        "text": pa.string(),
        "metadata": pa.string(),  # JSON, since Arrow has one type for the metadata of all
        "tags": pa.list_(pa.string()),
        "pinned": pa.bool_(),
        "expires_at": pa.string(),
        PATH: pa.string(),  # and goes into the metadata under this name
        "error": pa.string(),
    }
)

REPORTS = pa.schema(
    {
        "id": pa.string(),
        "status": pa.string(),  # of `Added`, or "failed", or "stopped" if nothing can go on
        "tokens": pa.int64(),
        "slots": pa.int64(),
        "bytes": pa.int64(),
        "ratios": pa.list_(pa.int64()),
        "compression": pa.string(),
        "precision": pa.string(),
        "seconds": pa.float64(),
        "evicted": pa.list_(pa.string()),
        "error": pa.string(),  # name of its class
        "reason": pa.string(),
    }
)


def table_of(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Return rows as a table of `ROWS`; raises InputError for values that no column can have."""
    plain = []
    for row in rows:
        metadata = row.get("metadata")
        if isinstance(metadata, Mapping):  # of fields that another row has, Arrow gives a row None
            metadata = json.dumps({name: value for name, value in metadata.items() if value is not None})
        plain.append({**row, "metadata": metadata})
    try:
        return pa.Table.from_pylist(plain, schema=ROWS)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(f"the rows of the dataset are no documents: {error}; see {', '.join(ROWS.names)}") from error


def rows_of(documents: Iterable[Document]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a dataset that stand for documents."""
    for one in documents:
        metadata = None if one.metadata is None else json.dumps(dict(one.metadata))
        yield asdict(one) | {"metadata": metadata, "tags": None if one.tags is None else list(one.tags)}


def document_of(row: Mapping[str, Any], known: Mapping[str, object]) -> Document:
    """Return the document that a row of a dataset stands for.

    Columns: `id` (a text, or a whole number) and `text`; if there are any, `metadata` (JSON as text, or fields, of
    which those without a value do not count), `tags`, `pinned`, `expires_at`; `path`, the file of the text, which goes
    into the metadata; and `error`, why the text could not be read.

    known: metadata that the document has already.

    Raises InputError for a row that is no document, or has an error.
    """
    if row.get("error"):
        raise InputError(str(row["error"]))
    id = str(row["id"]) if isinstance(row.get("id"), int) else row.get("id")
    for name, value in (("id", id), ("text", row.get("text"))):
        if not isinstance(value, str):
            raise InputError(
                f"a row has {value!r} as {name}, and must have a text: name the columns of the dataset `id` "
                f"and `text`; this one has {', '.join(row)}"
            )
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError as error:
            raise InputError(f"the metadata of {id!r} are no JSON: {error}") from error
    elif isinstance(metadata, Mapping):
        metadata = {name: value for name, value in metadata.items() if value is not None}
    if row.get(PATH):
        metadata = {**(known if metadata is None else metadata), PATH: row[PATH]}
    return Document(str(id), row["text"], metadata, row.get("tags"), row.get("pinned"), row.get("expires_at"))


def report_of(added: Added) -> dict[str, Any]:
    """Return the row that tells of a document that was added."""
    return asdict(added) | {"ratios": list(added.ratios), "evicted": list(added.evicted)}


def report_of_error(id: str, error: BaseException, status: str = "failed") -> dict[str, Any]:
    """Return the row that tells why a document could not be added."""
    if isinstance(error, BeaconMemoryError):
        return {"id": id, "status": status, "error": type(error).__name__, "reason": str(error)}
    return {"id": id, "status": status, "error": "BeaconMemoryError", "reason": f"{type(error).__name__}: {error}"}


def added_of(report: Mapping[str, Any]) -> Added:
    """Return what a row tells of a document that was added."""
    fields = {name: value for name, value in report.items() if name not in ("error", "reason")}
    return Added(**fields | {"ratios": tuple(report["ratios"]), "evicted": tuple(report["evicted"])})


def error_of(report: Mapping[str, Any]) -> BeaconMemoryError:
    """Return the error that a row tells of."""
    error: BeaconMemoryError = getattr(errors, str(report["error"]), BeaconMemoryError)(report["reason"])
    return error
