"""A replica: one server of a store that is served by many, in a process of Ray Serve.

Its requests come from a `Front`, and go through the same application as those of a server on one machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

from ray import serve
from starlette.datastructures import MutableHeaders

from beacon_memory.errors import ConflictError
from beacon_memory.memory import BeaconMemory
from beacon_memory.server.app import make_app
from beacon_memory.server.jobs import Jobs
from beacon_memory.server.logs import begin_logging
from beacon_memory.server.service import Service
from beacon_memory.server.settings import ServerSettings

__all__ = ["REPLICA_HEADER", "Replica"]

REPLICA_HEADER = "x-replica"  # of responses: which replica they are from
_LONGER = 30.0  # seconds beyond those of a shutdown that a new writer waits for the jobs of the one before
_AGAIN = 0.2  # seconds between its looks at them


class Replica:
    """A server of a store, which answers, or as the one `writer` has the jobs of the store and all that changes it."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, memory: BeaconMemory, settings: ServerSettings, *, writer: bool
    ) -> None:
        begin_logging()
        memory.model  # noqa: B018  # loaded now, so that no request waits for it
        jobs = await _claimed_jobs(memory, settings) if writer else None
        self._jobs, self._service = jobs, Service(memory, jobs, settings)
        self._app = make_app(self._service)
        self._running = self._app.router.lifespan_context(self._app)
        await self._running.__aenter__()
        self._id = serve.get_replica_context().replica_id.unique_id

    async def __del__(self) -> None:
        """End: Ray calls this when requests are met no more, and those that were running have ended."""
        if hasattr(self, "_running"):
            await self._running.__aexit__(None, None, None)
            if self._jobs is not None:
                self._jobs.close()

    def check_health(self) -> None:
        """Raise RuntimeError if requests cannot be met any more, so that Ray starts another replica."""
        if not self._service.ready:
            raise RuntimeError("the replica cannot compress any more; its log says why")

    async def meet(self, scope: MutableMapping[str, Any], body: bytes) -> AsyncIterator[MutableMapping[str, Any]]:
        """Meet a request, and yield the messages of the response as ASGI has them.

        Whoever stops taking them, by cancelling the call, is a client that went away.
        """
        messages: asyncio.Queue[MutableMapping[str, Any] | None] = asyncio.Queue()
        left, taken = asyncio.Event(), False

        async def receive() -> MutableMapping[str, Any]:
            nonlocal taken
            if not taken:
                taken = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        meeting = asyncio.ensure_future(self._app(scope, receive, messages.put))
        meeting.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message)[REPLICA_HEADER] = self._id
                yield message
        finally:
            left.set()
            await meeting


async def _claimed_jobs(memory: BeaconMemory, settings: ServerSettings) -> Jobs:
    """Return the jobs of a store as soon as the writer before has left them; raises ConflictError if it does not."""
    until = time.monotonic() + settings.shutdown + _LONGER
    while True:
        try:
            return Jobs(memory.store.root, settings.most_jobs)
        except ConflictError:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(_AGAIN)
