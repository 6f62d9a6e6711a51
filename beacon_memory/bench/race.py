"""A race of ways to answer from a text that was read before: `beacon-memory bench race`.

All contestants run in one go and in turn, so that whatever else the machine does slows all of them. They run in a few
processes, one for each library, so that what one of them changes or holds in memory is not seen by another.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.utils.logging import disable_progress_bar

from beacon_memory.errors import InputError

from .contestants import Contestant, Form, ModelNames, Place, contestant, form_of, our_model, texts
from .measuring import REPEATS, Figure, evict, machine, once, peak_memory, table
from .model import generating

__all__ = ["CONTESTANTS", "LENGTHS", "Race", "Result", "require_page", "run", "write_into"]

CONTESTANTS = (
    *("stock", "stock-cache", "expected:4", "kvzip:4", "window-loop:8", "beacon:8", "hybrid:8", "select-expected:8"),
    *("select:2", "select:8", "select:16", "select:8@int4"),
)
LENGTHS = (1000, 2000, 4000, 8000)
_WARMING = 256  # tokens of a text that all read and answer from before anything counts
_OFTEN = 1000  # tokens of the longest text that is read more than once
_TOKENS = 9  # of the answers whose tokens are timed
_FEW_SLOTS = 500  # fewest that a token is measured behind
_RATIO = 8  # of the contestants that are meant to keep bounds; here those of their reading
_READING = {"select": "at least 0.45, of 8,000 tokens 0.6", "select-expected": "at least 0.9"}
_BEGIN, _END = "<!-- written by `beacon-memory bench race --write` -->", "<!-- until here -->"


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of a contestant on a text of so many tokens.

    reading: seconds to read the text and keep what answers need.
    first:   seconds from the question to the first token of the answer, by the place of what was kept.
    token:   seconds of a further token; None if it cannot answer.
    plain:   seconds of reading the kept files from the disk, and nothing else.
    kept:    bytes of these files.
    reading_peak, answering_peak: bytes of memory that it takes beyond those of the process with its loaded model.
    """

    name: str
    tokens: int
    reading: float
    first: Mapping[Place, float]
    token: float | None
    plain: float
    kept: int
    reading_peak: int
    answering_peak: int

    @property
    def measurements(self) -> list[float | None]:
        """Return what is compared with stock, in the order of the table; None for what a contestant cannot do.

        Who keeps nothing on the disk, or in RAM, takes as long from there as from the place before it.
        """
        cold = self.first.get("cold")
        ram = self.first.get("ram", cold)
        peak = self.answering_peak if self.first else None
        return [self.reading, cold, ram, self.first.get("hot", ram), self.token, self.reading_peak, peak]


@dataclass(frozen=True, slots=True)
class Race:
    """All results, and the figures that are meant to keep a bound."""

    results: Sequence[Result]
    figures: Sequence[Figure]

    def page(self) -> str:
        """Return tables in markdown: for each length how many times as fast, or as small, as stock each one was."""
        lengths = dict.fromkeys(one.tokens for one in self.results)
        tables = [_compared([one for one in self.results if one.tokens == tokens]) for tokens in lengths]
        return "\n\n".join([*tables, table(self.figures), machine()])


def _compared(results: Sequence[Result]) -> str:
    stock = next(one for one in results if one.name == "stock")
    columns = ("reading", "first token, from the disk", "from RAM", "ready", "a token", "memory, reading", "answering")
    shown = [f"{stock.tokens / stock.reading:,.0f} tokens/s", *map(_seconds, stock.measurements[1:5])]
    shown += [f"{peak / 1e6:,.0f} MB" for peak in (stock.reading_peak, stock.answering_peak)]
    lines = [
        f"| {stock.tokens:,} tokens | {' | '.join(columns)} | kept |",
        f"|---{'|---' * (1 + len(columns))}|",
        f"| `stock` | {' | '.join(shown)} | |",
    ]
    for one in results:
        if one is not stock:
            pairs = zip(stock.measurements, one.measurements, strict=True)
            ratios = [f"{its / own:.3g}" if its and own else "" for its, own in pairs]
            lines.append(f"| `{one.name}` | {' | '.join(ratios)} | {f'{one.kept / 1e6:,.1f} MB' if one.kept else ''} |")
    return "\n".join(lines)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def require_page(page: Path) -> None:
    """Raise InputError if a page has no place for the tables."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the page {str(page)!r} cannot be read: {error}") from error
    if not 0 <= text.find(_BEGIN) < text.find(_END):
        raise InputError(f"the page {str(page)!r} has no lines {_BEGIN!r} and {_END!r}, between which the tables go")


def write_into(page: Path, race: Race) -> None:
    """Write the tables of a race into a page, in place of those that stood there; raises InputError."""
    require_page(page)
    before, _, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    page.write_text(f"{before}{_BEGIN}\n\n{race.page()}\n\n{_END}{after}", encoding="utf-8")


class _Call(Protocol):
    """Call a function without arguments in the process of a contestant, and wait for it."""

    def __call__(self, form: Form, work: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    """A contestant and a text, as its process is told of it."""

    form: Form
    model: ModelNames
    text: str
    folder: Path


@dataclass(frozen=True, slots=True)
class _Reading:
    seconds: float
    peak: int
    kept: int


@dataclass(frozen=True, slots=True)
class _Answers:
    """The seconds to each token of an answer, by place; of a plain read; and the peak of the first answer."""

    times: Mapping[Place, Sequence[float]]
    plain: float
    peak: int


def run(model: ModelNames, names: Sequence[str] = CONTESTANTS, lengths: Sequence[int] = LENGTHS) -> Iterator[Race]:
    """Let contestants read texts of so many tokens, less where question and answer need the room, and answer.

    Yields the race so far after each length. All of it takes more than eighteen minutes on two cores. Stock runs
    whether it is named or not. Raises InputError, before anything is loaded, for an unknown contestant and for lengths
    that are too short, and MissingDependencyError.
    """
    forms = [form_of(name) for name in dict.fromkeys(("stock", *names))]
    if not lengths or min(lengths) <= _WARMING:
        raise InputError(f"lengths are {list(lengths)}, but must be one or more, each above {_WARMING} tokens")
    with _processes(forms) as call, tempfile.TemporaryDirectory(prefix="beacon-memory-") as folder:
        cut = call(forms[0], partial(texts, model, (_WARMING, *sorted(set(lengths))), _TOKENS))
        ours = next((form for form in forms if form.process == "beacon_memory"), None)
        results: list[Result] = []
        steps: list[Figure] = []
        for number, (tokens, text) in enumerate(cut):
            raced = _raced(call, [_Entry(form, model, text, Path(folder)) for form in forms], tokens)
            if ours is not None:
                steps += call(ours, partial(_steps, model, tokens if number else _FEW_SLOTS))
            if number:  # the first one was to warm up
                results += raced
                yield Race([*results], [*steps, *_bounded(results)])


@contextmanager
def _processes(forms: Sequence[Form]) -> Iterator[_Call]:
    """Start the processes of contestants."""
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        names = dict.fromkeys(form.process for form in forms)
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, spawn, disable_progress_bar)) for name in names}
        yield lambda form, work: pools[form.process].submit(work).result()


def _raced(call: _Call, entries: Sequence[_Entry], tokens: int) -> list[Result]:
    often = {True: 1 if tokens == _WARMING else REPEATS, False: REPEATS if _WARMING < tokens <= _OFTEN else 1}
    reads: dict[str, list[_Reading]] = {one.form.name: [] for one in entries}
    answers: dict[str, list[_Answers]] = {one.form.name: [] for one in entries}
    for _ in range(often[False]):
        for one in entries:
            reads[one.form.name].append(call(one.form, partial(_read, one)))
    for number in range(often[True]):
        for one in entries:
            if number < often[one.form.keeps]:
                answers[one.form.name].append(call(one.form, partial(_answered, one)))
    return [_result(name, tokens, reads[name], answers[name]) for name in reads]


def _result(name: str, tokens: int, reads: Sequence[_Reading], answers: Sequence[_Answers]) -> Result:
    first = {place: statistics.median(one.times[place][0] for one in answers) for place in answers[0].times}
    timed = [times for one in answers for times in one.times.values()]
    later = [after - before for times in timed for before, after in itertools.pairwise(times)]
    return Result(
        name,
        tokens,
        reading=statistics.median(one.seconds for one in reads),
        first=first,
        token=statistics.median(later) if later else None,
        plain=statistics.median(one.plain for one in answers),
        kept=reads[-1].kept,
        reading_peak=max(one.peak for one in reads),
        answering_peak=max(one.peak for one in answers),
    )


@cache
def _running(entry: _Entry) -> Contestant:
    return contestant(entry.form, entry.model, entry.text, entry.folder)


def _read(entry: _Entry) -> _Reading:
    one = _running(entry)
    seconds: list[float] = []
    before, peak = peak_memory(lambda: seconds.append(once(one.read, one.device)), one.device)
    return _Reading(seconds[0], peak - before, sum(path.stat().st_size for path in one.files))


def _answered(entry: _Entry) -> _Answers:
    one = _running(entry)
    _evict(one)
    plain = once(lambda: [path.read_bytes() for path in one.files], torch.device("cpu"))
    times: dict[Place, Sequence[float]] = {}
    peak = 0

    def answer(place: Place) -> None:
        timed = place in ("hot", one.places[0])
        times[place] = one.answer(place, _TOKENS if timed else 1)

    for place in one.places:
        if place == "cold":
            _evict(one)
            before, most = peak_memory(partial(answer, place), one.device)
            peak = most - before
            if not one.files:  # it reads the text anew, which takes long
                continue
            _evict(one)  # and once more: what had to give memory back for its peak takes longer
        answer(place)
    return _Answers(times, plain, peak)


def _evict(one: Contestant) -> None:
    for path in one.files:
        evict(path)


def _steps(model: ModelNames, slots: int) -> list[Figure]:
    return generating(our_model(model), slots)


def _bounded(results: Sequence[Result]) -> Iterator[Figure]:
    """Yield what is meant to keep a bound, of the contestants that ran."""
    stock = {one.tokens: one for one in results if one.name == "stock"}
    for one in results:
        form, its = form_of(one.name), stock[one.tokens]
        if form.method not in _READING or form.ratio != _RATIO or form.precision != "auto":
            continue
        figure = partial(_figure, f"`{one.name}`, {one.tokens:,} tokens")
        yield figure("reading", "stock / ours", its.reading, one.reading, _READING[form.method])
        if form.method != "select" or one.token is None or its.token is None:
            continue
        cold, hot, nothing = (one.first[place] for place in ("cold", "hot", "nothing"))
        yield figure("first token", "stock / ours from the disk", its.first["cold"], cold, "")
        less = "from the disk, less a plain read of the file / ready"
        yield figure("first token", less, cold - one.plain, hot, "at most 1.5")
        yield figure("first token", "ready / behind nothing", hot, nothing, "at most 1.15 behind 1,000 slots")
        yield figure("a token", "stock / ours", its.token, one.token, "at least 1.8 behind 8,000 tokens")


def _figure(where: str, what: str, ways: str, one: float, other: float, bound: str) -> Figure:
    return Figure(f"{what}, {where}: {ways}", one / other, bound, f"{_seconds(one)} / {_seconds(other)}")
