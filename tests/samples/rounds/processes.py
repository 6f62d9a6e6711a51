"""Many processes work on one store at the same time, in several namespaces, and others look after it meanwhile."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

from crashing import fork, wait
from workload import care

from beacon_memory.storage.repair import verify
from beacon_memory.storage.store import MemoryStore

from .kills import Writer, check_work

NAMESPACES = ("", "alpha", "beta")
_GRACE = 300  # seconds that a process may take to end


def processes(folder: Path, seed: int, count: int = 4, seconds: float = 4) -> int:
    """Let so many processes write, read, verify and export for so long; returns how many there were.

    Each process fails if it reads anything but a whole version that one of them wrote, or does not find its own.
    """
    rng = random.Random(seed)
    store_folder, until = folder / "store", time.monotonic() + seconds
    places = [NAMESPACES[number % len(NAMESPACES)] for number in range(count)]
    keeping, working = places[: count // 4], places[count // 4 :]
    writers = [Writer(store_folder, (f"{n}-0", f"{n}-1"), rng, place) for n, place in enumerate(working)]
    pids: list[int] = []
    try:
        for place in keeping:
            seed, store = rng.getrandbits(32), MemoryStore(store_folder, place)
            pids.append(fork(partial(care, store, folder / "care.log", set(), seed, until)))
        for writer in writers:
            writer.live(until)
            pids.append(writer.pid)
        time.sleep(seconds)
        while pids:
            assert wait(pids.pop(), _GRACE) == 0
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    writers_of = {place: [one for one in writers if one.namespace == place] for place in NAMESPACES}
    for place, ours in writers_of.items():
        for writer in ours:
            writer.settle()
        with MemoryStore(store_folder, place) as store:
            check_work(store, ours)
            assert verify(store) == []
    return count
