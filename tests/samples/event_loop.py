"""How much an event loop gets to do while something is going on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

_TICK = 0.002  # seconds


async def awake_during(work: Awaitable[object]) -> float:
    """The share of its ticks that the event loop kept until `work` was done: next to 0 if that blocked it."""
    ticks, since = 0, time.perf_counter()

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(_TICK)
            ticks += 1

    ticking = asyncio.create_task(tick())
    await work
    ticking.cancel()
    return ticks * _TICK / (time.perf_counter() - since)
