"""Measure what this machine reaches, with the embedded model: the only module of plans that imports torch.

Each speed is solved for from pieces of work whose FLOPs and bytes the formulas tell, so that the formulas give the
measured seconds back for this model. All pieces are run in turn, round by round, and of each the fastest counts: what
else the machine does makes them slower, never faster.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import torch

from beacon_memory.bench.measuring import machine, random_text
from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work as ReadingWork
from beacon_memory.config import BeaconConfig
from beacon_memory.documents import utc_now
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.memory import BeaconMemory
from beacon_memory.modeling.cache import MemoryCache
from beacon_memory.modeling.model import BeaconModel

from .calibration import Calibration
from .formulas import (
    Work,
    compression_seconds,
    compression_work,
    first_token_seconds,
    prefill_work,
    token_seconds,
)
from .hardware import Speed
from .models import ModelShape
from .sizes import Way, window_sizes

__all__ = ["Piece", "best", "calibrate", "pieces", "predicted", "shape_of", "solved", "timed"]

SHORT, LONG = 512, 2048  # tokens that are read at once
SLOTS = 1024  # that a token is generated behind
DOCUMENT = 1024  # tokens that are compressed
RATIO = 8
_SECONDS = 35.0  # that rounds may take
_MOST_ROUNDS = 5
_QUICK = {"product", "stream", "step"}
_STEPS = 8  # of such pieces in each round
_WIDTHS = 1024, 4096
_PRODUCT = 2.0 * SHORT * _WIDTHS[0] * _WIDTHS[1]  # FLOPs
_LEAST = 0.1  # of the time that each part takes at least: less is noise
_MATRICES = 16  # of these widths, together more than caches hold

Piece = Callable[[], object]
Clock = Callable[[], float]


def calibrate() -> Calibration:
    """Measure this machine; takes a minute or so, once the embedded model is there."""
    started = time.perf_counter()
    model = BeaconModel.from_pretrained()
    work = pieces(model)
    before = time.perf_counter(), time.process_time()
    rounds = timed(work, model.device)
    clock, processor = time.perf_counter() - before[0], time.process_time() - before[1]
    waited = clock * torch.get_num_threads() / processor if model.device.type == "cpu" else 1.0
    return Calibration(
        speed=solved(shape_of(model), best(rounds), model.dtype.itemsize, _load_speed(model)),
        machine=machine(),
        device=str(model.device),
        memory=_memory(model.device),
        weight_bytes=model.dtype.itemsize,
        waited=max(1.0, waited),
        seconds=time.perf_counter() - started,
        measured_at=utc_now(),
    )


def shape_of(model: BeaconModel) -> ModelShape:
    """Return the numbers of a loaded model."""
    config = model.base.config
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=model.kv_shape[1],
        head_dim=model.kv_shape[2],
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        positions=model.max_positions,
    )


def pieces(model: BeaconModel) -> dict[str, Piece]:
    """Return the pieces of work that are measured, by their names; see `predicted`."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(100, min(model.base.config.vocab_size, 20_000), (LONG,), generator=draw).tolist()
    compressor = BeaconCompressor(model, score="repeat")
    work = ReadingWork(ids[:DOCUMENT], compressor.ratios(DOCUMENT, RATIO))
    return {
        "product": _product(model, draw),
        "stream": _stream(model, draw),
        "short": lambda: _prefill(model, ids[:SHORT]),
        "long": lambda: _prefill(model, ids),
        "compress": lambda: compressor.compress_one(work, compression="select"),
        "step": _step(model, draw),
    }


def timed(
    work: Mapping[str, Piece], device: torch.device, clock: Clock = time.perf_counter, limit: float = _SECONDS
) -> list[dict[str, float]]:
    """Return the seconds of each piece, round by round, no new round after `limit` seconds.

    clock: `time.process_time` counts the processor's time, which others on the machine change little.
    """
    deadline = time.perf_counter() + limit
    rounds: list[dict[str, float]] = []
    for number in range(1 + _MOST_ROUNDS):  # the first one warms up
        taken = {
            name: min(_once(one, device, clock) for _ in range(_STEPS if name.split()[-1] in _QUICK else 1))
            for name, one in work.items()
        }
        if number:
            rounds.append(taken)
        if number and time.perf_counter() > deadline:
            break
    return rounds


def best(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the fewest seconds of each piece."""
    return {name: min(one[name] for one in rounds) for name in rounds[0]}


def predicted(shape: ModelShape, speed: Speed, weight_bytes: int) -> dict[str, float]:
    """Return the seconds of the pieces of a model by the formulas.

    short, long: a prompt of 512 and of 2,048 tokens. compress: 1,024 tokens by `select` at ratio 8. step: a token
    behind 1,024 slots.
    """
    way = Way("select", "repeat", RATIO, BeaconConfig())
    compressing = compression_work(shape, window_sizes(DOCUMENT, way), way)
    return {
        "short": first_token_seconds(shape, prefill_work(shape, SHORT), 0.0, speed, weight_bytes),
        "long": first_token_seconds(shape, prefill_work(shape, LONG), 0.0, speed, weight_bytes),
        "compress": compression_seconds(shape, compressing, speed),
        "step": token_seconds(shape, _slot_bytes(shape, weight_bytes) * SLOTS, speed, weight_bytes),
    }


def solved(shape: ModelShape, seconds: Mapping[str, float], weight_bytes: int, load: float) -> Speed:
    """Return the speeds with which the formulas give the seconds that were measured; load: see `Speed`."""
    step_bytes = shape.step_weights * weight_bytes + _slot_bytes(shape, weight_bytes) * SLOTS
    streamed = weight_bytes * _MATRICES * _WIDTHS[0] * _WIDTHS[1] / seconds["stream"]
    # what reading all weights at that speed does not explain is what layers take anyway
    overhead = max(seconds["step"] - step_bytes / streamed, _LEAST * seconds["step"])
    overhead = min(overhead, seconds["short"] / 2)
    short, long = prefill_work(shape, SHORT), prefill_work(shape, LONG)
    computing = seconds["short"] - overhead, seconds["long"] - overhead
    # products that were slow when they were measured, alone, cannot take more than all
    least = max(one.linear / taken for one, taken in zip((short, long), computing, strict=True)) / (1 - _LEAST)
    linear = max(_PRODUCT / seconds["product"], least)
    rests = [taken - one.linear / linear for one, taken in zip((short, long), computing, strict=True)]
    moving, attention = _two_speeds(short, rests[0], long, rests[1])
    way = Way("select", "repeat", RATIO, BeaconConfig())
    whole = compression_work(shape, window_sizes(DOCUMENT, way), way)
    rest = seconds["compress"] - whole.linear / linear - whole.attention / attention
    rest -= whole.moved / moving + whole.passes * overhead
    return Speed(
        linear=linear,
        attention=attention,
        moving=moving,
        repeated=whole.repeated / max(rest, _LEAST * seconds["compress"]),  # noise may leave less, or nothing
        bandwidth=step_bytes / (seconds["step"] - overhead),
        layer=overhead / shape.layers,
        load=load,
    )


def _two_speeds(short: Work, short_seconds: float, long: Work, long_seconds: float) -> tuple[float, float]:
    """Return the speeds of moving and of attention, from two prompts of which each takes some of both."""
    determinant = short.moved * long.attention - long.moved * short.attention
    of_moving = (short_seconds * long.attention - long_seconds * short.attention) / determinant
    of_attention = (short.moved * long_seconds - long.moved * short_seconds) / determinant
    of_moving = max(of_moving, _LEAST * long_seconds / long.moved)
    of_attention = max(of_attention, _LEAST * long_seconds / long.attention)
    return 1 / of_moving, 1 / of_attention


def _slot_bytes(shape: ModelShape, itemsize: int) -> int:
    return shape.kv_width * 2 * shape.head_dim * itemsize


def _once(work: Piece, device: torch.device, clock: Clock) -> float:
    started = clock()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return clock() - started


@torch.inference_mode()
def _prefill(model: BeaconModel, ids: list[int]) -> None:
    model.base(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)


def _product(model: BeaconModel, draw: torch.Generator) -> Piece:
    """Return a product of tokens with weights, as wide as those of models that plans are for."""
    rows, columns = _WIDTHS
    weights = torch.randn(columns, rows, generator=draw).to(model.device, model.dtype)
    tokens = torch.randn(SHORT, rows, generator=draw).to(model.device, model.dtype)
    return lambda: torch.nn.functional.linear(tokens, weights)


def _stream(model: BeaconModel, draw: torch.Generator) -> Piece:
    """Return what reads many weights once, each for one token."""
    rows, columns = _WIDTHS
    shape = (columns, rows)
    weights = [torch.randn(shape, generator=draw).to(model.device, model.dtype) for _ in range(_MATRICES)]
    token = torch.randn(1, rows, generator=draw).to(model.device, model.dtype)

    def stream() -> None:
        for one in weights:
            torch.nn.functional.linear(token, one)

    return stream


def _step(model: BeaconModel, draw: torch.Generator) -> Piece:
    """Return a step that generates one token behind a memory of random K/V."""
    layers, heads, head_dim = model.kv_shape
    kv = BeaconKV(*(torch.randn(layers, heads, SLOTS, head_dim, generator=draw) for _ in "kv"))
    cache = MemoryCache([model.prefix(MemoryKV.of(kv.to(model.device, model.dtype)))])
    token = torch.tensor([[0]], device=model.device)

    def step() -> None:
        with torch.inference_mode():
            model.base(token, past_key_values=cache)

    return step


def _load_speed(model: BeaconModel) -> float:
    """Return the bytes/s at which a memory comes from its file, which the system has in its cache, to the device."""
    with tempfile.TemporaryDirectory() as folder, BeaconMemory(Path(folder), model) as memory:
        memory.add("document", random_text(DOCUMENT), ratio=2, compression="select")
        row = memory.store.row("document")
        seconds = (
            _once(lambda: memory.store.get(row, device=model.device), model.device, time.perf_counter)
            for _ in range(_STEPS)
        )
        return row.bytes / min(seconds)


def _memory(device: torch.device) -> float:
    """Return the bytes of memory that a device has."""
    if device.type == "cpu":
        return float(psutil.virtual_memory().total)
    return float(torch.accelerator.get_memory_info(device)[1])
