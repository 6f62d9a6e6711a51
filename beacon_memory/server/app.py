"""The application: routes and what stands in front of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response

from beacon_memory import __version__

from .body_limit import BodyLimit
from .guard import Guard
from .keys import Keys
from .leaving import ClientGoneError
from .observing import Observing
from .refusals import refuse
from .routes import chat, documents, jobs, operations, page
from .service import Service

__all__ = ["make_app"]

_DESCRIPTION = """An OpenAI-compatible server with memories: documents are read once and compressed, and answers are
given from them without reading them again. Errors have OpenAI's form, and each response an `x-request-id`."""


def make_app(service: Service) -> FastAPI:
    """Return the application of a service."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.begin()
        try:
            yield
        finally:
            service.end()

    settings = service.settings
    app = FastAPI(
        title="beacon_memory",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # an id may end with one
    )
    app.state.service = service
    refuse(app)
    app.add_exception_handler(ClientGoneError, _gone)
    for part in (chat, documents, jobs, operations, page):
        app.include_router(part.router)
    keys = None if settings.keys is None else Keys(settings.keys)
    app.add_middleware(BodyLimit, most=settings.most_body)
    app.add_middleware(Guard, keys=keys, namespace=service.memory.store.namespace, origins=settings.origins)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Observing, metrics=service.metrics)  # the last one is the outermost
    return app


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody will read it, but the log has it
