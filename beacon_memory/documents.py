"""A document without its tensors: id, text and its hash, label, time.

Nothing here imports torch or SQL, so that the file format, the catalog and the command line can share it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import Enum, StrEnum
from typing import Final, NoReturn

from .errors import InputError

__all__ = [
    "KEEP",
    "PATH",
    "SESSION_TAG",
    "Document",
    "Keep",
    "Label",
    "Precision",
    "PrecisionRule",
    "Text",
    "check_id",
    "check_namespace",
    "check_utf8",
    "choose_precision",
    "content_hash",
    "given_of",
    "utc_after",
    "utc_now",
]

SESSION_TAG = "session"  # of documents that conversations were folded into
PATH = "path"  # the name in a document's metadata under which the file stands that its text was read from


class Precision(StrEnum):
    """The number format in which keys and values are kept; each takes no more bytes than the one before.

    `Precision("int8")` is the member of that name; it raises InputError if there is none.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """The bits that a number takes."""
        return int(self.value.lstrip(string.ascii_lowercase))

    @property
    def quantized(self) -> bool:
        """Whether numbers are whole ones with scales beside them, as `kv.quantize` makes them."""
        return self.value.startswith("int")

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise InputError(f"precision={value!r} must be one of {', '.join(cls)}")


class PrecisionRule(StrEnum):
    """A way to choose a precision without naming one.

    AUTO:  what the store's settings say; as a setting: what the model computed in.
    AS_IS: what the K/V are in already.
    """

    AUTO = "auto"
    AS_IS = "as-is"


_MOST = 10_000  # tags of a document, and of entries of its metadata: each is an entry of an index, too
_DEEPEST = 100  # levels of metadata; some thousand would be too many to be copied, or read back


class Keep(Enum):
    """The type of KEEP."""

    KEEP = "keep"


KEEP: Final = Keep.KEEP  # stands for a value that shall stay as it is, where None is a value of its own


def given_of(values: Mapping[str, object]) -> dict[str, object]:
    """Return the values that are given, by name: all but those that are KEEP."""
    return {name: value for name, value in values.items() if value is not KEEP}


@dataclass(frozen=True, slots=True)
class Label:
    """The part of a document that can be changed without compressing it anew.

    metadata:   whatever JSON can hold, under up to 10,000 text keys, nested up to 100 levels deep.
    tags:       words to find the document by, up to 10,000; kept sorted, each once.
    pinned:     whether a quota must never evict the document.
    expires_at: when the document ceases to be there, as ISO 8601 with an offset, kept in UTC; None for never.

    Raises InputError, naming the part, for what cannot be kept.
    """

    metadata: Mapping[str, object] = field(default_factory=dict)
    tags: Iterable[str] = ()
    pinned: bool = False
    expires_at: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pinned, bool):
            raise InputError(f"pinned must be true or false, got {self.pinned!r}")
        object.__setattr__(self, "metadata", _check_metadata(self.metadata))
        object.__setattr__(self, "tags", _check_tags(self.tags))
        object.__setattr__(self, "expires_at", _check_time(self.expires_at))

    def changed(
        self,
        metadata: Mapping[str, object] | Keep = KEEP,
        tags: Iterable[str] | Keep = KEEP,
        pinned: bool | Keep = KEEP,
        expires_at: str | Keep | None = KEEP,
    ) -> Label:
        """Return the same label with other values, where they are given."""
        given = {"metadata": metadata, "tags": tags, "pinned": pinned, "expires_at": expires_at}
        return replace(self, **given_of(given))  # type: ignore[arg-type]  # by name


@dataclass(frozen=True, slots=True)
class Text:
    """The text of a document, checked and hashed once, where it comes in.

    sha256: of the text in UTF-8, in hexadecimal.

    Raises InputError for a value that is no str, or that UTF-8 cannot encode.
    """

    value: str
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.value, str):
            raise InputError(f"a document's text must be a str, got {type(self.value).__name__}; decode bytes first")
        object.__setattr__(self, "sha256", hashlib.sha256(_encode(self.value, "the document's text")).hexdigest())

    @classmethod
    def of(cls, text: Text | str) -> Text:
        """Return `text` as it is, or a str as a Text."""
        return text if isinstance(text, Text) else cls(text)


@dataclass(frozen=True, slots=True)
class Document:
    """A text to remember under an id; any text will do as id.

    metadata, tags, pinned, expires_at: the parts of its `Label`; None keeps what a document of this id has already.
    """

    id: str
    text: str
    metadata: Mapping[str, object] | None = None
    tags: Sequence[str] | None = None
    pinned: bool | None = None
    expires_at: str | None = None


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


def check_namespace(name: str) -> str:
    """Return the name of a namespace unchanged; raises InputError unless it is "" or could be an id."""
    return name if name == "" else check_id(name)


def content_hash(text: str) -> str:
    """Return the sha256 of a text in UTF-8, in hexadecimal; raises InputError for a text that UTF-8 cannot encode."""
    return Text(text).sha256


def check_utf8(value: object, what: str) -> None:
    """Raise InputError for a text that UTF-8 cannot encode: `value` itself, or any in its dicts and lists.

    JSON allows such texts, and neither a tokenizer nor a database takes them.
    """
    if isinstance(value, str):
        _encode(value, what)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_utf8(key, f"a key of {what}")
            check_utf8(item, f"{what}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_utf8(item, f"{what}[{index}]")


def _check_metadata(metadata: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of `metadata` as it will be read back; raises InputError naming the part that JSON cannot hold."""
    if not isinstance(metadata, Mapping):
        raise InputError(f"metadata must be a dict with text keys, got {metadata!r} of type {type(metadata).__name__}")
    try:
        if len(metadata) > _MOST:
            raise InputError(f"metadata has {len(metadata):,} keys, and {_MOST:,} are the most; put some into one list")
        _check_json(dict(metadata), "metadata", _DEEPEST)
        copy: dict[str, object] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"metadata cannot be written as JSON: {error}") from error
    return copy


def choose_precision(value: str) -> Precision | PrecisionRule:
    """Return the precision or rule of this name; raises InputError if it is neither."""
    return PrecisionRule(value) if value in set(PrecisionRule) else Precision(value)


def utc_now() -> str:
    """Return the time in UTC as ISO 8601, to the millisecond; later times sort behind earlier ones."""
    return _utc(datetime.now(UTC))


def utc_after(time: str) -> str:
    """Return the time as `utc_now`, or a millisecond behind `time` if the clock does not say a later one."""
    return max(utc_now(), _utc(datetime.fromisoformat(time) + timedelta(milliseconds=1)))


def _utc(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="milliseconds")


def _check_tags(tags: Iterable[str]) -> tuple[str, ...]:
    if isinstance(tags, str):
        raise InputError(f"tags must be several texts, got the one text {tags!r}; write [{tags!r}]")
    if not isinstance(tags, Iterable):
        raise InputError(f"tags must be several texts, got {tags!r}")
    given: tuple[object, ...] = tuple(itertools.islice(tags, _MOST + 1))
    if len(given) > _MOST:
        raise InputError(f"a document can have {_MOST:,} tags, got more; keep what is not to be found in its metadata")
    for tag in given:
        if not isinstance(tag, str) or not tag:
            raise InputError(f"a tag must be a text that is not empty, got {tag!r}")
        _encode(tag, "a tag")
    return tuple(sorted({str(tag) for tag in given}))


def _check_time(time: str | None) -> str | None:
    if time is None:
        return None
    try:
        read = datetime.fromisoformat(time)
        if read.tzinfo is None:
            raise ValueError("it names no offset from UTC")
        return _utc(read)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"a time must be ISO 8601 with an offset, such as 2031-05-03T00:00:00+00:00, got {time!r}: {error}"
        ) from None


def _encode(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds the lone surrogate {text[error.start]!r} at character {error.start}, which has no UTF-8 "
            "form; replace it, or decode the source with errors='replace'"
        ) from None


def _check_json(value: object, where: str, depth: int) -> None:
    """Raise InputError, naming the place, where json.dumps would fail or silently change what it is given.

    depth: levels that may still follow.
    """
    if depth < 0:
        raise InputError(f"metadata is nested more than {_DEEPEST} levels deep, or contains itself; flatten it")
    match value:
        case None | bool() | int() | str():
            return
        case float() if math.isfinite(value):
            return
        case list() | tuple():
            for index, item in enumerate(value):
                _check_json(item, f"{where}[{index}]", depth - 1)
            return
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise InputError(f"{where} has the key {key!r} of type {type(key).__name__}; keys must be texts")
                _check_json(item, f"{where}[{key!r}]", depth - 1)
            return
    raise InputError(
        f"{where} is {value!r} of type {type(value).__name__}, which JSON cannot hold; use None, bool, int, "
        "finite float, str, list or dict"
    )
