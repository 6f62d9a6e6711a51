"""The header of a K/V file: what it says of its document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from beacon_memory.config import METHOD_NAME
from beacon_memory.documents import check_id, utc_now
from beacon_memory.errors import InputError
from beacon_memory.kv.fingerprint import Fingerprint

__all__ = ["DocumentHeader", "WindowSpan"]


@dataclass(frozen=True, slots=True)
class WindowSpan:
    """Describe one window of a document.

    tokens: raw tokens in this window
    ratio:  raw tokens per slot; 0: the window is kept raw, one slot a token
    start, stop: where in the text the window lies, in characters
    span:   positions of the memory's span that it takes
    """

    tokens: int
    ratio: int
    start: int
    stop: int
    span: int

    def __post_init__(self) -> None:
        for name in ("tokens", "ratio", "start", "stop", "span"):
            _check_count(f"a window's {name}", getattr(self, name))
        if self.stop < self.start:
            raise InputError(f"a window's stop {self.stop} lies before its start {self.start}")

    @property
    def slots(self) -> int:
        """Count the slots of the window in each head, on average; its last, incomplete unit has one, too."""
        return -(-self.tokens // self.ratio) if self.ratio else self.tokens


@dataclass(frozen=True, slots=True)
class DocumentHeader:
    """Describe the document of a file.

    id, content_hash: the document, and the sha256 of its text in hexadecimal
    tokens:      raw tokens of the text
    windows:     in the order of the text, the last and perhaps incomplete one included
    tail_ids:    raw token ids of the last window if it is incomplete, so that `append` can go on where the text
                 stopped; empty if it is full
    compression: the name of the method that made slots of the text
    span:        positions of the model that the memory takes
    fingerprint: of the model, adapter and settings that made the K/V
    method:      the parameters of that method, see `BeaconCompressor.parameters`; None if they are not known
    created_at:  when they were made, ISO 8601, UTC
    """

    id: str
    content_hash: str
    tokens: int
    windows: tuple[WindowSpan, ...]
    tail_ids: tuple[int, ...]
    compression: str
    span: int
    fingerprint: Fingerprint
    method: Mapping[str, str | int] | None = None
    created_at: str = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        check_id(self.id)
        for name in ("content_hash", "created_at"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.isascii():
                raise InputError(f"{name} must be a text in ASCII, got {value!r}")
        if not METHOD_NAME.fullmatch(str(self.compression)):
            raise InputError(f"compression is {self.compression!r}, but must be the name of a method, such as 'select'")
        for name in ("tokens", "span"):
            _check_count(name, getattr(self, name))
        for token in self.tail_ids:
            _check_count("a token id of tail_ids", token)
        if self.tokens != sum(window.tokens for window in self.windows):
            raise InputError(
                f"tokens is {self.tokens}, but the windows hold {sum(window.tokens for window in self.windows)}"
            )
        if self.span != sum(window.span for window in self.windows):
            raise InputError(f"span is {self.span}, but the windows' are {sum(window.span for window in self.windows)}")
        if self.method is not None and not all(
            isinstance(one, (str, int)) for pair in self.method.items() for one in pair
        ):
            raise InputError(f"method must have texts or numbers under names, got {dict(self.method)!r}")
        if self.tail_ids and (not self.windows or len(self.tail_ids) != self.windows[-1].tokens):
            raise InputError(
                f"tail_ids has {len(self.tail_ids)} tokens, but the last window holds "
                f"{self.windows[-1].tokens if self.windows else 0}; give all of them, or none if the window is full"
            )

    @property
    def slots(self) -> int:
        """Count the slots of all windows in each head, on average."""
        return sum(window.slots for window in self.windows)

    @property
    def ratios(self) -> tuple[int, ...]:
        """Return the different ratios of the windows, ascending."""
        return tuple(sorted({window.ratio for window in self.windows}))

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> DocumentHeader:
        """Read what `dataclasses.asdict` gave; raises InputError, TypeError or CorruptFileError for anything else."""
        read: dict[str, Any] = {
            "windows": tuple(WindowSpan(**window) for window in stored.get("windows", ())),
            "tail_ids": tuple(stored.get("tail_ids", ())),
            "fingerprint": Fingerprint.from_dict(stored.get("fingerprint", {})),
        }
        if missing := {"windows", "tail_ids", "method", "created_at"} - set(stored):
            raise InputError(f"the header has no {', '.join(sorted(missing))}")
        return cls(**{**stored, **read})


def _check_count(what: str, value: object) -> None:
    if type(value) is not int or value < 0:
        raise InputError(f"{what} must be an integer of at least 0, got {value!r}")
    if value >= 1 << 63:
        raise InputError(f"{what} must be below 2**63, got {value!r}")
