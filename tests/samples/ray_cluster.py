"""Ray clusters of several nodes on this machine, and jobs on them that are killed in the middle.

`python tests/samples/ray_cluster.py --kill worker --times 50` kills a worker (or a node, or the driver) in the middle
of a job, so many times, and says what it found; `--postgres` with the catalog in a database. It needs what the
extra `dev` brings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from beacon_memory import BeaconMemory, Document
from beacon_memory.cli.cluster import connected
from beacon_memory.distributed import compress
from beacon_memory.documents import content_hash
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

_STORE_BYTES = 100_000_000  # of a node's object store: Ray's least is 75 MiB
_SECONDS = 300
_STARTS = 4
_WORKER = "MapWorker"  # begins the name of the processes of workers
_DRIVER = """
import json, sys
from pathlib import Path
from ray_cluster import documents, job
address, place, files, model, count = sys.argv[1:]
job(address, place, files or None, Path(model), documents(int(count)), lambda _: print("one", flush=True))
print("done", flush=True)
"""


class Nodes:
    """A cluster whose head computes nothing, with nodes of some cores each; a driver is this process, or its child."""

    def __init__(self, count: int, cores: int = 1) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self._cores = cores
        head = {"num_cpus": 0, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
        self._cluster = _patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        self.nodes = [self.add() for _ in range(count)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> Any:
        node = {"num_cpus": self._cores, "object_store_memory": _STORE_BYTES, "wait": False}
        return _patiently(lambda: self._cluster.add_node(**node))

    def workers(self, named: str = _WORKER) -> list[psutil.Process]:
        """The processes of workers that run, or of other actors of a name."""
        found = []
        for one in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(named in part for part in one.cmdline()):
                    found.append(one)
        return found

    def kill_worker(self) -> None:
        """Kill the process of a worker; one that is not there yet is waited for."""
        until = time.monotonic() + _SECONDS
        while not (found := self.workers()):
            assert time.monotonic() < until
            time.sleep(0.1)
        with contextlib.suppress(psutil.NoSuchProcess):
            random.choice(found).kill()

    def kill_node(self) -> None:
        """Kill a node with all its processes, and add another."""
        self._cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
        self.nodes.append(self.add())

    def close(self) -> None:
        self._cluster.shutdown()


def _patiently(start: Callable[[], Any]) -> Any:
    """Start a node, which Ray gives half a minute: too little on a machine that has much to do."""
    for left in reversed(range(_STARTS)):
        try:
            return start()
        except Exception:  # Ray raises no other
            if not left:
                raise
    raise AssertionError


def documents(count: int, words: int = 300) -> list[Document]:
    """Documents with texts of their own, and a tag."""
    return [Document(f"notes/{n}", f"Note {n} tells of the mill. " * (words // 6), tags=["note"]) for n in range(count)]


def job(
    address: str,
    place: str | Path,
    files: str | None,
    model: Path,
    given: list[Document],
    on_added: Callable[[Any], None] = lambda _: None,
) -> Any:
    """Compress documents on a cluster by two workers, in small batches."""
    with MemoryStore(place, files=files) as store, connected(address):
        return compress(given, BeaconMemory(store, model), workers=2, batch=4, on_added=on_added)


def require_each_once(place: str | Path, files: str | None, given: list[Document]) -> None:
    """Raise AssertionError unless exactly these documents are stored, whole, and nothing else is left."""
    with MemoryStore(place, files=files) as store:
        rows = {row.id: row for row in store.list()}
        assert rows.keys() == {one.id for one in given}
        for one in given:
            assert rows[one.id].content_hash == content_hash(one.text)
            assert rows[one.id].tags == ("note",)
        assert [*verify(store)] == []


def killed_in_the_middle(
    nodes: Nodes, kill: str, place: str | Path, files: str | None, model: Path, given: list[Document], after: list[int]
) -> Counter[str]:
    """Run a job, kill a worker, a node or the driver whenever so many documents are done, and look what is stored.

    after: a number for each kill; those of drivers, of which each begins the job again, count from its beginning.

    Returns how many documents had which status in the job that came to its end.
    """
    done: list[str] = []

    def on_added(one: Any) -> None:
        done.append(one.id)
        if len(done) in after and kill != "driver":
            nodes.kill_worker() if kill == "worker" else nodes.kill_node()

    stored: set[str] = set()
    for one in after if kill == "driver" else ():
        _killed_driver(nodes, place, files, model, len(given), one)
        with MemoryStore(place, files=files) as store:
            now = {row.id for row in store.list()}
            assert stored <= now
            stored = now
            left = {problem.kind for problem in verify(store)}
            assert left <= {"orphan-file", "stale-temp"}, left  # on their way, as of any process that is killed
    outcome = job(nodes.address, place, files, model, given, on_added)
    assert sorted(done) == sorted(one.id for one in given)
    assert outcome.counts.get("unchanged", 0) >= len(stored)
    assert not outcome.failed
    if kill == "driver":
        with MemoryStore(place, files=files) as store:
            repair(store)
    require_each_once(place, files, given)
    return Counter(outcome.counts)


def _killed_driver(nodes: Nodes, place: str | Path, files: str | None, model: Path, count: int, after: int) -> None:
    command = [sys.executable, "-c", _DRIVER, nodes.address, str(place), files or "", str(model), str(count)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    timer = threading.Timer(_SECONDS, driver.kill)
    timer.start()
    try:
        assert driver.stdout is not None
        for _ in range(after):
            line = driver.stdout.readline()
            assert line.strip() in ("one", "done"), "the driver has ended"
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        until = time.monotonic() + _SECONDS
        while nodes.workers():  # Ray ends them soon
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        timer.cancel()
        driver.kill()
        driver.wait()
        driver.stdout.close()


@contextlib.contextmanager
def _places(postgres: bool) -> Iterator[Callable[[Path], tuple[str, str | None]]]:
    """Yield what makes places for stores."""
    if not postgres:
        yield lambda folder: (str(folder / "store"), None)
        return
    from postgres_server import PostgresServer

    server = PostgresServer()
    try:
        yield lambda folder: (server.new_database(), (folder / "files").as_uri())
    finally:
        server.close()


def main() -> None:
    """Kill so often, each time another store, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill", choices=["worker", "node", "driver"], required=True)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--in-one-job", type=int, default=5, help="how many of them hit the same job")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from tiny_models import tiny_base, tiny_checkpoint

    random.seed(given.seed)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root, _places(given.postgres) as new_place:
        model = tiny_checkpoint(Path(root, "model"), tiny_base("llama", max_position_embeddings=4096))
        nodes = Nodes(2)
        try:
            for number in range(0, given.times, given.in_one_job):
                folder = Path(root, str(number))
                folder.mkdir()
                place, files = new_place(folder)
                kills = min(given.in_one_job, given.times - number)
                if given.kill == "driver":  # each begins the job again
                    after = random.choices(range(1, max(2, given.documents // 2 // kills)), k=kills)
                else:
                    after = random.sample(range(1, given.documents - 8), kills)
                texts = documents(given.documents)
                counts = killed_in_the_middle(nodes, given.kill, place, files, model, texts, after)
                total += counts
                print(json.dumps({"kills": number + len(after), "after": after, **counts}), flush=True)  # noqa: T201
        finally:
            nodes.close()
    print(json.dumps({"killed": given.kill, "times": given.times, "lost": 0, "doubled": 0, **total}))  # noqa: T201


if __name__ == "__main__":
    main()
