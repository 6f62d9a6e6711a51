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
    keepers = [
        fork(partial(care, MemoryStore(store_folder, place), folder / "care.log", set(), rng.getrandbits(32), until))
        for place in places[: count // 4]
    ]
    writers = [
        Writer(store_folder, (f"{number}-0", f"{number}-1"), rng, place)
        for number, place in enumerate(places[count // 4 :])
    ]
    try:
        for writer in writers:
            writer.live(until)
        time.sleep(seconds)
        pids = [*keepers, *(writer.pid for writer in writers)]
        assert [wait(pid, _GRACE) for pid in pids] == [0] * len(pids)
        keepers, writers_of = [], {place: [one for one in writers if one.namespace == place] for place in NAMESPACES}
    finally:
        for pid in keepers:
            os.kill(pid, signal.SIGKILL)
    for place, ours in writers_of.items():
        for writer in ours:
            writer.settle()
        with MemoryStore(store_folder, place) as store:
            check_work(store, ours)
            assert verify(store) == []
    return count
