"""The front: it takes the requests of clients, and hands each to a replica that has its documents ready.

Questions on the same documents go to the same replica, by consistent hashing, and to the next one while that is full.
What changes the store, and what is about jobs, goes to the writer.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from beacon_memory.server.body_limit import BodyLimit
from beacon_memory.server.leaving import ClientGoneError, while_connected
from beacon_memory.server.refusals import RefusedError, refusal_of

__all__ = ["Front", "key_of"]

_WRITER = ("/v1/documents/", "/v1/jobs", "/metrics")  # what begins so goes to the writer
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
_TRIES = 3  # to find a replica that lives
_LATER = {"Retry-After": "1"}  # seconds


class Front:
    """Hand requests on to replicas; `answering` and `writer` are their deployments. `most_body`: bytes of a body."""

    def __init__(self, answering: DeploymentHandle[Any], writer: DeploymentHandle[Any], most_body: int) -> None:
        self._answering = answering.options(stream=True)
        self._writer = writer.options(stream=True)
        self._most_body = most_body

    def __serve_build_asgi_app__(self) -> ASGIApp:  # Ray's name
        """Return the application that Ray's proxies call."""
        return Router(default=BodyLimit(self._meet, self._most_body))

    async def _meet(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await request.body()
            await while_connected(request, self._hand_on(request, body, send))
        except (RefusedError, HTTPException) as error:
            await refusal_of(error).response(scope, receive, send)
        except (ClientDisconnect, ClientGoneError):
            pass

    async def _hand_on(self, request: Request, body: bytes, send: Send) -> None:
        """Hand a request on; once more if its replica dies before the answer has begun, which changes nothing.

        Raises RefusedError if there is none that lives, or has a place.
        """
        writes = request.url.path.startswith(_WRITER)
        replicas = self._writer if writes else self._answering.options(session_id=key_of(request, body))
        scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
        for left in reversed(range(1 if writes else _TRIES)):
            begun = False
            responses: Any = replicas.meet.remote(scope, body)
            try:
                async for message in responses:
                    begun = True
                    await send(message)
                return
            except (RayActorError, DeploymentUnavailableError) as error:
                if begun:
                    raise
                if not left:
                    raise RefusedError(
                        503, "replica_lost", "the server that met this was lost; try again", headers=_LATER
                    ) from error
            except BackPressureError as error:
                raise RefusedError(
                    429, "overloaded", "all servers have as much to do as they can; try again", headers=_LATER
                ) from error
            finally:
                responses.cancel()


def key_of(request: Request, body: bytes) -> str:
    """Return what the requests on the same documents have in common, by the same caller; "" if none are named."""
    try:
        ids = json.loads(body)["document_ids"]
        named = json.dumps([request.headers.get("authorization"), sorted({*ids})])
    except (ValueError, TypeError, LookupError, RecursionError):  # the replica will say what is wrong with it
        return ""
    return hashlib.sha256(named.encode()).hexdigest() if ids else ""
