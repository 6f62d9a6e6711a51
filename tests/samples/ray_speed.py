"""What two workers, and two replicas, do in the time of one, on the cores of this machine and with a tiny model.

`python tests/samples/ray_speed.py` prints documents a second of `compress`, and answers a second of a served store, by
one and by two, in turn; and how many are made in a second of the processor, by all processes of the cluster together,
which tells what sharing costs, also on a machine that others use.

`python tests/samples/ray_speed.py --grow 3` prints after how many seconds there are how many replicas, of one to three,
while clients ask for two minutes, and when they have gone: Ray waits ten minutes then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil
from ray import serve
from ray_cluster import Nodes, documents
from tiny_models import tiny_base, tiny_checkpoint

from beacon_memory import BeaconMemory
from beacon_memory.cli.cluster import connected
from beacon_memory.distributed import compress
from beacon_memory.distributed.serving import NAME, application
from beacon_memory.server.settings import ServerSettings

_CLIENTS = 8
_TOKENS = 32  # of an answer
_PORT = 8199
_PLACES = 4  # for answers of a replica that is to get others beside it
_GROWING, _SHRINKING = 120.0, 1020.0  # seconds that clients ask, and after which replicas have to have gone
_REPLICA = f"ServeReplica:{NAME}:answering"  # begins the name of the processes of replicas
_CPUS = 0.3  # of a replica, as Ray counts them: two cores have two of them, and the writer


@dataclass(frozen=True, slots=True)
class Speed:
    """What was made in a second of the clock, and in one of the processor."""

    clock: float
    processor: float


class _Watch:
    """Take the time of the clock and of the processor, of all processes of the cluster."""

    def __init__(self) -> None:
        self._clock, self._processor = time.perf_counter(), _processor_seconds()

    def speed(self, count: int) -> Speed:
        """Return how fast so much was made since the beginning."""
        return Speed(count / (time.perf_counter() - self._clock), count / (_processor_seconds() - self._processor))


def _processor_seconds() -> float:
    seconds = 0.0
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            seconds += times.user + times.system
    return seconds


def compressing(memory: BeaconMemory, workers: int, count: int) -> Speed:
    """How fast workers are from the first document that is stored to the last: without the time in which they start."""
    done, watch, speed = 0, _Watch(), Speed(0.0, 0.0)

    def added(_: object) -> None:
        nonlocal done, watch, speed
        done += 1
        if done == 1:
            watch = _Watch()
        elif done == count:
            speed = watch.speed(count - 1)

    outcome = compress(documents(count), memory, workers=workers, on_added=added)
    assert outcome.counts == {"added": count}
    return speed


def answering(memory: BeaconMemory, replicas: int, seconds: float) -> Speed:
    """How many answers of 32 tokens clients get that ask one after another, each on documents of its own."""
    settings = ServerSettings(port=_PORT)
    serve.run(application(memory, settings, replicas, replicas, cpus=_CPUS), name=NAME, route_prefix="/")
    try:
        begun = threading.Barrier(_CLIENTS + 1)
        with ThreadPoolExecutor(_CLIENTS) as threads:
            asking = [threads.submit(_ask, number, begun, seconds) for number in range(_CLIENTS)]
            begun.wait()
            watch = _Watch()
            count = sum(one.result() for one in asking)
            return watch.speed(count)
    finally:
        serve.delete(NAME)


def growing(memory: BeaconMemory, nodes: Nodes, most: int) -> Iterator[tuple[float, int]]:
    """Yield whenever there are more replicas, or fewer: after how many seconds, and how many."""
    settings = ServerSettings(port=_PORT, most_running=_PLACES)
    serve.run(application(memory, settings, 1, most, cpus=_CPUS), name=NAME, route_prefix="/")
    started, known = time.perf_counter(), 0
    try:
        begun = threading.Barrier(_CLIENTS)
        with ThreadPoolExecutor(_CLIENTS) as threads:
            asking = [threads.submit(_ask, number, begun, _GROWING) for number in range(_CLIENTS)]
            while (passed := time.perf_counter() - started) < _GROWING or (known > 1 and passed < _SHRINKING):
                if (now := len(nodes.workers(_REPLICA))) != known:
                    known = now
                    yield passed, known
                time.sleep(0.5)
            assert all(one.result() for one in asking)
    finally:
        serve.delete(NAME)


def _ask(client: int, begun: threading.Barrier, seconds: float) -> int:
    """Ask for some seconds; returns how many answers came."""
    with httpx.Client(base_url=f"http://127.0.0.1:{_PORT}", timeout=60) as http:
        question = {"messages": [{"role": "user", "content": "Who?"}], "max_completion_tokens": _TOKENS}
        for number in range(2):  # whatever is only done once
            _answer(http, question, client, number)
        begun.wait()
        until, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < until:
            _answer(http, question, client, count)
            count += 1
        return count


def _answer(http: httpx.Client, question: dict[str, object], client: int, number: int) -> None:
    asked = {**question, "model": NAME, "document_ids": [f"notes/{2 * client + number % 2}"]}
    http.post("/v1/chat/completions", json=asked).raise_for_status()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--grow", type=int, metavar="MOST", help="how many replicas there may be")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        base = tiny_base("llama", max_position_embeddings=4096)
        base.generation_config.eos_token_id = None  # so that all answers are of the same length
        model = tiny_checkpoint(Path(root, "model"), base)
        nodes = Nodes(1, cores=2)
        try:
            with connected(nodes.address):
                serve.start(http_options={"host": "127.0.0.1", "port": _PORT})
                if given.grow:
                    memory = BeaconMemory(Path(root, "grown"), model, reserve=100)
                    memory.add_many((one.id, one.text) for one in documents(2 * _CLIENTS))
                    for seconds, replicas in growing(memory, nodes, given.grow):
                        print(json.dumps({"seconds": round(seconds), "replicas": replicas}), flush=True)  # noqa: T201
                    return
                for many in (1, 2):
                    memory = BeaconMemory(Path(root, f"{many}"), model, reserve=100)
                    speeds = {
                        "documents": compressing(memory, many, given.documents),
                        "answers": answering(memory, many, given.seconds),
                    }
                    for what, speed in speeds.items():
                        print(json.dumps({"what": what, "by": many, **asdict(speed)}), flush=True)  # noqa: T201
        finally:
            nodes.close()


if __name__ == "__main__":
    main()
