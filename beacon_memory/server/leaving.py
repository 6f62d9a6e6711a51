"""Clients that go away while something is done for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

__all__ = ["ClientGoneError", "while_connected"]

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client of a request went away."""


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return what some work comes to; it is cancelled, with ClientGoneError, if the client goes away meanwhile."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
