"""Servers with tiny models: one in a thread of this process, or one in a process of its own, which can be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import httpx
from langchain_samples import OWLS, ROOF, WELL

from beacon_memory import BeaconMemory
from beacon_memory.server.run import RunningServer
from beacon_memory.server.settings import ServerSettings

TEXTS = {"roof": ROOF, "well": WELL, "owls": OWLS}
_SECONDS = 60


@contextlib.contextmanager
def running(memory: BeaconMemory, settings: ServerSettings | None = None) -> Iterator[RunningServer]:
    """A server in a thread, at any free port."""
    listening = threading.Event()
    with RunningServer(memory, replace(settings or ServerSettings(), port=0)) as server:
        thread = threading.Thread(target=server.run, args=[lambda _url: listening.set()])
        thread.start()
        try:
            assert listening.wait(_SECONDS)
            yield server
        finally:
            server.stop()
            thread.join(_SECONDS)
            assert not thread.is_alive()


def client(server: RunningServer | ServerProcess, key: str | None = None) -> httpx.Client:
    """A plain client of a server."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=_SECONDS)


def until(reached: Callable[[], bool]) -> None:
    """Wait for something that a server comes to, or one of its replicas, which takes longer."""
    end = time.monotonic() + 2 * _SECONDS
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


def ended_job(http: httpx.Client, reply: httpx.Response) -> dict[str, object]:
    """The job that a request began, once it has ended."""
    assert reply.status_code == 202, reply.text
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        job: dict[str, object] = http.get(reply.headers["location"]).raise_for_status().json()
        if job["status"] in ("done", "failed", "cancelled"):
            return job
        time.sleep(0.02)
    raise AssertionError(f"{job} does not end")


def put(http: httpx.Client, id: str, text: str, **fields: object) -> dict[str, object]:
    """Store a document, and wait until it is."""
    job = ended_job(http, http.put(f"/v1/documents/{id}", json={"text": text, **fields}))
    assert job["status"] == "done", job
    return job


class ServerProcess:
    """A server in a process of its own."""

    def __init__(self, store: Path, model: Path, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "beacon_memory", "serve", "--store", str(store), "--model", str(model)]
        self.log = store.parent / f"{store.name}.log"
        self._errors = self.log.open("a", encoding="utf-8")
        self.process = subprocess.Popen(
            [*command, "--port", "0", *options],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "http://" in line, self.log.read_text(encoding="utf-8")
        self.url = line.split()[-1]

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self.kill()
        self._errors.close()

    def kill(self) -> None:
        """End it as a power cut would, if it runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def terminate(self) -> int:
        """Ask it to end; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_SECONDS)
