"""Iterating in a thread, so that an event loop never waits for a model."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import TypeVar

__all__ = ["in_background"]

T = TypeVar("T")


async def in_background(begin: Callable[[], Iterator[T]]) -> AsyncIterator[T]:
    """The items of the iterator that `begin` makes; both run in a thread.

    When the consumer leaves early, or is cancelled, the iterator is closed behind its next item.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[T] | BaseException | None] = asyncio.Queue()
    left = threading.Event()

    def hand_over(item: tuple[T] | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def work() -> None:
        try:
            items = begin()
            try:
                for item in items:
                    if left.is_set():
                        return
                    hand_over((item,))
            finally:
                if isinstance(items, Generator):
                    items.close()
        except BaseException as error:  # noqa: BLE001  # raised again in the consumer's task
            hand_over(error)
        else:
            hand_over(None)

    loop.run_in_executor(None, work)
    try:
        while (received := await queue.get()) is not None:
            if isinstance(received, BaseException):
                raise received
            yield received[0]
    finally:
        left.set()
