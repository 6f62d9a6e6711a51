"""Refusals: errors in the form of OpenAI's, which say nothing of files, folders or code of this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from beacon_memory.errors import (
    BeaconMemoryError,
    CapacityError,
    ConfigError,
    ConflictError,
    DocumentNotFoundError,
    FingerprintMismatchError,
    InputError,
    MissingDependencyError,
    QuotaError,
    UnreadableFileError,
    UnsupportedFormatError,
)

__all__ = ["INTERNAL", "RefusedError", "refusal_of", "refuse"]

_MOST_SHOWN = 3  # flaws of a body that a message names

# What an error of the library is to a client, the first that fits: status and code. Their messages are about what the
# client sent; those of all other errors are for the log alone, since they may name files.
_TOLD: Sequence[tuple[type[BeaconMemoryError], int, str]] = (
    (DocumentNotFoundError, 404, "document_not_found"),
    (CapacityError, 400, "context_length_exceeded"),
    (UnsupportedFormatError, 415, "unsupported_media_type"),
    (MissingDependencyError, 415, "unsupported_media_type"),  # whoever runs the server did not install what reads it
    (UnreadableFileError, 422, "unreadable_file"),
    (InputError, 400, "invalid_value"),
    (ConfigError, 400, "invalid_value"),
    (ConflictError, 409, "conflict"),
    (FingerprintMismatchError, 409, "other_model"),
    (QuotaError, 507, "quota_exceeded"),
)
_FRAMEWORK = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}  # codes of its errors
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RefusedError(Exception):
    """An answer to a request that cannot be met: status, code and message for the client, and headers."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error as a client reads it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The response with the error."""
        return JSONResponse(self.body, self.status, self.headers)


INTERNAL = RefusedError(
    500, "internal_error", "the server could not do this; its log says why, under the id in the header x-request-id"
)


def refusal_of(error: Exception) -> RefusedError:
    """Return what a client is told of an error: `INTERNAL` if it is not about the request."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, (RequestValidationError, ValidationError)):
        return _flawed(error)
    if isinstance(error, HTTPException):
        code = _FRAMEWORK.get(error.status_code, "invalid_request")
        return RefusedError(error.status_code, code, str(error.detail), headers=error.headers)
    for kind, status, code in _TOLD:
        if isinstance(error, kind):
            return RefusedError(status, code, str(error))
    return INTERNAL


def refuse(app: FastAPI) -> None:
    """Let an application answer with refusals where something is wrong with a request.

    Errors that are `INTERNAL` go on to who writes the log.
    """

    async def answer(_request: Request, error: Exception) -> JSONResponse:
        refusal = refusal_of(error)
        if refusal is INTERNAL:
            raise error
        return refusal.response

    for kind in (RefusedError, RequestValidationError, ValidationError, HTTPException, BeaconMemoryError):
        app.add_exception_handler(kind, answer)


def _flawed(error: RequestValidationError | ValidationError) -> RefusedError:
    """Name the first flaws of a request, without what it had there, which may be long or secret."""
    flaws = error.errors()
    places = [".".join(map(str, flaw["loc"][1:] if flaw["loc"][:1] == ("body",) else flaw["loc"])) for flaw in flaws]
    said = [f"{place}: {flaw['msg']}" if place else flaw["msg"] for place, flaw in zip(places, flaws, strict=True)]
    more = f"; and {len(said) - _MOST_SHOWN} more" if len(said) > _MOST_SHOWN else ""
    message = str(BeaconMemoryError("; ".join(said[:_MOST_SHOWN]) + more))  # which is cut where it is too long
    return RefusedError(400, "invalid_request", message, param=(places or [""])[0][:100] or None)
