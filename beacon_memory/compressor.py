"""Compressing documents: to beacons, many to a pass, or to K/V of chosen tokens, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import accumulate

import torch
from torch import Tensor

from .config import COMPRESSIONS
from .errors import CapacityError, ConfigError
from .kv import BeaconKV, MemoryKV
from .layout import Window
from .modeling import BeaconModel
from .ratio import auto_ratio, positions_needed, too_long, window_ratios
from .scoring import PIECE, repeated
from .selection import read_raw, read_sink, read_window
from .sequence import SequenceState, advance

__all__ = ["BeaconCompressor", "CompressedDocument", "CompressedWindow", "TokenizedText", "check_score"]

SCORES = ("repeat", "expected")
Ratio = int | str | Sequence[int]


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A text as the model reads it.

    ids:     token ids.
    offsets: for each token where it starts and stops in the text, in characters.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class CompressedWindow:
    """A window of a compressed document: its raw tokens, its ratio, and where it starts among the document's tokens."""

    first: int
    tokens: int
    ratio: int


@dataclass(frozen=True, slots=True, eq=False)
class CompressedDocument:
    """What is kept of a document: its memory, without the sink, and how its windows were compressed."""

    kv: MemoryKV
    tokens: int
    windows: tuple[CompressedWindow, ...]


def check_score(score: str) -> str:
    """`score` if it is one; raises ConfigError otherwise."""
    if score not in SCORES:
        raise ConfigError(f"score={score!r} must be one of {', '.join(map(repr, SCORES))}")
    return score


class BeaconCompressor:
    """Documents to memories, window after window in passes of bounded size.

    rows_per_pass: rows (raw tokens and beacons) that one forward pass of a `beacon` compression may have, at least one
                   window. It bounds the memory that it takes, whatever the length of the documents, and changes no
                   number. The other compressions read one window of one document at a time.
    reserve:       positions of the model to leave free for question and answer behind a document.
    score:         how tokens are chosen for `select` and `hybrid`, see `scoring`: `repeat`, or `expected`, which is
                   worse and saves a pass.

    Raises ConfigError for another score.
    """

    def __init__(
        self, model: BeaconModel, *, rows_per_pass: int = 4096, reserve: int = 1024, score: str = "repeat"
    ) -> None:
        self.model = model
        self.score = check_score(score)
        self.rows_per_pass = rows_per_pass
        self.reserve = reserve
        self._sink: BeaconKV | None = None
        self._measured: Tensor | None = None

    @property
    def sink(self) -> BeaconKV:
        """See `read_sink`; read once."""
        if self._sink is None:
            with torch.inference_mode():
                self._sink = read_sink(self.model)
        return self._sink

    def _scores(self) -> Tensor | None:
        """For the score `expected`, what heads need of the text that is kept for this; measured once."""
        if self.score == "expected" and self._measured is None:
            text = files("beacon_memory").joinpath("calibration.txt").read_text(encoding="utf-8")
            ids = self.tokenize(text).ids[: self.model.config.beacon_window]
            front = self.model.front(MemoryKV.of(self.sink))
            self._measured = repeated(self.model, front, read_raw(self.model, front, ids), ids)
        return self._measured

    def tokenize(self, text: str) -> TokenizedText:
        """Token ids of a document. Where the model has no sink, a bos token leads, if its tokenizer sets one."""
        encoded = self.model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
        if not self.model.sink_ids and ids:
            bos = self.model.leading_bos
            return TokenizedText([*bos, *ids], [(0, 0)] * len(bos) + offsets)
        return TokenizedText(ids, offsets)

    def ratios(self, tokens: int, ratio: Ratio) -> list[int]:
        """The ratio of each window of a document of so many tokens.

        ratio: raw tokens per slot; `auto` for the smallest of 2 to 32 that leaves `reserve` positions; or a list
        with one ratio for each window. Raises ConfigError for another value, InputError for no tokens and
        CapacityError, with the numbers, for a document that would not fit.
        """
        config, positions = self.model.config, self.model.max_positions
        if isinstance(ratio, str):
            if ratio != "auto":
                raise ConfigError(f"ratio={ratio!r} must be 'auto', a whole number, or a list of them")
            ratio = auto_ratio(tokens, config, positions, self.reserve)
        ratios = window_ratios(tokens, ratio, config)
        if positions_needed(tokens, ratios, config, self.reserve) > positions:
            raise CapacityError(too_long(tokens, ratio, config, positions, self.reserve))
        return ratios

    def compression(self, name: str) -> str:
        """What `name` stands for: itself, or for `auto` the model's own. Raises ConfigError for one it cannot have."""
        if name not in ("auto", *COMPRESSIONS):
            raise ConfigError(f"compression={name!r} must be one of 'auto', {', '.join(map(repr, COMPRESSIONS))}")
        chosen = self.model.compression if name == "auto" else name
        if chosen == "hybrid" and self.model.config.beacon_attn != "hidden":
            raise ConfigError(
                "compression='hybrid' needs beacon_attn='hidden': with 'full-coverage' raw tokens see the beacons"
            )
        return chosen

    def compress(
        self,
        documents: Iterable[tuple[Sequence[int], Sequence[int]]],
        progress: Callable[[int], None] = lambda _: None,
        *,
        compression: str = "auto",
    ) -> Iterator[CompressedDocument]:
        """Compress documents, given as token ids and the ratio of each window (see `ratios`), in their order.

        A document is yielded as soon as its last window was read; `documents` is only read as far as one pass needs.
        `progress` is called after each pass with the raw tokens it read. compression: `beacon`, `select` (K/V of chosen
        tokens), `hybrid` (both) or `auto`, the model's own.
        """
        compression = self.compression(compression)
        if compression == "beacon":
            return self._to_beacons(documents, progress)
        return (self._choose(ids, ratios, compression == "hybrid", progress) for ids, ratios in documents)

    @torch.inference_mode()
    def _choose(
        self, ids: Sequence[int], ratios: Sequence[int], hybrid: bool, progress: Callable[[int], None]
    ) -> CompressedDocument:
        """Read a document window by window, each behind the memory of those before it."""
        size = self.model.config.beacon_window
        parts, windows, measured = [MemoryKV.of(self.sink)], [], self._scores()
        for number, ratio in enumerate(window_ratios(len(ids), ratios, self.model.config)):
            window = ids[number * size : (number + 1) * size]
            room = max(1, self.model.max_positions - len(window) - min(PIECE, len(window)))
            front = self.model.front(MemoryKV.concat(parts, room).squeezed(room))
            parts.append(read_window(self.model, front, window, ratio, hybrid=hybrid, measured=measured))
            windows.append(CompressedWindow(number * size, len(window), ratio))
            progress(len(window))
        return CompressedDocument(MemoryKV.concat(parts[1:]), len(ids), tuple(windows))

    def _to_beacons(
        self, documents: Iterable[tuple[Sequence[int], Sequence[int]]], progress: Callable[[int], None]
    ) -> Iterator[CompressedDocument]:
        current: list[_Reading] = []  # documents with windows in the next pass, or unfinished
        rows = 0
        for ids, ratios in documents:
            reading = _Reading(self.model, self.sink, ids, window_ratios(len(ids), ratios, self.model.config))
            current.append(reading)
            for window in reading.windows:
                size = len(window.new_ids) + len(window.anchors)
                if rows and rows + size > self.rows_per_pass:
                    yield from self._run(current, progress)
                    rows = 0
                reading.next.append(window)
                rows += size
        if current:
            yield from self._run(current, progress)

    def _run(self, current: list[_Reading], progress: Callable[[int], None]) -> Iterator[CompressedDocument]:
        """Read the collected windows in one pass; yields the documents that are finished and drops them."""
        reading = [one for one in current if one.next]
        with torch.inference_mode():
            states, _ = advance(self.model, [(one.state, one.next) for one in reading])
        tokens = 0
        for one, state in zip(reading, states, strict=True):
            tokens += sum(len(window.new_ids) for window in one.next)
            one.take(state)
        progress(tokens)
        while current and current[0].finished:
            yield current.pop(0).result(self.sink.slots)


class _Reading:
    """One document on its way through the passes."""

    def __init__(self, model: BeaconModel, sink: BeaconKV, ids: Sequence[int], ratios: Sequence[int]) -> None:
        self.tokens = len(ids)
        self.state = SequenceState.start(model, memory=sink)
        self.windows: list[Window] = model.cut(self.state.cursor, ids, iter(ratios), tail="close")
        self.next: list[Window] = []
        self.read = 0

    @property
    def finished(self) -> bool:
        return self.read == len(self.windows)

    def take(self, state: SequenceState) -> None:
        self.state = state
        self.read += len(self.next)
        self.next = []

    def result(self, sink_slots: int) -> CompressedDocument:
        firsts = accumulate((len(window.ids) for window in self.windows), initial=0)
        windows = tuple(
            CompressedWindow(first, len(window.ids), window.ratio)
            for first, window in zip(firsts, self.windows, strict=False)  # the last of `firsts` is the end
        )
        return CompressedDocument(MemoryKV.of(self.state.memory[sink_slots:]), self.tokens, windows)
