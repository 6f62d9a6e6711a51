"""Routes for the web page: one page, its style, its icon and its scripts, which ask nothing of any other server."""

from __future__ import annotations

from importlib.resources import files
from types import MappingProxyType

from fastapi import APIRouter
from fastapi.responses import Response

from beacon_memory.server.refusals import RefusedError

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # scripts and styles of this server alone, none of them inside the page, and no form or frame that leads elsewhere
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_INDEX = "index.html"


def _read() -> dict[str, tuple[bytes, str]]:
    """Return the files of the page with their types, by their names."""
    folder = files("beacon_memory.server").joinpath("page")
    return {
        file.name: (file.read_bytes(), _TYPES[suffix])
        for file in folder.iterdir()
        if (suffix := file.name[file.name.rfind(".") :]) in _TYPES
    }


_FILES = MappingProxyType(_read())


@router.get("/")
async def page() -> Response:
    """Return the page."""
    return _response(_INDEX)


@router.get("/page/{name}")
async def part(name: str) -> Response:
    """Return a style, an icon or a script of the page; 404 for anything else."""
    if name not in _FILES or name == _INDEX:
        raise RefusedError(404, "not_found", "the page has no such part")
    return _response(name)


def _response(name: str) -> Response:
    data, media_type = _FILES[name]
    return Response(data, media_type=media_type, headers=_HEADERS)
