"""The header of a K/V file: what it says of its document."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

from beacon_memory.config import METHOD_NAME
from beacon_memory.documents import check_id, check_namespace, utc_now
from beacon_memory.errors import InputError
from beacon_memory.kv.fingerprint import Fingerprint

__all__ = ["LONGEST_SECTION", "DocumentHeader", "SectionSpan", "WindowSpan"]

LONGEST_SECTION = 128  # positions; a passage has some 64 tokens


@dataclass(frozen=True, slots=True)
class WindowSpan:
    """Describe one window of a document.

    tokens: raw tokens in this window
    ratio:  raw tokens per slot; 0: the window is kept raw, one slot a token
    start, stop: where in the text the window lies, in characters
    span:   positions of the memory's span that it takes
    cuts:   where its sections after the first begin: the position in the window, and the character of the text
    due:    of a text that was appended and only read so far, at ratio 0: the ratio that it is due to be compressed at,
            together with other such windows and an incomplete one before them; None in all other windows
    """

    tokens: int
    ratio: int
    start: int
    stop: int
    span: int
    cuts: tuple[tuple[int, int], ...] = ()
    due: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "ratio", "start", "stop", "span"):
            _check_count(f"a window's {name}", getattr(self, name))
        if self.due is not None:
            _check_count("a window's due ratio", self.due)
            if self.ratio:
                raise InputError(f"a window due at ratio {self.due} must be at ratio 0, got {self.ratio}")
        for number in chain.from_iterable(self.cuts):
            _check_count("a number of a cut", number)
        positions = [0, *(position for position, _ in self.cuts), min(self.span, self.tokens)]
        characters = [self.start, *(character for _, character in self.cuts), self.stop]
        if self.cuts and not all(one < other for one, other in pairwise(positions)):
            raise InputError(f"a window's cuts must rise between 0 and its {positions[-1]} tokens, got {self.cuts}")
        if not all(one <= other for one, other in pairwise(characters)):
            raise InputError(f"a window's start, cuts and stop must not fall, got {characters}")

    @classmethod
    def of(
        cls, tokens: int, ratio: int, span: int, offsets: Sequence[tuple[int, int]], breaks: Sequence[int]
    ) -> WindowSpan:
        """Return a window whose tokens start and stop at `offsets` in the text, in characters.

        breaks: where passages of the text begin; its sections begin where theirs do. If it takes as many positions as
        it has tokens, or more, each of its first ones is that of a token; the others belong to all of it. If it takes
        fewer, each stands for as many tokens as any other.
        """
        starts = [start for start, _ in offsets]
        own = breaks[bisect_right(breaks, starts[0]) : bisect_right(breaks, starts[-1])]
        firsts = {bisect_left(starts, at): at for at in own}  # of breaks in one token the last counts
        cuts = {first if span >= tokens else first * span // tokens: at for first, at in firsts.items()}
        return cls(tokens, ratio, offsets[0][0], offsets[-1][1], span, tuple(sorted(cuts.items()))[0 in cuts :])

    @property
    def pieces(self) -> list[tuple[int, int, int, int]]:
        """Return first position and size of each piece between its cuts, with start and stop in the text.

        What lies behind the positions of its tokens, such as beacons, is a piece that belongs to all of its text.
        """
        own = min(self.span, self.tokens)
        bounds = [(0, self.start), *self.cuts, (own, self.stop)]
        found = [(low, high - low, start, stop) for (low, start), (high, stop) in pairwise(bounds)]
        return [*found, (own, self.span - own, self.start, self.stop)]

    @property
    def slots(self) -> int:
        """Count the slots of the window in each head, on average; its last, incomplete unit has one, too."""
        return -(-self.tokens // self.ratio) if self.ratio else self.tokens


@dataclass(frozen=True, slots=True)
class SectionSpan:
    """Describe a section: up to `LONGEST_SECTION` successive positions of one window.

    window: number of the window
    first, size: the position of the memory at which it begins, and how many it has
    start, stop: where in the text it lies, in characters
    """

    window: int
    first: int
    size: int
    start: int
    stop: int


@dataclass(frozen=True)  # without slots, so that the sections are kept
class DocumentHeader:
    """Describe the document of a file.

    id, content_hash: the document, and the sha256 of its text in hexadecimal
    tokens:      raw tokens of the text
    windows:     in the order of the text, the last and perhaps incomplete one included; behind it those that are due
                 to be compressed with it, if there are any
    tail_ids:    raw token ids of the last window if it is incomplete; empty if it is full
    compression: the name of the method that made slots of the text
    span:        positions of the model that the memory takes
    fingerprint: of the model, adapter and settings that made the K/V
    method:      the parameters of that method, see `BeaconCompressor.parameters`; None if they are not known
    created_at:  when they were made, ISO 8601, UTC
    namespace:   of the store, in which the document is; "" is the one outside of all others
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
    namespace: str = ""

    def __post_init__(self) -> None:
        check_id(self.id)
        check_namespace(self.namespace)
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
        _check_windows(self)
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

    @property
    def settled(self) -> tuple[WindowSpan, ...]:
        """Return the windows that are not due to be compressed: all but those that were appended since."""
        return tuple(window for window in self.windows if window.due is None)

    @property
    def window_starts(self) -> list[int]:
        """Return the position of the memory at which each window begins."""
        return [0, *accumulate(window.span for window in self.windows)][:-1]

    @property
    def section_count(self) -> int:
        """Count the sections without making a list of them, which a header may claim to be very long."""
        return sum(-(-size // LONGEST_SECTION) for window in self.windows for _, size, *_ in window.pieces)

    @cached_property
    def sections(self) -> list[SectionSpan]:
        """Return all sections: the pieces of all windows, the longest ones in equal parts."""
        found, before = [], 0
        for number, window in enumerate(self.windows):
            for low, size, start, stop in window.pieces:
                parts = -(-size // LONGEST_SECTION)
                firsts = [before + low + size * part // parts for part in range(parts)]
                bounds = pairwise([*firsts, before + low + size])
                found += [SectionSpan(number, first, end - first, start, stop) for first, end in bounds]
            before += window.span
        return found

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> DocumentHeader:
        """Read what `dataclasses.asdict` gave; raises InputError, TypeError or CorruptFileError for anything else."""
        windows = (window | {"cuts": tuple(map(tuple, window["cuts"]))} for window in stored.get("windows", ()))
        read: dict[str, Any] = {
            "windows": tuple(WindowSpan(**window) for window in windows),
            "tail_ids": tuple(stored.get("tail_ids", ())),
            "fingerprint": Fingerprint.from_dict(stored.get("fingerprint", {})),
        }
        if missing := {"windows", "tail_ids", "method", "created_at", "namespace"} - set(stored):
            raise InputError(f"the header has no {', '.join(sorted(missing))}")
        return cls(**{**stored, **read})


def _check_count(what: str, value: object) -> None:
    if type(value) is not int or value < 0:
        raise InputError(f"{what} must be an integer of at least 0, got {value!r}")
    if value >= 1 << 63:
        raise InputError(f"{what} must be below 2**63, got {value!r}")


def _check_windows(header: DocumentHeader) -> None:
    """Raise InputError for windows that cannot be all of a document."""
    if header.tokens != sum(window.tokens for window in header.windows):
        raise InputError(
            f"tokens is {header.tokens}, but the windows hold {sum(window.tokens for window in header.windows)}"
        )
    if header.span != sum(window.span for window in header.windows):
        raise InputError(f"span is {header.span}, but the windows' are {sum(window.span for window in header.windows)}")
    if header.windows[: len(header.settled)] != header.settled:
        raise InputError("the windows that are due to be compressed must be the last ones")
