"""Figures of a running server, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from beacon_memory.results import Answer

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Count what a server does, in a registry of its own.

    requests, seconds: of each route. first_token: seconds until an answer began, loading included.
    tokens: `prompt`, `loaded` (memory slots) and `generated`. loaded: documents by the place where their memory was.
    compressed: raw tokens that were read of documents. jobs: that ended, by how.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        of: dict[str, Any] = {"namespace": "beacon_memory", "registry": self._registry}
        self.requests = Counter("requests", "Requests that ended.", ("method", "route", "status"), **of)
        self.seconds = Histogram("request_seconds", "Time of requests.", ("route",), buckets=_SECONDS, **of)
        self.first_token = Histogram("first_token_seconds", "Time to the first token.", buckets=_SECONDS, **of)
        self.tokens = Counter("tokens", "Tokens of answers, and memory slots.", ("kind",), **of)
        self.loaded = Counter("loaded_documents", "Documents that were loaded, by where they were.", ("place",), **of)
        self.compressed = Counter("compressed_tokens", "Tokens of documents that were read.", **of)
        self.jobs = Counter("jobs_ended", "Jobs that ended.", ("status",), **of)
        self._of = of

    def watch(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Add a figure that is asked for whenever the metrics are."""
        Gauge(name, what, **self._of).set_function(value)

    def answered(self, answer: Answer) -> None:
        """Count an answer."""
        usage = answer.usage
        self.first_token.observe(answer.time_to_first_token)
        for kind, count in (
            ("prompt", usage.prompt_tokens),
            ("loaded", usage.slots),
            ("generated", usage.generated_tokens),
        ):
            self.tokens.labels(kind).inc(count)
        for document in usage.documents:
            self.loaded.labels(document.place).inc()

    def page(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)
