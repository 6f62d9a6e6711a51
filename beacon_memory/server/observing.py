"""Watching requests: each has an id, a line in the log, and a place in the metrics; no error gets past."""

from __future__ import annotations

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .logs import LOGGER
from .metrics import Metrics
from .refusals import INTERNAL

__all__ = ["Observing"]

_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)
_HEADER = "x-request-id"
_GONE = 499  # the status of a request whose client went away, as nginx has it
_OPEN = "unmatched"  # the route of requests that have none


class Observing:
    """Watch over all requests: the outermost part of the server."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, and note what becomes of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given, started = Headers(scope=scope).get(_HEADER, ""), time.perf_counter()
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = _GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[_HEADER] = request_id
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception:  # noqa: BLE001  # its trace is for the log alone
            LOGGER.exception("a request failed", extra={"fields": {"request_id": request_id}})
            if status == _GONE:
                await INTERNAL.response(scope, receive, noting)
        finally:
            self._note(scope, request_id, status, time.perf_counter() - started)

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = str(getattr(scope.get("route"), "path", _OPEN))  # and not the path, which has ids of documents
        method = scope["method"] if route != _OPEN else "any"  # a client may send any word as one
        self._metrics.requests.labels(method, route, status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        caller = scope["state"].get("caller")
        fields = {
            "request_id": request_id,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 1),
            "caller": None if caller is None else caller.name,
        }
        LOGGER.info("request", extra={"fields": fields})
