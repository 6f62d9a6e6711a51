"""How long a fresh process takes to answer, and how processes share a machine: `beacon-memory bench start`.

The yardstick of an answer is what every process with a model has to do: import torch, and of transformers the classes
that the model needs, and map its weights. All is measured in turn, in processes of their own.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from beacon_memory.errors import InputError
from beacon_memory.modeling.default_model import ensure_default_model

from .measuring import Figure

__all__ = ["run"]

TEXT = "The house in Elm Street was let in March. Anna Berg pays the rent of 900 euros on the first of each month."
QUESTION = "Who pays the rent?"
_ROUNDS = 5
_NEW_TOKENS = 8
_BARE = """
import sys
import torch, transformers
from safetensors.torch import load_file
for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", sys.argv[1]):
    getattr(transformers, name)
weights = [load_file(file) for file in sys.argv[2:]]
print("loaded", flush=True)
"""
# What a token takes of a small model, many times: products too short for threads to be worth waiting for
_PRODUCTS = """
import sys, time, torch
weight, rows = torch.randn(576, 1536), torch.randn(64, 576)
for times in (10, 300):
    started = time.perf_counter()
    for _ in range(times):
        (rows @ weight).softmax(-1)
print(time.perf_counter() - started)
"""
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # what the process of a command was begun with


@dataclass(frozen=True, slots=True)
class _Took:
    """The seconds until a process printed something, until it had ended, and those of the processor."""

    printed: float
    ended: float
    processor: float


def run(model: str | None, adapter: str | None, device: str | None, dtype: str) -> list[Figure]:
    """Measure a question on one short document in a fresh process; takes a minute or two.

    model: a folder, or None for the embedded one. Raises InputError for any other.
    """
    folder = ensure_default_model() if model is None else Path(model)
    given = {"--model": model, "--adapter": adapter, "--device": device, "--dtype": dtype}
    options = [part for name, value in given.items() if value is not None for part in (name, value)]
    ours = [sys.executable, "-m", "beacon_memory"]
    bare = [sys.executable, "-c", _BARE, *_class_and_weights(folder)]
    with tempfile.TemporaryDirectory(prefix="beacon-memory-") as store:
        options += ["--store", store]
        subprocess.run([*ours, "add", "-", "--id", "lease", *options], input=TEXT, check=True, text=True)
        ask = [*ours, "ask", QUESTION, "--max-new-tokens", str(_NEW_TOKENS), *options]
        rounds = [(_took(bare), _took(ask)) for _ in range(_ROUNDS)]

    def figure(name: str, part: str) -> Figure:
        least, answered = (min(getattr(took, part) for took in process) for process in zip(*rounds, strict=True))
        detail = f"{answered:.2f} s / {least:.2f} s, best of {_ROUNDS} processes each"
        return Figure(f"start: ask / bare imports and mapped weights, {name}", answered / least, "at most 1.3", detail)

    return [
        figure("until the answer stands there", "printed"),
        figure("until the process has ended", "ended"),
        figure("time of the processor", "processor"),
        _threads(1, "at most 1.1"),
        _threads(2, "at most 1"),
    ]


def _threads(processes: int, bound: str) -> Figure:
    """Measure what it takes that threads which wait for each other soon sleep, as those of a command do."""
    ours, plain = {**os.environ}, {name: value for name, value in os.environ.items() if name not in _WAITING}
    rounds = [(_products(processes, plain), _products(processes, ours)) for _ in range(_ROUNDS)]
    spinning, sleeping = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    return Figure(
        f"threads: as those of a command wait / as torch has them, {processes} at once",
        sleeping / spinning,
        bound,
        f"{sleeping:.2f} s / {spinning:.2f} s, medians of {_ROUNDS}",
    )


def _products(processes: int, environment: dict[str, str]) -> float:
    """Return the seconds of the slowest of so many processes at once."""
    command = [sys.executable, "-c", _PRODUCTS]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return max(float(process.communicate()[0]) for process in running)


def _class_and_weights(folder: Path) -> list[str]:
    """Return the class of a model's folder, and its files of weights."""
    weights = sorted(map(str, folder.glob("*.safetensors")))
    if not weights:
        raise InputError(
            f"the model {str(folder)!r} is no folder with safetensors files, which can be mapped; name one"
        )
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return [settings["architectures"][0], *weights]


def _took(command: list[str]) -> _Took:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        printed = time.perf_counter() - started
        process.stdout.read()
    ended, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return _Took(printed, ended, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
