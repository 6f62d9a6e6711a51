"""Routes for who watches over a server."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from beacon_memory.server.service import Admin, Service, current

__all__ = ["router"]

router = APIRouter(tags=["Operations"])


@router.get("/health", summary="Tell whether the process lives")
async def health() -> dict[str, str]:
    """Answer, as long as the event loop turns."""
    return {"status": "ok"}


@router.get("/ready", summary="Tell whether requests can be met")
async def ready(service: Annotated[Service, Depends(current)]) -> JSONResponse:
    """Return 200, or 503 while the server stops, or when it cannot compress any more."""
    if service.ready:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "stopping" if service.stopping else "failed"}, 503)


@router.get("/metrics", summary="Show the metrics", response_class=Response)
def metrics(visit: Admin) -> Response:
    """Return figures in Prometheus' text format."""
    return Response(visit.service.metrics.page(), media_type=CONTENT_TYPE_LATEST)
