"""Plans: what compressing documents and asking about them will take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from beacon_memory.compression.ratio import AUTO_RATIOS, auto_ratio, positions_needed, too_long
from beacon_memory.documents import Precision
from beacon_memory.errors import CapacityError, ConfigError, InputError

from .estimates import Bounds, Estimate
from .formulas import (
    Work,
    break_even,
    compression_seconds,
    compression_work,
    first_token_seconds,
    prefill_work,
    token_seconds,
)
from .hardware import Device, Reach, Speed
from .lengths import PlannedText
from .models import ModelShape, PlannedModel
from .sizes import MemorySize, Way

__all__ = ["Answering", "Asking", "Kept", "Money", "Plan", "Prices", "make_plan"]

PRECISIONS = (Precision.BFLOAT16, Precision.INT8, Precision.INT4)
RESERVE = 1024  # positions that a document leaves for question and answer, as `BeaconCompressor` has it
_FREE = 0.9  # of a device's memory, the share that weights and memories may take; the rest is for what is computed
_CATALOG = 2.5  # bytes of the catalog for each byte of text: measured on the pages of this repository, 2.4 to 2.6
_LABEL = 290  # bytes of a label without tags and metadata
_HALF = 2  # bytes of a number in 16 bits
_GIGABYTE = 1e9  # bytes that storage is paid for by


@dataclass(frozen=True, slots=True)
class Asking:
    """How documents are asked about.

    tokens:    of a question in its chat template.
    slots:     that are loaded for it, as `ask` does by default where it finds passages.
    questions: about each document, in all.
    """

    tokens: int = 64
    slots: int = 256
    questions: int = 10


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices: of an hour of the device (None if it is not known), and of a month of 1 GB on disk."""

    hour: float | None
    gigabyte_month: float = 0.08


@dataclass(frozen=True, slots=True)
class Kept:
    """Count the bytes that all memories take in one precision.

    stored: their K/V on disk. files: with index, header and text. ready: in RAM or on devices, if all of them were.
    fitting: how many of the mean size fit beside the weights on one device; None if not even the weights do.
    """

    precision: str
    stored: Bounds
    files: Bounds
    ready: Bounds
    fitting: Bounds | None


@dataclass(frozen=True, slots=True)
class Answering:
    """Seconds of one way to answer about a document, in the mean over documents, one question at a time."""

    way: str
    slots: float
    first_token: Estimate
    token: Estimate


@dataclass(frozen=True, slots=True)
class Money:
    """Say the cost of compressing all, a month on disk in each precision, all questions by prefill and from memories.

    memories includes the compression.
    """

    compressing: Estimate
    month: dict[str, float]
    prefilling: Estimate
    memories: Estimate


@dataclass(frozen=True, slots=True)
class Plan:
    """Tell all that compressing documents and asking about them will take.

    counted: how lengths are known: `given`, `tokenizer` or `characters`.
    complete: whether every document was measured, so that bytes of files are told for these very texts.
    flops:   that compressing needs, by the formulas; prefill_flops: that reading each text once as a prompt needs.
    hours:   of the devices together.
    raw:     bytes of the K/V of all tokens in 16 bits, uncompressed.
    catalog: bytes of the catalog, with texts and their index, and of the labels.
    too_long: documents that are longer than the model has positions: no prompt can hold their text.
    """

    model: str
    weights: int
    documents: int
    tokens: int
    counted: str
    complete: bool
    compression: str
    score: str
    ratios: tuple[int, ...]
    slots: int
    hardware: str
    calibrated: bool
    count: int
    flops: float
    prefill_flops: float
    hours: Estimate
    raw: int
    catalog: float
    too_long: int
    kept: tuple[Kept, ...]
    answering: tuple[Answering, ...]
    questions: int
    break_even: Estimate
    money: Money | None


@dataclass(slots=True)
class _Sums:
    """Add up numbers over documents; work and slots in the mean of one kind of question."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    too_long: int = 0
    slots: int = 0
    loaded: int = 0
    compressing: Work = field(default_factory=Work)
    prefilling: Work = field(default_factory=Work)
    whole: Work = field(default_factory=Work)
    budget: Work = field(default_factory=Work)
    sizes: dict[Precision, tuple[Bounds, Bounds, Bounds]] = field(default_factory=dict)
    ratios: set[int] = field(default_factory=set)


def make_plan(
    model: PlannedModel,
    texts: Iterable[tuple[PlannedText, int]],
    device: Device,
    reach: Reach,
    *,
    compression: str = "auto",
    score: str = "auto",
    ratio: int | str = "auto",
    counted: str = "given",
    complete: bool = False,
    calibrated: bool = False,
    count: int = 1,
    asking: Asking | None = None,
    prices: Prices | None = None,
) -> Plan:
    """Add up what documents take.

    texts: each with how many documents are like it. count: of devices that compress beside each other.
    Raises InputError for no texts, ConfigError for a method that is none of the built-in ones, CapacityError for a
    document that the method cannot read with this model.
    """
    chosen = model.compression if compression == "auto" else compression
    if chosen not in ("select", "beacon", "hybrid"):
        raise ConfigError(f"compression={chosen!r} cannot be planned for, only select, beacon and hybrid can")
    score = model.score if score == "auto" else score
    if isinstance(ratio, str) and ratio != "auto":
        raise ConfigError(f"ratio={ratio!r} must be 'auto' or a whole number")
    asking, prices = asking or Asking(), prices or Prices(device.price)
    sums = _Sums()
    for text, alike in texts:
        way = Way(chosen, score, _ratio(model, text.tokens, chosen, ratio), model.config, model.probed)
        _add(sums, MemorySize(text, model.shape, way), alike, asking, reach.weight_bytes)
    if not sums.documents:
        raise InputError("there is nothing to plan for: no text was found")
    hours = reach.estimate(lambda speed: compression_seconds(model.shape, sums.compressing, speed) / 3600 / count)
    answering = _answering(model.shape, sums, reach, asking)
    kept = tuple(_kept(one, sums, model.shape, device, reach) for one in PRECISIONS)
    catalog = _CATALOG * sums.text_bytes + _LABEL * sums.documents
    return Plan(
        model=model.name,
        weights=model.shape.weights,
        documents=sums.documents,
        tokens=sums.tokens,
        counted=counted,
        complete=complete,
        compression=chosen,
        score="" if chosen == "beacon" else score,
        ratios=tuple(sorted(sums.ratios)),
        slots=sums.slots,
        hardware=device.title,
        calibrated=calibrated,
        count=count,
        flops=sums.compressing.flops,
        prefill_flops=sums.prefilling.flops,
        hours=hours,
        raw=_kv(model.shape, sums.tokens, _HALF),
        catalog=catalog,
        too_long=sums.too_long,
        kept=kept,
        answering=answering,
        questions=asking.questions,
        break_even=_break_even(model.shape, sums, reach),
        money=None
        if prices.hour is None
        else _money(prices, hours, answering, kept, catalog, count, sums.documents, asking),
    )


def _ratio(model: PlannedModel, tokens: int, compression: str, ratio: int | str) -> int:
    """Return the ratio of a document as `BeaconCompressor.ratios` does; raises CapacityError if it does not fit."""
    positions = model.shape.positions
    if compression != "beacon" or model.config.beacon_dense_ratio:  # which read texts of any length
        return min(AUTO_RATIOS) if isinstance(ratio, str) else model.config.require_ratio(ratio)
    if isinstance(ratio, str):
        return auto_ratio(tokens, model.config, positions, RESERVE)
    ratios = [model.config.require_ratio(ratio)] * -(-tokens // model.config.beacon_window)
    if positions_needed(tokens, ratios, model.config, RESERVE) > positions:
        raise CapacityError(too_long(tokens, ratio, model.config, positions, RESERVE))
    return ratio


def _add(sums: _Sums, memory: MemorySize, alike: int, asking: Asking, weight_bytes: int) -> None:
    tokens, slots, sink = memory.text.tokens, memory.slots, memory.way.config.beacon_sink_size
    loaded = min(slots, asking.slots)
    sums.documents += alike
    sums.tokens += alike * tokens
    sums.text_bytes += alike * memory.text.text_bytes
    sums.too_long += alike * (tokens + asking.tokens > memory.shape.positions)
    sums.slots += alike * slots
    sums.loaded += alike * loaded
    sums.ratios.add(memory.way.ratio)
    sums.compressing += compression_work(memory.shape, memory.windows, memory.way) * alike
    sums.prefilling += prefill_work(memory.shape, tokens + asking.tokens) * alike
    sums.whole += prefill_work(memory.shape, asking.tokens, sink + slots) * alike
    sums.budget += prefill_work(memory.shape, asking.tokens, sink + loaded) * alike
    for precision in PRECISIONS:
        # what is not quantized is ready in the dtype that the model computes in
        loaded_as = Precision.FLOAT32 if weight_bytes > _HALF and not precision.quantized else precision
        sizes = (memory.stored(precision), memory.file(precision), memory.ready(loaded_as))
        before = sums.sizes.get(precision, (Bounds.of(0),) * 3)
        stored, files, ready = (old + new * alike for old, new in zip(before, sizes, strict=True))
        sums.sizes[precision] = stored, files, ready


def _kept(precision: Precision, sums: _Sums, shape: ModelShape, device: Device, reach: Reach) -> Kept:
    stored, files, ready = sums.sizes[precision]
    room = device.memory * _FREE - shape.weights * reach.weight_bytes
    fitting = Bounds(*(int(room * sums.documents / whole) for whole in (ready.high, ready.low))) if room > 0 else None
    return Kept(precision.value, stored, files, ready, fitting)


def _kv(shape: ModelShape, slots: int, number_bytes: int) -> int:
    """Return the bytes of so many slots of all heads, where a number takes so many."""
    return slots * shape.kv_width * 2 * shape.head_dim * number_bytes


def _first_token(
    shape: ModelShape, work: Work, kv_bytes: float, documents: int, weight_bytes: int
) -> Callable[[Speed], float]:
    """Return how long the first token of a question takes, in the mean over documents."""
    mean = work * (1 / documents)
    return lambda speed: first_token_seconds(shape, mean, kv_bytes / documents, speed, weight_bytes)


def _answering(shape: ModelShape, sums: _Sums, reach: Reach, asking: Asking) -> tuple[Answering, ...]:
    """Return the ways to answer: from the text, and from memories, those that are ready and those in their files."""
    ways = (
        ("text in the prompt", sums.prefilling, sums.tokens, False),
        ("whole memory, ready", sums.whole, sums.slots, False),
        ("whole memory, from its file", sums.whole, sums.slots, True),
        (f"{asking.slots} slots, ready", sums.budget, sums.loaded, False),
        (f"{asking.slots} slots, from its file", sums.budget, sums.loaded, True),
    )
    return tuple(_way(shape, reach, sums.documents, *one) for one in ways)


def _way(shape: ModelShape, reach: Reach, documents: int, name: str, work: Work, slots: int, cold: bool) -> Answering:
    kv_bytes = _kv(shape, slots, reach.weight_bytes)
    first = _first_token(shape, work, kv_bytes, documents, reach.weight_bytes)
    loaded = _kv(shape, slots, _HALF) / documents if cold else 0.0
    return Answering(
        name,
        slots / documents,
        reach.estimate(lambda speed: first(speed) + loaded / speed.load),
        reach.estimate(lambda speed: token_seconds(shape, kv_bytes / documents, speed, reach.weight_bytes)),
    )


def _money(
    prices: Prices,
    hours: Estimate,
    answering: Sequence[Answering],
    kept: Sequence[Kept],
    catalog: float,
    count: int,
    documents: int,
    asking: Asking,
) -> Money:
    """Return what all costs; a question is paid for up to its first token, for the answer itself costs alike."""
    hour = prices.hour or 0.0
    compressing = hours * (count * hour)
    by_text, by_memory = (
        one.first_token * (hour / 3600 * documents * asking.questions) for one in (answering[0], answering[-1])
    )
    months = {one.precision: (one.files.middle + catalog) / _GIGABYTE * prices.gigabyte_month for one in kept}
    return Money(compressing, months, by_text, compressing + by_memory)


def _break_even(shape: ModelShape, sums: _Sums, reach: Reach) -> Estimate:
    """Return after how many questions a document pays, each answered from a memory that is ready.

    Both sides are products with weights most of all, whose speed is the same for both. So it is taken as likely, and
    what is uncertain is the rest of compressing.
    """
    linear = reach.likely.linear
    compress = reach.estimate(lambda speed: compression_seconds(shape, sums.compressing, replace(speed, linear=linear)))
    loaded = _kv(shape, sums.loaded, reach.weight_bytes)
    by_text, by_memory = (
        _first_token(shape, work, kv_bytes, sums.documents, reach.weight_bytes)(reach.likely)
        for work, kv_bytes in ((sums.prefilling, 0), (sums.budget, loaded))
    )
    return Estimate(
        *(
            break_even(seconds / sums.documents, by_text, by_memory)
            for seconds in (compress.low, compress.likely, compress.high)
        )
    )
