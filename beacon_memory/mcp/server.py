"""An MCP server over a memory: by standard streams for the host that started it, or by HTTP for many."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mcp.server.mcpserver import MCPServer

from beacon_memory import __version__
from beacon_memory.errors import ConfigError

from .tools import MemoryTools

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from beacon_memory.memory import BeaconMemory

__all__ = ["HTTP_PATH", "http_app", "mcp_server"]

HTTP_PATH = "/mcp"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

_INSTRUCTIONS = """\
Long-term memory that lasts across conversations. Documents are read once by a local model, kept compressed, and asked
about from then on without being read again.

Before you answer from general knowledge, look whether memory knows: `search` for words, `ask` for answers, `list` for
what there is. `remember` what will be needed later (documents, decisions, facts, preferences) under telling ids, and
`append` to what grows. Passages that come with an answer are the original text: rely on them rather than on the answer
where they differ.
"""


def mcp_server(opened: Callable[[], BeaconMemory], *, read_only: bool = False) -> MCPServer[Any]:
    """Make a server over the memory that `opened` returns, which is called beside the event loop.

    read_only: whether to leave out the tools that change the memory.
    """
    server: MCPServer[Any] = MCPServer(
        "beacon-memory",
        title="Beacon Memory",
        instructions=_INSTRUCTIONS,
        version=__version__,
        log_level="WARNING",
    )
    MemoryTools(opened).add_to(server, read_only=read_only)
    return server


def http_app(server: MCPServer[Any], host: str, token: str | None) -> ASGIApp:
    """Return a server as an application that answers at `HTTP_PATH`, only to those who know the token if there is one.

    Without a token, requests that a web page of another origin may have sent are refused.
    Raises ConfigError for a host that others reach, without a token.
    """
    if token is None and host not in _LOOPBACK:
        raise ConfigError(
            f"host={host!r} can be reached by others, who could read and change the memory; give a token, or use "
            f"one of {', '.join(_LOOPBACK)}"
        )
    app: ASGIApp = server.streamable_http_app(streamable_http_path=HTTP_PATH, host=host)
    return app if token is None else RequireToken(app, token)


class RequireToken:
    """Answer 401 to requests whose `Authorization` header has not the bearer token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        if not token:
            raise ConfigError("the token is empty; anyone would know it")
        self._app, self._expected = app, b"bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and not self._knows(dict(scope["headers"]).get(b"authorization", b"")):
            challenge = [(b"www-authenticate", b"Bearer"), (b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": challenge})
            await send({"type": "http.response.body", "body": b'{"error": "the bearer token is missing or wrong"}'})
            return
        await self._app(scope, receive, send)

    def _knows(self, given: bytes) -> bool:
        kind, space, token = given.partition(b" ")
        return hmac.compare_digest(kind.lower() + space + token.strip(), self._expected)
