"""A bound on the bodies of requests, told in the form of all other refusals."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusals import refusal_of

__all__ = ["BodyLimit"]


class BodyLimit:
    """Refuse bodies of more than `most` bytes: by the length that they announce, or as soon as more has come."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, unless it announces too much."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        # an error of the framework's own kind passes through whatever reads the body
        too_large = HTTPException(413, f"a body may have {self._most:,} bytes; send less, or a document in parts")
        if announced.isdecimal() and int(announced) > self._most:
            await refusal_of(too_large).response(scope, receive, send)
            return
        left = self._most

        async def counting() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise too_large
            return message

        await self.app(scope, counting, send)
