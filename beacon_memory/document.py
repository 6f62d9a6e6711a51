"""What describes a document without its tensors: id, hash of the text, metadata, time.

Nothing here imports torch or SQL, so that the file format, the catalog and the command line can share it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime

from .errors import InputError

__all__ = ["check_id", "check_metadata", "content_hash", "utc_now"]


def check_id(id: str) -> str:
    """Return `id` unchanged; raises InputError unless it is a non-empty text that UTF-8 can encode.

    Any such text will do, path separators, NUL and emoji included: an id never becomes a path.
    """
    if not isinstance(id, str):
        raise InputError(f"a document id must be a str, got {id!r} of type {type(id).__name__}")
    if not id:
        raise InputError("a document id must not be empty; give the document a name, for example its path or URL")
    _encode(id, "the document id")
    return id


def content_hash(text: str) -> str:
    """The sha256 of a text in UTF-8, in hexadecimal; raises InputError for a text that UTF-8 cannot encode."""
    if not isinstance(text, str):
        raise InputError(f"a document's text must be a str, got {type(text).__name__}; decode bytes first")
    return hashlib.sha256(_encode(text, "the document's text")).hexdigest()


def check_metadata(metadata: Mapping[str, object]) -> dict[str, object]:
    """A copy of `metadata` as it will be read back; raises InputError naming the part that JSON cannot hold."""
    if not isinstance(metadata, Mapping):
        raise InputError(f"metadata must be a dict with text keys, got {metadata!r} of type {type(metadata).__name__}")
    try:
        _check_json(dict(metadata), "metadata")
        copy: dict[str, object] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except RecursionError:
        raise InputError("metadata is nested too deeply, or contains itself; flatten it") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"metadata cannot be written as JSON: {error}") from error
    return copy


def utc_now() -> str:
    """The time in UTC as ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _encode(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds the lone surrogate {text[error.start]!r} at character {error.start}, which has no UTF-8 "
            "form; decode the source with errors='replace'"
        ) from None


def _check_json(value: object, where: str) -> None:
    """Raise InputError, naming the place, where json.dumps would fail or silently change what it is given."""
    match value:
        case None | bool() | int() | str():
            return
        case float() if math.isfinite(value):
            return
        case list() | tuple():
            for index, item in enumerate(value):
                _check_json(item, f"{where}[{index}]")
            return
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise InputError(f"{where} has the key {key!r} of type {type(key).__name__}; keys must be texts")
                _check_json(item, f"{where}[{key!r}]")
            return
    raise InputError(
        f"{where} is {value!r} of type {type(value).__name__}, which JSON cannot hold; use None, bool, int, "
        "finite float, str, list or dict"
    )
