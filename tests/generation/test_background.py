from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
from event_loop import awake_during

from beacon_memory.generation.background import in_background


class Numbers:
    """0, 1, 2 and so on, one in 50 ms, and what became of it."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.threads: set[threading.Thread] = set()
        self.made = 0
        self.closed = False

    def __call__(self) -> Iterator[int]:
        self.threads.add(threading.current_thread())
        self.kept = self._numbers()  # so that nothing but a call closes it
        return self.kept

    def _numbers(self) -> Iterator[int]:
        try:
            while self.made != self.fails_at:
                self.threads.add(threading.current_thread())
                time.sleep(0.05)
                self.made += 1
                yield self.made - 1
            raise LookupError(self.made)
        finally:
            self.closed = True


async def test_all_is_done_in_threads_while_the_event_loop_goes_on() -> None:
    numbers, read = Numbers(), []

    async def reading() -> None:
        async for number in in_background(numbers):
            read.append(number)
            if number == 9:
                return

    assert await awake_during(reading()) > 0.05
    assert read == list(range(10))
    assert threading.main_thread() not in numbers.threads


async def test_an_iterator_without_an_end_to_close_is_read_to_its_last_item() -> None:
    assert [item async for item in in_background(lambda: iter("abc"))] == ["a", "b", "c"]


async def test_who_leaves_closes_it_and_nothing_more_is_made() -> None:
    numbers = Numbers()
    read = in_background(numbers)
    assert [await anext(read), await anext(read)] == [0, 1]
    await read.aclose()
    assert (numbers.closed, numbers.made) == (True, 2)


@pytest.mark.parametrize("after", [0.0, 0.02, 0.12])
async def test_who_is_cancelled_waits_for_the_step_under_way_and_closes_it(after: float) -> None:
    numbers = Numbers()

    async def reading() -> list[int]:
        return [number async for number in in_background(numbers)]

    task = asyncio.create_task(reading())
    await asyncio.sleep(after)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    made = numbers.made
    await asyncio.sleep(0.1)
    assert numbers.made == made <= 3
    assert numbers.closed or not made


async def test_what_fails_fails_where_it_is_awaited() -> None:
    numbers = Numbers(fails_at=2)
    read = in_background(numbers)
    assert [await anext(read), await anext(read)] == [0, 1]
    with pytest.raises(LookupError, match="2"):
        await anext(read)
    assert numbers.closed

    def failing() -> Iterator[int]:
        raise ValueError("not even begun")

    with pytest.raises(ValueError, match="not even begun"):
        await anext(in_background(failing))
