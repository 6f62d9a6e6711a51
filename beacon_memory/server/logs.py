"""The log: one JSON object a line, on standard error. It names callers and routes, and no text of theirs."""

from __future__ import annotations

import json
import logging
import sys

from beacon_memory.documents import utc_now

__all__ = ["LOGGER", "begin_logging"]

LOGGER = logging.getLogger("beacon_memory.server")
_LIBRARIES = ("uvicorn", "uvicorn.error")  # whose own handlers would write other lines


class _JsonLines(logging.Formatter):
    """Write a record as JSON; `extra={"fields": {...}}` are fields of it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        fields = {"time": utc_now(), "level": record.levelname.lower(), "message": record.getMessage()}
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def begin_logging() -> None:
    """Let the server and what it is made of write to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name in (LOGGER.name, *_LIBRARIES):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").handlers.clear()  # its parent writes
    logging.getLogger("uvicorn.error").propagate = True
