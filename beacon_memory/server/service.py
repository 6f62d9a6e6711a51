"""A service: all that requests share while a server runs, and who may use which part of it."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from beacon_memory.memory import BeaconMemory

from .answering import Answering
from .compressing import Compressing
from .jobs import Jobs
from .keys import Caller, Right
from .metrics import Metrics
from .news import News
from .refusals import RefusedError
from .settings import ServerSettings

__all__ = ["ALIAS", "Admin", "Reader", "Service", "Visit", "Writer", "current"]

ALIAS = "beacon-memory"  # a name by which any server's model goes


class Service:
    """The model and the store of a server, and what works on them; used from `begin` to `end`.

    jobs: of the store; they outlive the service. None for a service that only answers, since another one has them.
    """

    def __init__(self, memory: BeaconMemory, jobs: Jobs | None, settings: ServerSettings) -> None:
        self.memory = memory
        self._jobs = jobs
        self._compressing: Compressing | None = None
        self.settings = settings
        self.metrics = Metrics()
        self.answering = Answering(settings, self.metrics)
        self.stopping = False
        self._memories = {memory.store.namespace: memory}
        self._opening = threading.Lock()
        self._watch_store()

    def begin(self) -> None:
        """Begin to work on jobs; in the event loop."""
        self.news = News()
        if self._jobs is not None:
            self._compressing = Compressing(
                self._jobs,
                self.memory_of,
                self.metrics,
                busy=lambda: self.answering.running > 0,
                changed=self.news.tell,
            )
            self._compressing.start()

    def end(self) -> None:
        """Stop working, and close the store."""
        if self._compressing is not None:
            self._compressing.stop()
        self.answering.close()
        for memory in self._memories.values():
            memory.close()

    def stop_soon(self) -> None:
        """Let nobody watch jobs any more: the server ends as soon as those that are answered have left."""
        self.stopping = True
        self.news.end()

    @property
    def jobs(self) -> Jobs:
        """The jobs of the store; raises RefusedError with 421 if another service has them."""
        if self._jobs is None:
            raise _elsewhere()
        return self._jobs

    @property
    def compressing(self) -> Compressing:
        """The work on the jobs; raises RefusedError with 421 if another service does it."""
        if self._compressing is None:
            raise _elsewhere()
        return self._compressing

    @property
    def ready(self) -> bool:
        """Whether requests can be met."""
        return not self.stopping and (self._jobs is None or self.compressing.alive)

    @property
    def model_name(self) -> str:
        """The name of the model, which is not where it lies."""
        return Path(str(self.memory.model.base.config.name_or_path)).name or ALIAS

    def require_model(self, name: str) -> None:
        """Raise RefusedError with 404 for the name of another model."""
        known = {self.model_name, ALIAS, str(self.memory.model.base.config.name_or_path)}
        if name not in known:
            raise RefusedError(
                404,
                "model_not_found",
                f"there is no model {name[:100]!r} here; there is {self.model_name!r}, or {ALIAS!r} for short",
                param="model",
            )

    def memory_of(self, namespace: str) -> BeaconMemory:
        """Return the memory in a namespace, opened once for all."""
        with self._opening:
            if namespace not in self._memories:
                self._memories[namespace] = self.memory.within(namespace)
            return self._memories[namespace]

    def _watch_store(self) -> None:
        def total(of: Callable[[BeaconMemory], int]) -> float:
            with self._opening:
                opened = [*self._memories.values()]
            return sum(map(of, opened))

        watch, jobs = self.metrics.watch, self._jobs
        watch("store_documents", "Stored documents.", lambda: total(lambda one: one.store.totals().documents))
        watch("store_bytes", "Bytes of their K/V.", lambda: total(lambda one: one.store.totals().bytes))
        if jobs is not None:
            watch("jobs_queued", "Jobs that wait.", lambda: jobs.counts().get("queued", 0))
            watch("jobs_running", "Jobs that are being done.", lambda: jobs.counts().get("running", 0))


def _elsewhere() -> RefusedError:
    return RefusedError(421, "answers_only", "this server only answers; another one of the store has its jobs")


class Visit:
    """A request that was let in: the service, the caller, and the memory of the caller's namespace."""

    def __init__(self, service: Service, caller: Caller) -> None:
        self.service = service
        self.caller = caller

    @property
    def memory(self) -> BeaconMemory:
        """The memory that the caller's key is bound to."""
        return self.service.memory_of(self.caller.namespace)


def current(request: Request) -> Service:
    """Return the service that a request came to."""
    service: Service = request.app.state.service
    return service


def _visit(right: Right) -> Callable[..., Awaitable[Visit]]:
    async def visit(
        request: Request,
        _bearer: Annotated[object, Depends(HTTPBearer(auto_error=False, description="An API key."))],  # for OpenAPI
    ) -> Visit:
        caller: Caller = request.state.caller
        if not caller.may(right):
            raise RefusedError(
                403, "right_missing", f"this key has no right to {right}; it needs one with --right {right}"
            )
        return Visit(current(request), caller)

    return visit


Reader = Annotated[Visit, Depends(_visit(Right.READ))]
Writer = Annotated[Visit, Depends(_visit(Right.WRITE))]
Admin = Annotated[Visit, Depends(_visit(Right.ADMIN))]
