"""Means that all benchmarks measure with: figures beside bounds, seconds, peak memory, files out of the page cache."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = [
    "QUESTION",
    "REPEATS",
    "Figure",
    "evict",
    "machine",
    "median_seconds",
    "once",
    "peak_memory",
    "random_text",
    "table",
]

QUESTION = "What is this document about?"
REPEATS = 3
_WORDS = "time year people way day man thing woman life child world school state family student group country problem"


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured figure, the bound that it should keep, and the measurements that it is computed from."""

    name: str
    value: float
    bound: str
    detail: str


def table(figures: Sequence[Figure]) -> str:
    """Return a markdown table of figures."""
    lines = ["| figure | measured | meant to be | made of |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {f.name} | {f.value:.3g} | {f.bound} | {f.detail} |" for f in figures)])


def machine() -> str:
    """Return the machine, and the versions of what computes."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{platform.machine()}, {cores} cores, {threads} threads, {versions}"


def random_text(tokens: int) -> str:
    """Return random words, together about `tokens` tokens."""
    draw, words = random.Random(0), _WORDS.split()
    return " ".join(draw.choice(words) for _ in range(tokens))


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a piece of work, after one run to warm up."""
    once(work, device)
    return statistics.median(once(work, device) for _ in range(REPEATS))


def once(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a piece of work."""
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def evict(path: Path) -> None:
    """Drop a file from the page cache, if the system has a call for it."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_memory(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Return the bytes that this process holds before a piece of work, and the most that it holds meanwhile.

    Of an accelerator, those of tensors there; else those of the whole process, with its code and what it has mapped.
    """
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = int(torch.accelerator.memory_allocated())
        work()
        return before, int(torch.accelerator.max_memory_allocated())
    with contextlib.suppress(OSError, AttributeError):  # glibc gives back what was freed before
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # Linux resets its peak
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _most_resident()
    work()
    return before, _most_resident()


def _most_resident() -> int:
    """Return the most bytes of memory that this process has held since its peak was reset."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
