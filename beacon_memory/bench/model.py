"""Speed and memory compared with the stock model: the figures of `beacon-memory bench`.

Each figure is a ratio of two measurements, both medians of three or more, in the same run on the same machine.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.selection import best
from beacon_memory.compression.sequence import SequenceState, advance
from beacon_memory.compression.work import Work
from beacon_memory.generation.decode_loop import DecodeLoop
from beacon_memory.generation.generate import Request, generate
from beacon_memory.generation.options import generation_config
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.memory import BeaconMemory
from beacon_memory.modeling.cache import MemoryCache
from beacon_memory.modeling.model import BeaconModel

from .measuring import QUESTION, REPEATS, Figure, evict, median_seconds, once, peak_memory, random_text

__all__ = ["answering", "generating", "load", "reading", "run", "window_loop"]

_SHORT = 1000  # tokens of a short document
_GROWN = 850  # tokens of one that is appended to
_PEAK_TOKENS = (10_000, 100_000)
_SLOTS = (1000, 8000)  # of the memories that tokens are generated behind
_STEPS = 11
_REQUESTS = 8  # that are decoded together
_ANSWER = 64  # tokens of the answer to each
_PEAK_RATIO = 32


def load(model: str | None, adapter: str | None, device: str | torch.device | None, dtype: str) -> BeaconModel:
    """Load a model whose beacons are those of the paper: read in one pass, and all of them kept."""
    loaded = BeaconModel.from_pretrained(model, adapter, device=device, dtype=dtype)
    loaded.config = replace(loaded.config, beacon_dense_ratio=0)
    return loaded


def run(
    model: str | None, adapter: str | None, device: str | None, dtype: str, *, tokens: int, ratio: int
) -> list[Figure]:
    """Measure all figures of one model; takes some minutes on two cores."""
    loaded = load(model, adapter, device, dtype)
    return [
        *_answering(loaded, tokens, ratio),
        *_compressing(loaded, tokens, ratio),
        *_appending(loaded, ratio),
        _peak(model, adapter, device, dtype),
    ]


def answering(
    model: str | None, adapter: str | None, device: str | None, dtype: str, *, tokens: int, ratio: int
) -> list[Figure]:
    """Measure how fast answers are behind memories, that of a text of `tokens` tokens among them."""
    return _answering(load(model, adapter, device, dtype), tokens, ratio)


def reading(
    model: str | None, adapter: str | None, device: str | None, dtype: str, *, tokens: int, ratio: int
) -> list[Figure]:
    """Measure how fast texts are read into chosen tokens, a short one and one of `tokens` tokens."""
    loaded = load(model, adapter, device, dtype)
    return [figure for length in (_SHORT, tokens) for figure in _choosing(loaded, length, ratio)]


def _answering(model: BeaconModel, tokens: int, ratio: int) -> list[Figure]:
    return [
        *_beginning(model, tokens, ratio),
        *(figure for slots in _SLOTS for figure in generating(model, slots)),
        *_together(model, _SLOTS[0]),
    ]


def _beginning(model: BeaconModel, tokens: int, ratio: int) -> list[Figure]:
    with (
        tempfile.TemporaryDirectory() as folder,
        BeaconMemory(folder, model, hot_bytes=0) as memory,
        BeaconMemory(folder, model) as warm,
    ):
        added = memory.add("document", random_text(tokens), ratio=ratio, compression="beacon")
        path = memory.store.folder / memory.store.row("document").file
        config = generation_config(model, None, {"max_new_tokens": 1})
        text = memory.compressor.tokenize(memory.store.text("document"))
        prompt = [*model.sink_ids, *text.ids, *chat_prompt(model, QUESTION, behind_memory=True)]
        empty = Request(MemoryKV.of(model.empty_kv()), prompt)

        def from_store() -> float:
            evict(path)
            return memory.ask(QUESTION, "document", max_new_tokens=1).time_to_first_token

        def from_text() -> float:
            started = time.perf_counter()
            return generate(model, [empty], config)[0][0].first_token_at - started

        def from_hot() -> float:
            return warm.ask(QUESTION, "document", max_new_tokens=1).time_to_first_token

        def from_nothing() -> float:
            return memory.ask(QUESTION, [], max_new_tokens=1).time_to_first_token

        ways = (from_store, from_text, from_hot, from_nothing)
        from_store(), from_hot()  # to warm up
        rounds = [[one() for one in ways] for _ in range(REPEATS)]
        cold, full, hot, nothing = (statistics.median(times) for times in zip(*rounds, strict=True))
        raw = model.slot_bytes
        return [
            Figure(
                f"time to first token: full prefill / cold store, ratio {ratio}",
                full / cold,
                "at least 30",
                f"{full:.2f} s / {cold:.3f} s, {added.tokens} tokens",
            ),
            Figure(
                f"time to first token: a memory that is ready / nothing in front, ratio {ratio}",
                hot / nothing,
                "at most 1.15 behind 1,000 slots",
                f"{hot:.3f} s / {nothing:.3f} s, {added.slots} slots",
            ),
            Figure(
                f"bytes: K/V of beacons / raw K/V, ratio {ratio}",
                added.bytes / (added.tokens * raw),
                f"1/{ratio} = {1 / ratio:.3g}",
                f"{added.bytes:,} / {added.tokens * raw:,}; the sink, {memory.compressor.sink.nbytes:,}, is shared",
            ),
        ]


@torch.inference_mode()
def generating(model: BeaconModel, slots: int) -> list[Figure]:
    """Measure a token behind memories of random K/V, and behind a stock cache of as many tokens."""
    layers, heads, _ = model.kv_shape
    draw = torch.Generator().manual_seed(0)
    wide = _random_kv(model, 2 * slots, draw)
    scores = torch.rand(layers, heads, 1, generator=draw) * torch.rand(layers, heads, 2 * slots, generator=draw)
    even = wide[:slots].to(model.device, model.dtype)
    stock = DynamicCache(config=model.base.config)
    for layer in range(layers):
        stock.update(even.keys[None, layer], even.values[None, layer], layer)
    caches = {
        "stock": stock,
        "even": MemoryCache([model.prefix(MemoryKV.of(even))]),
        "ragged": MemoryCache([model.prefix(MemoryKV.chosen(wide, best(scores, slots)))]),
    }
    token = torch.tensor([[0]], device=model.device)
    steps: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(1 + _STEPS):  # in turn, so that whatever else the machine does slows all of them
        for name, cache in caches.items():
            steps[name].append(once(partial(model.base, token, past_key_values=cache), model.device))
    medians = {name: statistics.median(times[1:]) for name, times in steps.items()}
    return [
        Figure(
            f"a token behind {slots:,} slots, {kind}: memory / stock cache of as many tokens",
            medians[kind] / medians["stock"],
            "at most 1.1",
            f"{1000 * medians[kind]:.1f} ms / {1000 * medians['stock']:.1f} ms",
        )
        for kind in ("even", "ragged")
    ]


def _together(model: BeaconModel, slots: int) -> list[Figure]:
    """Measure answers behind memories of random K/V: decoded together, and one after another by stock `generate`."""
    draw = torch.Generator().manual_seed(0)
    memories = [
        model.prefix(MemoryKV.of(_random_kv(model, slots, draw).to(model.device, model.dtype)))
        for _ in range(_REQUESTS)
    ]
    config = generation_config(model, None, {"max_new_tokens": _ANSWER, "eos_token_id": None})
    prompt = chat_prompt(model, QUESTION, behind_memory=True)
    requests = [Request(memory, prompt) for memory in memories]

    def one_by_one(count: int) -> None:
        for request in requests[:count]:
            generate(model, [request], config)

    def together(count: int) -> None:
        loop = DecodeLoop(model)
        for ticket in [loop.submit(request, config) for request in requests[:count]]:
            ticket.result()

    ways = [partial(way, count) for count in (_REQUESTS, 1) for way in (one_by_one, together)]
    rounds = [[once(way, model.device) for way in ways] for _ in range(1 + REPEATS)]
    apart, joined, single, looped = (statistics.median(times[1:]) for times in zip(*rounds, strict=True))
    rates = " / ".join(f"{_REQUESTS * _ANSWER / seconds:.1f}" for seconds in (joined, apart))
    return [
        Figure(
            f"answers to {_REQUESTS} requests behind {_REQUESTS} memories: together / one after another",
            apart / joined,
            "at least 4",
            f"{rates} tokens/s, {slots:,} slots each, {_ANSWER} tokens",
        ),
        Figure(
            "an answer to one request: in the loop / by generate",
            single / looped,
            "at least 1",
            f"{_ANSWER / looped:.1f} / {_ANSWER / single:.1f} tokens/s",
        ),
    ]


def _random_kv(model: BeaconModel, slots: int, draw: torch.Generator) -> BeaconKV:
    layers, heads, head_dim = model.kv_shape
    return BeaconKV(*(torch.randn(layers, heads, slots, head_dim, generator=draw) for _ in "kv"))


def _compressing(model: BeaconModel, tokens: int, ratio: int) -> list[Figure]:
    compressor = BeaconCompressor(model)
    ids = _ids(model, tokens)
    shorts = [ids[at : at + _SHORT] for at in range(0, len(ids), _SHORT)]

    def compress(documents: list[list[int]]) -> Callable[[], object]:
        work = [Work(one, compressor.ratios(len(one), ratio)) for one in documents]
        return lambda: list(compressor.compress(enumerate(work), compression="beacon"))

    def stock(documents: list[list[int]]) -> None:
        for one in documents:
            _stock_forward(model, one)

    loop_over_windows = partial(window_loop, compressor, ids, ratio)
    whole, short, stock_whole, stock_short, loop = (
        median_seconds(one, model.device)
        for one in (compress([ids]), compress(shorts), lambda: stock([ids]), lambda: stock(shorts), loop_over_windows)
    )
    rate = f"{tokens / whole:,.0f} tokens/s"
    return [
        Figure(
            "throughput: compression / stock forward without head, one document",
            stock_whole / whole,
            "at least 0.75",
            f"{rate} / {tokens / stock_whole:,.0f} tokens/s, {tokens} tokens",
        ),
        Figure(
            f"throughput: the same, documents of {_SHORT} tokens",
            stock_short / short,
            "at least 0.75",
            f"{tokens / short:,.0f} tokens/s / {tokens / stock_short:,.0f} tokens/s",
        ),
        Figure(
            "throughput: compression / loop over windows with head",
            loop / whole,
            "at least 1.4",
            f"{rate} / {tokens / loop:,.0f} tokens/s",
        ),
    ]


@torch.inference_mode()
def window_loop(compressor: BeaconCompressor, ids: Sequence[int], ratio: int) -> None:
    """Read windows one after another, each with the language-model head, as the published code of Activation Beacon."""
    model = compressor.model
    state = SequenceState.start(model, memory=compressor.sink)
    for window in model.cut(state.cursor, ids, iter(compressor.ratios(len(ids), ratio)), tail="close"):
        (state,), hidden = advance(model, [(state, [window])])
        model.head(hidden).float()


def _appending(model: BeaconModel, ratio: int) -> list[Figure]:
    """Measure a sentence behind a document that fills no window of the usual size."""
    text, sentence = random_text(_GROWN), " In 2030 the well ran dry, and the owls left the mill for the orchard."
    with tempfile.TemporaryDirectory() as folder, BeaconMemory(folder, model) as memory:

        def grow(id: str) -> tuple[float, ...]:
            memory.add(id, text, ratio=ratio)
            ways = (
                partial(memory.append, id, sentence),
                partial(memory.compact, id),
                partial(memory.add, f"{id}, at once", text + sentence, ratio=ratio),
            )
            return tuple(once(one, model.device) for one in ways)

        rounds = [grow(str(number)) for number in range(REPEATS)]
    append, compact, add = (statistics.median(times) for times in zip(*rounds, strict=True))
    return [
        Figure(f"a sentence behind {_GROWN} tokens: {name}", add / seconds, bound, f"{add:.2f} s / {seconds:.2f} s")
        for name, seconds, bound in (
            ("adding all of it / appending it", append, "at least 10"),
            ("adding all of it / compacting what was appended", compact, "at least 0.9"),
        )
    ]


def _choosing(model: BeaconModel, tokens: int, ratio: int) -> list[Figure]:
    """Measure the reading of one document by `select`, and a stock forward of it, in turn."""
    ids = _ids(model, tokens)

    def select(score: str) -> Callable[[], object]:
        compressor = BeaconCompressor(model, score=score)
        work = Work(ids, compressor.ratios(tokens, ratio))
        return lambda: compressor.compress_one(work, compression="select")

    scores = {"repeat": "at least 0.45, for 8,000 tokens 0.6", "expected": "at least 0.9"}
    ways: list[Callable[[], object]] = [partial(_stock_forward, model, ids), *map(select, scores)]
    rounds = [[once(way, model.device) for way in ways] for _ in range(1 + REPEATS)]  # the first warms up
    stock, *seconds = (statistics.median(times) for times in zip(*rounds[1:], strict=True))
    return [
        Figure(
            f"reading {tokens:,} tokens, score {score}: select, ratio {ratio} / stock forward without head",
            stock / taken,
            bound,
            f"{tokens / taken:,.0f} / {tokens / stock:,.0f} tokens/s",
        )
        for (score, bound), taken in zip(scores.items(), seconds, strict=True)
    ]


@torch.inference_mode()
def _stock_forward(model: BeaconModel, ids: list[int]) -> None:
    model.base.model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)


def _peak(model: str | None, adapter: str | None, device: str | None, dtype: str) -> Figure:
    """Measure peak memory in two processes of their own, so that nothing else counts."""
    small, large = (_peak_of(tokens, model, adapter, device, dtype) for tokens in _PEAK_TOKENS)
    return Figure(
        f"peak memory: compressing {_PEAK_TOKENS[1]:,} / {_PEAK_TOKENS[0]:,} tokens, ratio {_PEAK_RATIO}",
        large / small,
        "at most 1.5",
        f"{large / 1e6:,.0f} MB / {small / 1e6:,.0f} MB, model included",
    )


def _peak_of(tokens: int, *source: str | None) -> int:
    arguments = json.dumps([tokens, *source])
    command = [sys.executable, "-m", "beacon_memory.bench.model", arguments]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def _measure_peak(tokens: int, model: str | None, adapter: str | None, device: str | None, dtype: str) -> int:
    """Return the most bytes that this process takes while it compresses `tokens` tokens."""
    loaded = load(model, adapter, device, dtype)
    compressor = BeaconCompressor(loaded)
    work = [Work(_ids(loaded, tokens), compressor.ratios(tokens, _PEAK_RATIO))]
    _, peak = peak_memory(lambda: list(compressor.compress(enumerate(work), compression="beacon")), loaded.device)
    return peak


def _ids(model: BeaconModel, tokens: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(model.base.config.vocab_size) for _ in range(tokens)]


if __name__ == "__main__":
    arguments: list[Any] = json.loads(sys.argv[1])
    print(_measure_peak(*arguments))  # noqa: T201  # read by the process that asked
