"""The cost of a server, and its gain: `beacon-memory bench serve`.

The library answers in this process and the server in one of its own, from the same store. Only one of them works at a
time.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from beacon_memory.documents import Document
from beacon_memory.errors import ServerError
from beacon_memory.memory import BeaconMemory

from . import soak
from .measuring import QUESTION, Figure, random_text

__all__ = ["run"]

_ROUNDS = 20
_TOKENS = 500  # of each document
_NEW_TOKENS = 32
_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class _Reply:
    """The seconds until an answer began and ended, and its tokens."""

    first: float
    whole: float
    tokens: int


def run(
    model: str | None, adapter: str | None, device: str | None, dtype: str, *, clients: int, minutes: float = 0
) -> Iterator[Figure]:
    """Measure the first token, and as many clients as given, each with a document of its own; yields figures in turn.

    minutes: if not 0, that long the server is then kept at its limit by four times as many clients, see `soak`.

    It takes some minutes on two cores.
    """
    with tempfile.TemporaryDirectory(prefix="beacon-memory-") as store:
        ids = [f"document-{number}" for number in range(clients)]
        with BeaconMemory(store, model, adapter, device=device, dtype=dtype) as memory:
            memory.add_many([Document(id, f"{id}: {random_text(_TOKENS)}") for id in ids])
            options = _options(model, adapter, device, dtype)
            with _server(store, options) as (url, _), httpx.Client(base_url=url, timeout=_SECONDS) as http:
                for id in ids:  # once, so that all are read from their files
                    _library(memory, id)
                    _asked(http, id)
                yield _overhead(memory, http, ids)
                yield _command(url, ids[0])
                yield from _together(http, ids)
        if minutes:
            yield from _at_the_limit(store, model, adapter, device, ids, minutes)


def _at_the_limit(
    store: str, model: str | None, adapter: str | None, device: str | None, ids: list[str], minutes: float
) -> Iterator[Figure]:
    """Ask for all answers of the library, and let a server of the same store answer many times, in float32."""
    with BeaconMemory(store, model, adapter, device=device, dtype="float32") as memory:
        wanted = {id: memory.ask(QUESTION, id, max_new_tokens=_NEW_TOKENS).text for id in ids}
    options = [*_options(model, adapter, device, "float32"), "--max-waiting", str(len(ids))]
    with _server(store, options) as (url, process):
        yield from soak.run(url, process, wanted, clients=4 * len(ids), minutes=minutes, new_tokens=_NEW_TOKENS)


def _options(model: str | None, adapter: str | None, device: str | None, dtype: str) -> list[str]:
    given = {"--model": model, "--adapter": adapter, "--device": device, "--dtype": dtype}
    return [part for name, value in given.items() if value is not None for part in (name, value)]


def _overhead(memory: BeaconMemory, http: httpx.Client, ids: list[str]) -> Figure:
    """Measure what the server adds to the time until the first token."""
    turns = [ids[number % len(ids)] for number in range(_ROUNDS)]
    pairs = [(_library(memory, id), _asked(http, id, 1).first) for id in turns]
    ours, theirs = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    detail = f"{1000 * theirs:.1f} ms / {1000 * ours:.1f} ms of the library, medians of {_ROUNDS}"
    return Figure("first token, what the server adds, ms", 1000 * (theirs - ours), "at most 10", detail)


def _command(url: str, id: str) -> Figure:
    """Measure what a command that goes through the server takes beside the seconds that the server tells of."""
    command = [sys.executable, "-m", "beacon_memory", "ask", QUESTION, "--doc", id, "--max-new-tokens", "8", "--json"]
    environment, took = {**os.environ, "BEACON_MEMORY_URL": url}, []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, env=environment)
        took.append((time.perf_counter() - started, float(json.loads(done.stdout)["seconds"])))
    whole, theirs = min(took, key=lambda pair: pair[0] - pair[1])
    detail = f"{whole:.2f} s, of which the server tells of {theirs:.2f} s, best of {_ROUNDS}"
    return Figure("`ask` through the server, what its process adds, s", whole - theirs, "at most 0.5", detail)


def _together(http: httpx.Client, ids: list[str]) -> Iterator[Figure]:
    """Measure clients at the same time beside the same ones one after another."""
    began = time.perf_counter()
    alone = [_asked(http, id) for id in ids]
    between = time.perf_counter()
    with ThreadPoolExecutor(len(ids)) as threads:
        together = [*threads.map(lambda id: _asked(http, id), ids)]
    ended = time.perf_counter()
    slow, fast = (
        sum(one.tokens for one in alone) / (between - began),
        sum(one.tokens for one in together) / (ended - between),
    )
    detail = f"{fast:.1f} / {slow:.1f} tokens/s, {sum(one.tokens for one in alone) // len(ids)} tokens each"
    yield Figure(f"{len(ids)} clients: tokens/s at once / one after another", fast / slow, "at least 3", detail)
    first = [one.first for one in together]
    mean = statistics.fmean(first)
    detail = f"{max(first):.2f} s / {mean:.2f} s"
    yield Figure(f"{len(ids)} clients: slowest first token / their mean", max(first) / mean, "at most 3", detail)


def _library(memory: BeaconMemory, id: str) -> float:
    """Return the seconds until the library's first piece."""
    started = time.perf_counter()
    with contextlib.closing(memory.stream(QUESTION, id, max_new_tokens=1)) as pieces:
        next(pieces)
        return time.perf_counter() - started


def _asked(http: httpx.Client, id: str, new_tokens: int = _NEW_TOKENS) -> _Reply:
    body = soak.asked_body(id, new_tokens) | {"stream": True, "stream_options": {"include_usage": True}}
    body |= {"min_tokens": new_tokens}
    started, first, tokens = time.perf_counter(), 0.0, 0
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.is_error:
            raise ServerError(f"the server refused a question: {reply.read().decode()}")
        for line in reply.iter_lines():
            first = first or time.perf_counter() - started
            if line.startswith("data: {") and '"completion_tokens": ' in line:
                tokens = int(line.partition('"completion_tokens": ')[2].partition(",")[0])
    return _Reply(first, time.perf_counter() - started, tokens)


@contextlib.contextmanager
def _server(store: str, options: list[str]) -> Iterator[tuple[str, int]]:
    """Run a server in a process of its own; yields its URL and the id of the process."""
    command = [sys.executable, "-m", "beacon_memory", "serve", "--port", "0", "--store", store, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "http" not in line:
                raise ServerError(f"the server did not start: run {' '.join(command[:6])} to see why")
            yield line.split()[-1], process.pid
        finally:
            process.terminate()
