"""The command `plan`: what a store will take, before anything is compressed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beacon_memory.errors import InputError

from .help import Commands
from .options import Adapter, AsJson, CompressionOption, Model, Score, ScoreOption, file_given, name_given, quiet
from .terminal import print_json, print_line, print_text, remarks, reported, shown

if TYPE_CHECKING:
    from beacon_memory.planning.calibration import Calibration
    from beacon_memory.planning.estimates import Bounds, Estimate
    from beacon_memory.planning.hardware import Device, Reach
    from beacon_memory.planning.lengths import PlannedText
    from beacon_memory.planning.models import PlannedModel
    from beacon_memory.planning.plan import Plan

__all__ = ["app"]

app = Commands()

_THIS = "this"
_BUSY = 1.5  # times as long by the clock as by the processor: so much is not all our own waiting
_COLUMNS = (0, 12, 12, 12)
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
_SECONDS = ((1, "s"), (1e-3, "ms"), (1e-6, "us"))


@app.command()
def plan(
    model: Model = None,
    adapter: Adapter = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Numbers of the model, in place of --model or of some of its own: layers=28,hidden=3584,"
            "intermediate=18944,heads=28,kv_heads=4,head_dim=128,vocabulary=152064,positions=32768.",
            metavar="NUMBERS",
        ),
    ] = None,
    documents: Annotated[
        int | None,
        typer.Option(help="How many documents.", min=1, show_default="1,000, or as many as are measured"),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Their tokens: 4000; or several lengths with weights, 1000:6,4000:3,16000:1.")
    ] = "4000",
    texts: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure these in place of --lengths: folders, files, globs, or JSON lines (.jsonl, .jsonl.gz) of "
            "objects with a text under `text`; repeat it for several.",
            parser=name_given,
            metavar="PATH",
        ),
    ] = None,
    chars_per_token: Annotated[
        float | None,
        typer.Option(help="Characters of a token, in place of the model's tokenizer.", show_default="4 without one"),
    ] = None,
    ratio: Annotated[str, typer.Option(help="Tokens per memory slot, or auto, as of `add`.")] = "auto",
    compression: CompressionOption = "auto",
    score: ScoreOption = Score.AUTO,
    hardware: Annotated[
        str,
        typer.Option(help="Device: h100, l4, ...; `list` prints all; `this` is this machine, once it is calibrated."),
    ] = _THIS,
    hardware_file: Annotated[
        Path | None,
        typer.Option(help="TOML file with more devices, or other numbers.", parser=file_given, metavar="FILE"),
    ] = None,
    count: Annotated[int, typer.Option(help="How many devices compress beside each other.", min=1)] = 1,
    price: Annotated[
        float | None, typer.Option(help="Price of an hour of a device.", min=0, show_default="an example")
    ] = None,
    storage_price: Annotated[float, typer.Option(help="Price of a month of 1 GB on disk.", min=0)] = 0.08,
    questions: Annotated[int, typer.Option(help="How many questions are asked about each document.", min=0)] = 10,
    question_tokens: Annotated[int, typer.Option(help="Tokens of a question, in its chat template.", min=1)] = 64,
    slots: Annotated[int, typer.Option(help="Slots that are loaded for a question, as `ask` does.", min=1)] = 256,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine first, with the embedded model; a minute or so.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate what compressing documents, keeping them and asking about them takes; nothing is compressed.

    Bytes follow from the form of files and are exact, or between two bounds; seconds and money are estimates, and say
    how rough.

    With --json one object: model, weights, documents, tokens, counted, complete, compression, score, ratios, slots,
    hardware, calibrated, count, flops, prefill_flops, hours, raw, catalog, too_long, kept, answering, questions,
    break_even, money.
    """
    with reported("nothing was written"):
        from beacon_memory.planning.hardware import devices
        from beacon_memory.planning.models import planned_model
        from beacon_memory.planning.plan import Asking, Prices, make_plan

        known = devices(hardware_file)
        if hardware == "list":
            _print_devices(known)
            return
        if calibrate:
            note_calibration(_calibrate())
        device, reach, calibrated = _device(hardware, known, price)
        planned = planned_model(model, adapter, None if shape is None else numbers_given(shape))
        counted, complete, found = _texts(planned, documents, lengths, texts, chars_per_token)
        done = make_plan(
            planned,
            found,
            device,
            reach,
            compression=compression,
            score=score.value,
            ratio=int(ratio) if re.fullmatch("-?[0-9]+", ratio) else ratio,
            counted=counted,
            complete=complete,
            calibrated=calibrated,
            count=count,
            asking=Asking(question_tokens, slots, questions),
            prices=Prices(device.price if price is None else price, storage_price),
        )
        if as_json:
            print_json(asdict(done))
        else:
            print_text(f"{table(done)}\n")


def numbers_given(text: str) -> dict[str, int]:
    """Return the numbers of a model that are given as NAME=NUMBER with commas between."""
    written = re.fullmatch(r"\s*\w+=\d+(\s*,\s*\w+=\d+)*\s*", text)
    if written is None:
        raise InputError(f"--shape must be numbers under names, as layers=28,hidden=3584, got {text!r}")
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", text)}


def _calibrate() -> Calibration:
    from beacon_memory.planning.calibration import write_calibration
    from beacon_memory.planning.measure import calibrate

    quiet()
    measured = calibrate()
    write_calibration(measured)
    return measured


def note_calibration(measured: Calibration) -> None:
    """Print what was measured."""
    speed = measured.speed
    remarks().print(
        f"measured in {measured.seconds:.0f} s on {shown(measured.machine)}, {measured.device}: "
        f"{speed.linear / 1e9:,.0f} GFLOP/s reading, {speed.attention / 1e9:,.0f} in attention, "
        f"{speed.repeated / 1e9:,.0f} repeating, {speed.bandwidth / 1e9:.1f} GB/s generating, "
        f"{speed.load / 1e9:.1f} GB/s loading",
        style="dim",
        markup=False,
    )
    if measured.waited > _BUSY:
        print_line(
            f"others were using the machine: it took {measured.waited:.1f} times as long as it computed, so plans for "
            "it are too slow; calibrate again when it is idle",
            err=True,
        )


def _device(name: str, known: dict[str, Device], price: float | None) -> tuple[Device, Reach, bool]:
    from beacon_memory.planning.calibration import read_calibration
    from beacon_memory.planning.hardware import uncalibrated

    if name == _THIS and name not in known:
        measured = read_calibration()
        return measured.described(price), measured.reach, True
    if name not in known:
        raise InputError(f"--hardware is {name!r}, but must be {_THIS!r} or one of {', '.join(known)}")
    return known[name], uncalibrated(known[name]), False


def _texts(
    model: PlannedModel,
    documents: int | None,
    lengths: str,
    paths: list[str] | None,
    chars_per_token: float | None,
) -> tuple[str, bool, Iterable[tuple[PlannedText, int]]]:
    """Return how lengths are known, whether all texts were measured, and the texts with how many are like each."""
    from beacon_memory.planning import lengths as of

    if not paths:
        per_token = chars_per_token or of.CHARACTERS_PER_TOKEN
        found = of.shares(lengths, documents or 1000)
        return "given", False, ((of.made_up(tokens, per_token), alike) for tokens, alike in found)
    counted = "tokenizer" if model.tokenizer is not None and chars_per_token is None else "characters"
    if model.tokenizer is not None and chars_per_token is None:
        measure = of.by_tokenizer(model.tokenizer)
    else:
        measure = of.by_characters(chars_per_token or of.CHARACTERS_PER_TOKEN)
    texts = of.measured(_read(paths), measure)
    if documents is None:
        return counted, counted == "tokenizer", ((text, 1) for text in texts)
    sample = list(texts)
    even = of.evenly(documents, len(sample))
    return counted, documents == len(sample) and counted == "tokenizer", zip(sample, even, strict=True)


def _read(paths: list[str]) -> Iterator[tuple[str, str]]:
    """Yield id and text of each document that paths mean; what `add` would skip is left out, with a message."""
    from beacon_memory.planning.lengths import read_rows

    from .sources import find_sources, read_source

    for path in paths:
        if path.endswith((".jsonl", ".jsonl.gz")):
            yield from read_rows(Path(path))
            continue
        sources, skipped = find_sources([path])
        for one in skipped:
            print_line(f"skipped {one.path.as_posix()}: {one.reason}", err=True)
        for source in sources:
            yield source.id, read_source(source)


def _print_devices(known: dict[str, Device]) -> None:
    for name, one in known.items():
        priced = "no price" if one.price is None else f"{one.price:.2f} an hour"
        print_line(
            f"{name:12} {one.title}: {one.flops / 1e12:,.0f} TFLOP/s, {one.bandwidth / 1e9:,.0f} GB/s, "
            f"{one.memory / 1e9:,.0f} GB, {priced} ({one.source})"
        )


def table(plan: Plan) -> str:
    """Return a plan as a table of aligned columns, with how sure each row is."""
    method = plan.compression + (f" ({plan.score})" if plan.score else "")
    ratios = "/".join(map(str, plan.ratios))
    of_lengths = {"given": "as given", "tokenizer": "counted by the tokenizer", "characters": "by characters"}
    known = "measured with the embedded model" if plan.calibrated else "not measured: shares of its peak are assumed"
    head = [
        f"model      {plan.model}, {plan.weights / 1e9:.2f} billion weights",
        f"documents  {plan.documents:,} of {plan.tokens / plan.documents:,.0f} tokens in the mean, "
        f"{of_lengths[plan.counted]}",
        f"memories   {method}, ratio {ratios}: {plan.slots / plan.documents:,.0f} slots in the mean",
        f"hardware   {plan.hardware}; {known}",
    ]
    rows = [("", "at least", "likely", "at most", "how sure"), *_rows(plan)]
    width = max(len(row[0]) for row in rows) + 2
    lines = [
        f"{name:{width}}{low:>12}{likely:>12}{high:>12}  {sure}".rstrip() for name, low, likely, high, sure in rows
    ]
    return "\n".join([*head, "", *lines])


_Row = tuple[str, str, str, str, str]


def _rows(plan: Plan) -> Iterator[_Row]:
    yield "compressing: PFLOP", "", _number(plan.flops / 1e15, 4), "", "formula"
    yield "prefilling each text once: PFLOP", "", _number(plan.prefill_flops / 1e15, 4), "", "formula"
    devices = "device" if plan.count == 1 else "devices"
    yield _estimate(f"compressing: hours of {plan.count} {devices}", plan.hours, _number)
    exact, bounded = _sure(plan)
    yield "K/V of all tokens, uncompressed", "", size(plan.raw), "", exact
    for one in plan.kept:
        yield _bounds(f"K/V on disk, {one.precision}", one.stored, size, exact, bounded)
    for one in plan.kept:
        sure = ("estimate: texts made up",) * 2 if plan.counted == "given" else (exact, bounded)
        yield _bounds(f"files with text, {one.precision}", one.files, size, *sure)
    yield "catalog and labels", "", size(plan.catalog), "", "estimate"
    for one in plan.kept:
        yield _bounds(f"K/V ready in RAM or device, {one.precision}", one.ready, size, exact, bounded)
    for one in plan.kept:
        if one.fitting is None:
            yield f"memories that fit a device, {one.precision}", "", "none", "", "the weights do not fit"
        else:
            free = ("beside weights, 10 % free",) * 2
            yield _bounds(f"memories that fit a device, {one.precision}", one.fitting, _whole, *free)
    if plan.too_long:
        yield "texts too long for a prompt of this model", "", _whole(plan.too_long), "", exact
    for way in plan.answering:
        yield _estimate(f"first token: {way.way}", way.first_token, seconds)
    for what, way in {way.way.partition(",")[0]: way for way in plan.answering}.items():
        yield _estimate(f"each further token: {what}", way.token, seconds)
    yield _estimate("questions on a document until it pays", plan.break_even, _number)
    yield from _money(plan)


def _money(plan: Plan) -> Iterator[_Row]:
    if plan.money is None:
        yield "money", "", "", "", "set --price"
        return
    yield _estimate("money: compressing", plan.money.compressing, _coins)
    for precision, month in plan.money.month.items():
        yield f"money: a month on disk, {precision}", "", _coins(month), "", "of files and catalog"
    asked = f"{plan.questions} questions on each"
    yield _estimate(f"money: {asked}, by prefill", plan.money.prefilling, _coins)
    yield _estimate(f"money: {asked}, with compressing", plan.money.memories, _coins)


def _estimate(name: str, value: Estimate, told: Any) -> _Row:
    return name, told(value.low), told(value.likely), told(value.high), "estimate"


def _sure(plan: Plan) -> tuple[str, str]:
    """Return how sure numbers are that follow from lengths alone: those that are known, and those within bounds."""
    if plan.complete:
        return "exact", "certain bounds"
    if plan.counted == "given":
        return "exact for these lengths", "bounds for these lengths"
    rough = "estimate: by characters" if plan.counted == "characters" else "estimate: from a sample"
    return rough, rough


def _bounds(name: str, value: Bounds, told: Any, exact: str, bounded: str) -> _Row:
    if value.exact:
        return name, "", told(value.low), "", exact
    return name, told(value.low), "", told(value.high), bounded


def size(value: float) -> str:
    """Return bytes with four digits."""
    return _scaled(value, _BYTES)


def seconds(value: float) -> str:
    """Return seconds with three digits."""
    return _scaled(value, _SECONDS, 3)


def _scaled(value: float, units: tuple[tuple[float, str], ...], digits: int = 4) -> str:
    unit, name = next(((unit, name) for unit, name in units if value >= unit), units[-1])
    return f"{_number(value / unit, digits)} {name}"


def _number(value: float, digits: int = 3) -> str:
    if value == float("inf"):
        return "never"
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _coins(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
