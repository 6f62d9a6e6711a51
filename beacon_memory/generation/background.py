"""Blocking work for an event loop that must go on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import TypeVar

__all__ = ["in_background"]

T = TypeVar("T")


async def in_background(start: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
    """Iterate over what the iterator that `start` makes yields; it is made and advanced in threads.

    When this is closed or cancelled, so is the iterator, if it is a generator, after the step that is under way.

        async for piece in in_background(lambda: memory.stream("Who pays the rent?")): ...
    """
    iterator: Iterator[T] | None = None
    step: asyncio.Task[tuple[T] | None] | None = None
    starting = asyncio.ensure_future(asyncio.to_thread(start))
    try:
        iterator = await asyncio.shield(starting)
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(_advance, iterator))
            item = await asyncio.shield(step)
            if item is None:
                return
            yield item[0]
    finally:
        done, _ = await asyncio.wait([one for one in (starting, step) if one is not None])
        failed = [one.exception() for one in done]  # looked at, so that nobody reports them as forgotten
        if iterator is None and not any(failed):
            iterator = starting.result()
        if isinstance(iterator, Generator):
            await asyncio.to_thread(iterator.close)


def _advance(iterator: Iterator[T]) -> tuple[T] | None:
    try:
        return (next(iterator),)
    except StopIteration:
        return None
