"""Calibrating: a probe is fitted to windows of texts of one's own, and compared with `repeat` on others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

from torch import Tensor

from beacon_memory.errors import InputError
from beacon_memory.kv.memory_kv import BeaconKV
from beacon_memory.modeling.layout import slots_of
from beacon_memory.modeling.probe import Probe

from .compressor import BeaconCompressor
from .methods.select import Select, Studied
from .scoring import ProbeFit
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
    read, fit = count(1), ProbeFit()
    shares: list[list[float]] = []

    def study(pieces: Sequence[Sequence[int]], show: Callable[[BeaconKV, Tensor, Tensor], None]) -> None:
        works = ((None, Work(piece, [COMPARED_AT])) for piece in pieces)
        for _ in compressor.compress_with(Studied(compressor, show), works):
            progress(next(read), len(drawn))

    def compare(kv: BeaconKV, expected: Tensor, scores: Tensor) -> None:
        budget = slots_of(kv.slots, COMPARED_AT)
        kept = best(scores, budget)
        told = [best(one(kv, expected), budget) for one in (probe, before)]
        shares.append([((one & kept).sum() / kept.sum()).item() for one in told])

    before = Select(compressor).probe
    study(fitted, fit.take)
    probe = fit.probe()
    study(compared, compare)
    share, share_before = (sum(of_windows) / len(compared) for of_windows in zip(*shares, strict=True))
    return Calibration(probe, len(fitted), len(compared), share, share_before)
