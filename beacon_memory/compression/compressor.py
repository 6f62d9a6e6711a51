"""Compressing documents by any method: what all methods have in common.

A window's memory depends on nothing behind the window, so a document goes on where an earlier compression stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

import torch

from beacon_memory.errors import CapacityError, ConfigError, InputError
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.modeling.layout import slots_of
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.text_tokens import text_tokens

from .methods.method import CompressionMethod, MakeMethod, Plan
from .methods.registry import find, package_of
from .ratio import AUTO_RATIOS, auto_ratio, positions_needed, too_long, window_ratios
from .scoring import SCORES, check_score
from .selection import prefix_of, read_raw, read_sink
from .work import CompressedDocument, CompressedWindow, Ratio, TokenizedText, Work

__all__ = ["PACKAGE", "BeaconCompressor"]

Key = TypeVar("Key")
_One = TypeVar("_One")
PACKAGE = "package"  # the parameter of a document's method that names what to install


class BeaconCompressor:
    """Documents to memories, window after window in passes of bounded size.

    rows_per_pass: rows (raw tokens and beacons) that one forward pass may have, at least one window. It bounds the
                   memory that it takes, whatever the length of the documents, and changes no number but by rounding.
    reserve:       positions of the model to leave free for question and answer behind a document.
    score:         how `select` and `hybrid` choose tokens: `repeat`, or `expected`, a prediction that saves a pass;
                   `auto` for `expected` where the adapter has a probe, `repeat` where not. As an attribute it is never
                   `auto`.

    Raises ConfigError for another score.
    """

    def __init__(
        self, model: BeaconModel, *, rows_per_pass: int = 4096, reserve: int = 1024, score: str = "auto"
    ) -> None:
        self.model = model
        self._auto = check_score(score) == "auto"
        self.score = score if not self._auto else "repeat" if model.probe is None else "expected"
        self.rows_per_pass = rows_per_pass
        self.reserve = reserve
        self._sink: BeaconKV | None = None
        self._other: BeaconCompressor | None = None
        self._methods: dict[MakeMethod, CompressionMethod] = {}

    @property
    def sink(self) -> BeaconKV:
        """K/V of the sink, which stand in front of every memory; read once."""
        if self._sink is None:
            with torch.inference_mode():
                self._sink = read_sink(self.model)
        return self._sink

    def tokenize(self, text: str) -> TokenizedText:
        """Return the token ids of a text, none of them a control token.

        Where the model has no sink, a bos token leads, if its tokenizer sets one.
        """
        ids, offsets = text_tokens(self.model.tokenizer, text)
        if not self.model.sink_ids and ids:
            bos = self.model.leading_bos
            return TokenizedText([*bos, *ids], [(0, 0)] * len(bos) + offsets)
        return TokenizedText(ids, offsets)

    def tokenize_behind(self, before: str, text: str) -> TokenizedText:
        """Return the tokens of a text that stands behind another one, with their places in both together.

        No token lies on both sides of the seam: where the tokenizer makes one, `text` is cut as if it stood alone.
        """
        ids, offsets = text_tokens(self.model.tokenizer, before + text)
        seam = len(before)
        first = next((number for number, (start, _) in enumerate(offsets) if start >= seam), len(ids))
        if first and offsets[first - 1][1] > seam:
            ids, offsets = text_tokens(self.model.tokenizer, text)
            return TokenizedText(ids, [(seam + start, seam + stop) for start, stop in offsets])
        return TokenizedText(ids[first:], offsets[first:])

    @torch.inference_mode()
    def read_raw(self, memory: MemoryKV, ids: Sequence[int]) -> MemoryKV:
        """Read tokens behind the sink and a memory; returns the K/V of all of them, whatever the method.

        Of a memory with more positions than the model has, its last part is seen.
        """
        seen = memory.between(max(0, memory.span - self.model.max_positions), memory.span)
        parts = [MemoryKV.of(self.sink), seen.to(self.model.device, self.model.dtype)]
        return MemoryKV.of(read_raw(self.model, prefix_of(self.model, parts, len(ids)), ids))

    def fits(self, slots: int, compression: str) -> bool:
        """Tell whether a memory of so many slots leaves `reserve` positions of the model free, where it must."""
        return (
            self._method(compression).any_length
            or self.model.config.beacon_sink_size + slots + self.reserve <= self.model.max_positions
        )

    def ratios(self, tokens: int, ratio: Ratio, compression: str | None = None) -> list[int]:
        """Return the ratio of each window of a document of so many tokens.

        ratio: raw tokens per slot; `auto` for the smallest of 2 to 32 that leaves `reserve` positions; or a list
        with one ratio for each window. compression: the method that reads it, if what it reads need not fit the model
        as a whole (`CompressionMethod.any_length`); `auto` then is 2. Raises ConfigError for another value, InputError
        for no tokens and CapacityError, with the numbers, for a document that would not fit.
        """
        config, positions = self.model.config, self.model.max_positions
        if isinstance(ratio, str) and ratio != "auto":
            raise ConfigError(f"ratio={ratio!r} must be 'auto', a whole number, or a list of them")
        if compression is not None and self._method(compression).any_length:
            return window_ratios(tokens, min(AUTO_RATIOS) if isinstance(ratio, str) else ratio, config)
        if isinstance(ratio, str):
            ratio = auto_ratio(tokens, config, positions, self.reserve)
        ratios = window_ratios(tokens, ratio, config)
        if positions_needed(tokens, ratios, config, self.reserve) > positions:
            raise CapacityError(too_long(tokens, ratio, config, positions, self.reserve))
        return ratios

    def compression(self, name: str) -> str:
        """Return `name`, or for `auto` the model's own compression.

        Raises ConfigError if no method of the name is installed, or it cannot work with this model.
        """
        chosen = self.model.compression if name == "auto" else name
        self._method(chosen)
        return chosen

    def choosing_as(self, method: Mapping[str, str | int] | None) -> BeaconCompressor:
        """Return a compressor that chooses tokens by the score that a document's `method` names, where `auto` may."""
        score = (method or {}).get("score")
        if not self._auto or score == self.score or score not in SCORES:
            return self
        if self._other is None:  # there are two scores
            self._other = BeaconCompressor(
                self.model, rows_per_pass=self.rows_per_pass, reserve=self.reserve, score=str(score)
            )
        return self._other

    def parameters(self, compression: str, package: str | None = None) -> dict[str, str | int]:
        """Return the parameters of a method as they are stored with a document, the package that it is from included.

        package: the one to name if the method is not installed. Raises ConfigError then, and for `auto`.
        """
        own, installed = self._method(compression, package).parameters, package_of(compression)
        return dict(own) if installed is None else {**own, PACKAGE: installed}

    def compress(
        self,
        works: Iterable[tuple[Key, Work]],
        progress: Callable[[int], None] = lambda _: None,
        *,
        compression: str = "auto",
    ) -> Iterator[tuple[Key, CompressedDocument]]:
        """Compress documents; yields each under the key that it came with, in their order.

        A document is yielded, whole, as soon as its last window was read. `works` is only read as far as the next pass
        needs; if it raises an error, the documents before it are finished and yielded first. progress: called after
        each pass with the raw tokens that it read. compression: the name of a method, such as `beacon`, `select` (K/V
        of chosen tokens) or `hybrid` (both), or `auto`, the model's own. Raises ConfigError for a method that there is
        not, before any document is taken, and InputError for a document whose `read` cannot be the memory of its first
        `windows` windows.
        """
        return self.compress_with(self._method(self.compression(compression)), works, progress)

    def compress_with(
        self,
        method: CompressionMethod,
        works: Iterable[tuple[Key, Work]],
        progress: Callable[[int], None] = lambda _: None,
    ) -> Iterator[tuple[Key, CompressedDocument]]:
        """Do the same as `compress` by a method that need not be installed."""
        plans = _UntilError((key, self._plan(work, method)) for key, work in works)
        begun: deque[tuple[Key, Plan]] = deque()

        def under_plans() -> Iterator[tuple[Plan, Plan]]:
            for key, plan in plans:
                begun.append((key, plan))
                yield plan, plan

        for plan, memories in method.compress(under_plans(), progress):
            for memory in memories:
                plan.parts.append(memory)
            while begun and not begun[0][1].unread:
                key, done = begun.popleft()
                yield key, CompressedDocument(done.parts, len(done.ids), tuple(done.windows))
        plans.raise_error()

    def compress_one(
        self, work: Work, progress: Callable[[int], None] = lambda _: None, *, compression: str = "auto"
    ) -> CompressedDocument:
        """Compress one document."""
        ((_, document),) = self.compress([(None, work)], progress, compression=compression)
        return document

    def _method(self, name: str, package: str | None = None) -> CompressionMethod:
        make = find(name, package)
        if make not in self._methods:
            self._methods[make] = make(self)
        return self._methods[make]

    def _plan(self, work: Work, method: CompressionMethod) -> Plan:
        """Cut a document into windows; raises InputError where `read` cannot be the memory of the first of them."""
        size, windows = self.model.config.beacon_window, []
        for number, ratio in enumerate(window_ratios(len(work.ids), work.ratios, self.model.config)):
            tokens = min(size, len(work.ids) - number * size)
            windows.append(CompressedWindow(number * size, tokens, ratio, method.span(tokens, ratio)))
        return Plan(work.ids, windows, self._read_before(work, windows) if work.parts is None else work.parts)

    def _read_before(self, work: Work, windows: Sequence[CompressedWindow]) -> list[MemoryKV]:
        """Return the memory of each window that was read before.

        They go on as parts of their own, because a memory that is interpolated is interpolated part by part.
        """
        full = len(work.ids) // self.model.config.beacon_window
        if not 0 <= work.windows <= full:
            raise InputError(f"windows={work.windows} cannot have been read before: the document has {full} full ones")
        read = MemoryKV.of(self.model.empty_kv()) if work.read is None else work.read
        read = read.to(self.model.device, self.model.dtype)
        ends = list(accumulate((window.span for window in windows[: work.windows]), initial=0))
        if read.span != ends[-1]:
            raise InputError(f"read spans {read.span} positions, but the first {work.windows} windows take {ends[-1]}")
        parts = [read.between(start, stop) for start, stop in pairwise(ends)]
        heads = math.prod(self.model.kv_shape[:2])
        for number, (part, window) in enumerate(zip(parts, windows, strict=False)):
            entries = heads * slots_of(window.tokens, window.ratio)
            if len(part.keys) != entries:
                raise InputError(
                    f"read has {len(part.keys)} entries of window {number}, which at ratio {window.ratio} leaves "
                    f"{entries} in {heads} heads"
                )
        return parts


class _UntilError(Generic[_One]):
    """Iterate up to the first error, which is kept until all that came before it is finished."""

    def __init__(self, items: Iterable[_One]) -> None:
        self._items = iter(items)
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[_One]:
        try:
            yield from self._items
        except Exception as error:  # noqa: BLE001  # whatever it is, it is raised in the end
            self._error = error

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error
