"""Answers for many clients at a time: a bound on those that are decoded together, and on those that wait."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from beacon_memory.memory import BeaconMemory
from beacon_memory.question import Question
from beacon_memory.results import Answer

from .metrics import Metrics
from .refusals import RefusedError
from .settings import ServerSettings

__all__ = ["Answering"]

T = TypeVar("T")
_LOADING = 4  # threads in which memories are loaded: more would only take the processors from each other
_FORGET = 0.1  # what the latest answer counts for in the mean time of answers


class Answering:
    """Let questions in, as many as there is room for, and stream their answers.

    All that are in are decoded together; whoever leaves frees a place for the one that has waited longest.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._places = asyncio.Semaphore(settings.most_running)
        self._threads = ThreadPoolExecutor(_LOADING, "beacon-memory-load")
        self._seconds = 1.0  # that answers take, in the mean of the latest
        self.running = 0
        self.waiting = 0
        metrics.watch("answers_running", "Answers that are being made.", lambda: self.running)
        metrics.watch("answers_waiting", "Requests that wait for a place.", lambda: self.waiting)

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(cancel_futures=True)

    async def pieces(self, memory: BeaconMemory, question: Question) -> AsyncGenerator[str | Answer, None]:
        """Yield pieces of an answer as they come, and the whole Answer last; see `BeaconMemory.astream`.

        Raises RefusedError with 429 where there is no place.
        """
        async with self.place(), contextlib.aclosing(memory.astream(question, self._threads)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Answer):
                    self._seconds += _FORGET * (piece.seconds - self._seconds)
                    self._metrics.answered(piece)
                yield piece

    async def run(self, work: Callable[[], T]) -> T:
        """Do some work that needs the model, in the place of an answer."""
        async with self.place():
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place, and hold it; raises RefusedError if too many wait, or if it takes too long."""
        if self._places.locked() and self.waiting >= self._settings.most_waiting:
            raise self._too_many(f"{self.running} answers are being made and {self.waiting} requests wait already")
        self.waiting += 1
        try:
            async with asyncio.timeout(self._settings.most_wait):
                await self._places.acquire()
        except TimeoutError:
            raise self._too_many(f"no place came free in {self._settings.most_wait:g} s") from None
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()

    def _too_many(self, why: str) -> RefusedError:
        rounds = 1 + self.waiting / self._settings.most_running
        seconds = max(1, math.ceil(rounds * self._seconds))
        return RefusedError(
            429, "overloaded", f"{why}; try again in {seconds} s", headers={"Retry-After": str(seconds)}
        )
