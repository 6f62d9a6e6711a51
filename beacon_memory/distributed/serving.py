"""Serving on a cluster: an application of Ray Serve, and running it until it is told to end.

    serve run beacon_memory.distributed.serving:app store=postgresql://db.example.com/memories keys=keys.json

    clients -> Ray's proxies -> fronts -> replicas that answer, and one that writes

Ray starts replicas, as many as there is work for, looks after their health, and lets them end what they were at.
"""

import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.context import _get_global_client

from beacon_memory.errors import ClusterError, ConfigError
from beacon_memory.memory import BeaconMemory
from beacon_memory.server.settings import ServerSettings
from beacon_memory.storage.store import MemoryStore

from .front import Front
from .replica import Replica

__all__ = ["NAME", "Serving", "app", "application", "serve_on_cluster"]

NAME = "beacon-memory"  # of the application
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_FRONTS = 2  # so that one may die; they have no model
_MANY = 10_000  # requests that a front, or the writer, has at a time: clients who wait, and who watch jobs
_BUSY = 0.5  # of the places of replicas: if more are taken, there are to be more replicas
# Seconds in which a replica has to tell a front how much it has to do, or is passed over: Ray's are 0.1, and a busy one
# that has a memory ready is worth more than an idle one that has not.
_PATIENCE = {"RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1", "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "4"}
_LOOK = 0.5  # seconds between the looks of a replica that ends whether its requests have ended
_STARTS = 3  # of a replica, after which Ray gives up
_DEFAULTS = ServerSettings()
_SETTINGS = ("host", "keys", "origins", "most_body", "most_running", "most_waiting", "shutdown")


class Serving(BaseModel):
    """Say what `app` serves, and by how many replicas: its arguments in a file of Ray Serve.

    store:     folder, on a machine that has all replicas, or the URL of a PostgreSQL database.
    files:     URL of the place of a new store's K/V files, see `MemoryStore`.
    cache:     folder on each machine for its part of a store in a database; that of the writer has the jobs.
    namespace, model, adapter, picker, device, dtype: as of `BeaconMemory`.
    host:      where Ray's proxies listen: what others can reach wants keys.
    keys, origins, most_body, most_running, most_waiting, shutdown: as of `ServerSettings`, of each replica.
    min_replicas, max_replicas, cpus, gpus, writer_resources: as of `application`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: str
    files: str | None = None
    cache: Path | None = None
    namespace: str = ""
    model: str | None = None
    adapter: str | None = None
    picker: str = "attention"
    device: str | None = None
    dtype: str = "auto"
    host: str = "0.0.0.0"
    keys: Path | None = None
    origins: tuple[str, ...] = _DEFAULTS.origins
    most_body: int = _DEFAULTS.most_body
    most_running: int = _DEFAULTS.most_running
    most_waiting: int = _DEFAULTS.most_waiting
    shutdown: int = _DEFAULTS.shutdown
    min_replicas: int = 1
    max_replicas: int = 1
    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Annotated[float | None, Field(ge=0)] = None
    writer_resources: dict[str, float] = {}


def app(serving: Serving) -> serve.Application:  # Ray looks at the annotation, which has to be a class and no text
    """Return the application that a file of Ray Serve describes; raises ConfigError for settings that cannot be."""
    memory = BeaconMemory(
        MemoryStore(serving.store, files=serving.files, cache=serving.cache),
        serving.model,
        serving.adapter,
        namespace=serving.namespace,
        device=serving.device,
        dtype=serving.dtype,
        picker=serving.picker,
    )
    return application(
        memory,
        ServerSettings(**{name: getattr(serving, name) for name in _SETTINGS}),
        serving.min_replicas,
        serving.max_replicas,
        cpus=serving.cpus,
        gpus=serving.gpus,
        writer_resources=serving.writer_resources,
    )


def application(
    memory: BeaconMemory,
    settings: ServerSettings,
    min_replicas: int = 1,
    max_replicas: int = 1,
    *,
    cpus: float = 1.0,
    gpus: float | None = None,
    writer_resources: Mapping[str, float] | None = None,
) -> serve.Application:
    """Return an application of Ray Serve that serves a memory.

    memory:   store and model, which each replica opens and loads by name.
    settings: of each replica; the port does not count.
    min_replicas, max_replicas: how many replicas answer: the more is asked, the more.
    cpus, gpus: of each replica, as Ray counts them; gpus by default 1 if the cluster has any.
    writer_resources: what the machine of the writer has, by which Ray finds it: `{"writer": 1}`.

    Raises ConfigError for bounds that cannot be.
    """
    if not 1 <= min_replicas <= max_replicas:
        raise ConfigError(f"min_replicas={min_replicas} must be at least 1, and max_replicas={max_replicas} no less")
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0  # type: ignore[no-untyped-call]
    deployment = cast("Any", serve.deployment)  # which is typed as for a decorator alone
    place = {"num_cpus": cpus, "num_gpus": gpus}
    ends = {
        "graceful_shutdown_timeout_s": settings.shutdown,
        "graceful_shutdown_wait_loop_s": _LOOK,
        "max_constructor_retry_count": _STARTS,
    }
    answering = deployment(Replica).options(
        name="answering",
        autoscaling_config={
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "target_ongoing_requests": max(1.0, _BUSY * settings.most_running),
        },
        max_ongoing_requests=settings.most_running,
        max_queued_requests=settings.most_waiting,
        request_router_config=RequestRouterConfig(
            request_router_class=cast("Any", _ROUTER), request_router_kwargs={"num_fallback_replicas": max_replicas}
        ),
        ray_actor_options=place,
        **ends,
    )
    writer = deployment(Replica).options(
        name="writer",
        num_replicas=1,
        max_ongoing_requests=_MANY,
        ray_actor_options=place | {"resources": dict(writer_resources or {})},
        **ends,
    )
    front = deployment(serve.ingress()(Front)).options(
        name="front",
        num_replicas=_FRONTS,
        max_ongoing_requests=_MANY,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _PATIENCE}},
        **ends,
    )
    replicas = [one.bind(memory, settings, writer=one is writer) for one in (answering, writer)]
    bound: serve.Application = front.bind(*replicas, settings.most_body)
    return bound


def serve_on_cluster(
    served: serve.Application,
    settings: ServerSettings,
    on_listening: Callable[[str], object] = lambda _url: None,
) -> None:
    """Run an application on the cluster that Ray is connected to, until this process is told to end (SIGINT, SIGTERM).

    Ray's proxies listen where the settings say. In the end running answers end, and the application is removed.
    on_listening: told a URL as soon as requests are met. Raises ClusterError if it cannot be started, or if proxies
    that run already listen elsewhere, where it may be that others reach them.
    """
    serve.start(http_options={"host": settings.host, "port": settings.port})
    listening = cast("Any", _get_global_client()).http_config
    if (listening.host, listening.port) != (settings.host, settings.port):
        raise ClusterError(
            f"the proxies of this cluster listen on {listening.host}:{listening.port} already, not on "
            f"{settings.host}:{settings.port}: name those, or end them with `serve shutdown`"
        )
    ended = threading.Event()
    before = {one: signal.signal(one, lambda *_: ended.set()) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        serve.run(served, name=NAME, route_prefix="/")
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        on_listening(f"http://{host}:{settings.port}")
        ended.wait()
    except RuntimeError as error:
        raise ClusterError(f"Ray could not start the servers: {error}") from error
    finally:
        serve.delete(NAME)
        for one, handler in before.items():
            signal.signal(one, handler)
