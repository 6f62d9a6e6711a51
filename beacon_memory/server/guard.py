"""The guard at the door: who sends a request, and whether it may come in at all.

With keys, a request to the API needs one. Without, the server listens to this machine alone, and pages of web sites are
kept out: a browser would send their requests to it, too.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from beacon_memory.errors import ConfigError

from .keys import Caller, Keys, Right
from .refusals import INTERNAL, RefusedError

__all__ = ["Guard"]

_OPEN = frozenset({"/health", "/ready", "/openapi.json"})  # for who watches over the server, and tells nothing of it
_GUARDED = ("/v1/", "/metrics")
_SCHEME = "bearer "


class Guard:
    """Let requests in, with their caller in `scope["state"]`, or refuse them.

    keys:      None for a server of one user, who may do everything in `namespace`.
    origins:   web sites whose pages may call; the server's own may always.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, namespace: str, origins: Collection[str]) -> None:
        self.app = app
        self._keys = keys
        self._anybody = Caller("anybody", namespace, frozenset(Right))
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["caller"] = self._let_in(scope["path"], Headers(scope=scope))
            except RefusedError as refusal:
                await refusal.response(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _let_in(self, path: str, headers: Headers) -> Caller | None:
        if path in _OPEN:
            return None
        self._check_origin(headers)
        if self._keys is None:
            _check_host(headers.get("host", ""))
            return self._anybody
        given = headers.get("authorization", "")
        caller = self._caller(given[len(_SCHEME) :].strip()) if given.lower().startswith(_SCHEME) else None
        if caller is None and path.startswith(_GUARDED):
            raise RefusedError(
                401,
                "invalid_api_key",
                "no valid API key: send the header Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return caller

    def _caller(self, token: str) -> Caller | None:
        assert self._keys is not None
        try:
            return self._keys.caller(token)
        except ConfigError as error:  # its message names the file
            raise INTERNAL from error

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self._origins or urlsplit(origin).netloc == headers.get("host"):
            return
        raise RefusedError(403, "origin_not_allowed", f"pages of {origin[:200]!r} may not call this server")


def _check_host(host: str) -> None:
    """Refuse requests to another name than one of this machine: a web site may let its name lead here."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        known = name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        known = False
    if not known:
        raise RefusedError(403, "host_not_allowed", f"this server answers as localhost, not as {host[:200]!r}")
