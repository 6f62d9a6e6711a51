"""Routes for who watches over a server."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from beacon_memory.server.service import Admin, current

__all__ = ["router"]

router = APIRouter(tags=["Operations"])


@router.get("/health", summary="Tell whether the process lives")
async def health() -> dict[str, str]:
    """Answer, as long as the event loop turns."""
    return {"status": "ok"}


@router.get("/ready", summary="Tell whether requests can be met")
async def ready(request: Request) -> JSONResponse:
    """Return 200, or 503 while the server stops, or when it cannot compress any more."""
    service = current(request)
    if service.ready:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "stopping" if service.stopping else "failed"}, 503)


@router.get("/metrics", summary="Show the metrics", response_class=Response)
def metrics(visit: Admin) -> Response:
    """Return figures in Prometheus' text format."""
    return Response(visit.service.metrics.page(), media_type=CONTENT_TYPE_LATEST)
