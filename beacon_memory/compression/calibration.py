"""Calibrating: a probe is fitted to windows of texts of one's own, and compared with `repeat` on others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

from torch import Tensor

from beacon_memory.errors import InputError
from beacon_memory.modeling.layout import slots_of
from beacon_memory.modeling.probe import Probe

from .compressor import BeaconCompressor
from .methods.method import Reader
from .methods.scored import ReadWindow
from .methods.select import Fitting
from .scoring import ExpectedAttention, repeated
from .selection import best
from .work import Work

__all__ = ["COMPARED_AT", "Calibration", "calibrate"]

COMPARED_AT = 8  # the ratio at which scores are compared
_LEAST = 8  # windows that a calibration needs; of each eight, one is compared
_SHORTEST = 64  # tokens of a window


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """A probe, and what it is worth.

    probe:    what was fitted.
    windows:  the number of windows that it was fitted to.
    compared: the number of other windows that it was compared on.
    share:    how many of the entries that `repeat` keeps of those at ratio 8 the probe keeps, too.
    before:   how many of them the model's probe of before keeps.
    """

    probe: Probe
    windows: int
    compared: int
    share: float
    before: float


class _Comparing(Fitting):
    """Choose by repeating windows, and see how many of the same entries probes would have kept."""

    def __init__(self, reader: Reader, probes: Sequence[Probe]) -> None:
        super().__init__(reader)
        self.probes = probes
        self.shares: list[list[float]] = []

    def scores(self, windows: Sequence[ReadWindow]) -> list[Tensor]:
        found = repeated(self.model, windows)
        for window, scores in zip(windows, found, strict=True):
            if isinstance(window.watch, ExpectedAttention):
                budget = slots_of(len(window.ids), COMPARED_AT)
                kept = best(scores, budget)
                told = [best(probe(window.kv, window.watch.scores), budget) for probe in self.probes]
                self.shares.append([((one & kept).sum() / kept.sum()).item() for one in told])
        return found


def calibrate(
    compressor: BeaconCompressor,
    texts: Iterable[str],
    windows: int = 300,
    progress: Callable[[int, int], None] = lambda _read, _all: None,
) -> Calibration:
    """Fit a probe to windows of texts, drawn at random; one of eight is left out of the fit and compared.

    windows: how many are read at most. progress: called for each window, with how many are read, and will be.

    Raises InputError for texts of fewer than eight windows.
    """
    size = compressor.model.config.beacon_window
    read_whole = (compressor.tokenize(text).ids for text in texts)
    pieces = [ids[start : start + size] for ids in read_whole for start in range(0, len(ids), size)]
    pieces = [ids for ids in pieces if len(ids) >= min(size, _SHORTEST)]
    if min(len(pieces), windows) < _LEAST:
        raise InputError(
            f"the texts have {len(pieces)} windows of {size:,} tokens, of which {windows} may be read: a calibration "
            f"needs {_LEAST} at least"
        )
    drawn = Random(0).sample(pieces, min(len(pieces), windows))
    compared, fitted = drawn[: len(drawn) // _LEAST], drawn[len(drawn) // _LEAST :]
    read = count(1)

    def run(method: Fitting, pieces: Sequence[Sequence[int]]) -> None:
        works = ((None, Work(piece, [COMPARED_AT])) for piece in pieces)
        for _ in compressor.compress_with(method, works):
            progress(next(read), len(drawn))

    fitting = Fitting(compressor)
    before = fitting.probe
    run(fitting, fitted)
    comparing = _Comparing(compressor, (probe := fitting.fit.probe(), before))
    run(comparing, compared)
    share, share_before = (sum(shares) / len(compared) for shares in zip(*comparing.shares, strict=True))
    return Calibration(probe, len(fitted), len(compared), share, share_before)
