"""Running a server until it is stopped."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from beacon_memory.errors import MissingDependencyError
from beacon_memory.memory import BeaconMemory

try:
    import fastapi  # noqa: F401  # so that it is missed here, with advice
    import prometheus_client  # noqa: F401
    import uvicorn
except ImportError as error:
    raise MissingDependencyError(
        f"the server needs {error.name}, which is not installed: pip install 'beacon-memory[server]'"
    ) from error

from .app import make_app
from .jobs import Jobs
from .keys import read_keys
from .logs import begin_logging
from .service import Service
from .settings import ServerSettings

__all__ = ["RunningServer", "serve"]

_KEEP_ALIVE = 75  # seconds: longer than clients keep an idle connection, or they send a request into one that closes


def serve(
    memory: BeaconMemory, settings: ServerSettings, on_listening: Callable[[str], object] = lambda _url: None
) -> None:
    """Serve a memory until the process is told to end (SIGINT, SIGTERM); then answers that are running end first.

    on_listening: told the server's URL as soon as requests are met. Raises OSError if it cannot listen there, and
    ConflictError if another server works on the store.
    """
    begin_logging()
    with RunningServer(memory, settings) as server, _ended_by_signals():
        server.run(on_listening)


class RunningServer:
    """A server with its socket and its jobs: listening from the beginning, and meeting requests in `run`."""

    def __init__(self, memory: BeaconMemory, settings: ServerSettings) -> None:
        self._settings = settings
        self._opened = contextlib.ExitStack()
        if settings.keys is not None:
            read_keys(settings.keys)  # raises before a model is loaded for nothing
        with contextlib.ExitStack() as opened:
            family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            self._socket = opened.enter_context(socket.create_server((settings.host, settings.port), family=family))
            memory.model  # noqa: B018  # loaded now, so that no request waits for it
            jobs = opened.enter_context(contextlib.closing(Jobs(memory.store.root, settings.most_jobs)))
            self.service = Service(memory, jobs, settings)
            self._opened = opened.pop_all()
        self._server: _Server | None = None

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self, on_listening: Callable[[str], object] = lambda _url: None) -> None:
        """Meet requests until `stop` or a signal."""
        config = uvicorn.Config(
            make_app(self.service),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=self._settings.shutdown,
            timeout_keep_alive=_KEEP_ALIVE,
            ws="none",
        )
        self._server = _Server(config, self.service, lambda: on_listening(self.url))
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Let `run` end, after the answers that are running; from any thread."""
        if self._server is not None:
            self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn's server, which tells when it listens, and the service when it stops."""

    def __init__(self, config: uvicorn.Config, service: Service, on_listening: Callable[[], object]) -> None:
        super().__init__(config)
        self._service, self._on_listening = service, on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and tell."""
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell, and stop."""
        self._service.stop_soon()
        await super().shutdown(sockets)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Heed no signals: uvicorn raises those that have stopped it once more, and the process is to end as it should."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
