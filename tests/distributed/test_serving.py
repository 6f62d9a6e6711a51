"""Serving on a cluster: two replicas that answer, of which one is killed, and a command that is told to end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from langchain_samples import in_words
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema
from ray_cluster import Nodes
from repository import ROOT
from servers import ended_job, until
from starlette.requests import Request
from tiny_models import tiny_base, tiny_checkpoint, tiny_tokenizer

from beacon_memory import BeaconMemory, ConfigError
from beacon_memory.distributed.front import key_of
from beacon_memory.distributed.serving import NAME, Serving, app
from beacon_memory.server.keys import Right, add_key

COUNT = 12
LONG = 2000  # tokens of an answer: it takes seconds
REPLICA = "ServeReplica:beacon-memory:answering"  # begins the name of the processes that answer
_SECONDS = 120


class Served:
    """A store served by `beacon-memory serve --ray`; alice and bob have namespaces, bob may only read."""

    def __init__(self, folder: Path, address: str) -> None:
        base = tiny_base("llama", max_position_embeddings=4096)
        words = in_words(SimpleNamespace(model=SimpleNamespace(tokenizer=tiny_tokenizer())))  # type: ignore[arg-type]
        base.generation_config.suppress_tokens = words["suppress_tokens"]  # so that no answer ends by itself
        self.store, self.model = folder / "store", tiny_checkpoint(folder / "model", base)
        with BeaconMemory(self.store, self.model, namespace="alice", reserve=100) as memory:
            memory.add_many([(f"d{n}", f"Note {n} tells of the mill. " * 20) for n in range(COUNT)])
        self.keys = {
            name: add_key(folder / "keys.json", name, name, rights)
            for name, rights in {"alice": (Right.READ, Right.WRITE), "bob": (Right.READ,)}.items()
        }
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "beacon_memory", "serve", "--ray", address, "--replicas", "2"]
        self._command += ["--store", str(self.store), "--model", str(self.model), "--port", str(port)]
        self._command += ["--api-keys", str(folder / "keys.json"), "--max-running", "2"]
        self._log = folder / "log"
        self._process: subprocess.Popen[str] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start it, unless it runs."""
        if self._process is not None:
            return
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"listening on {self.url}\n", self._log.read_text()

    def stop(self) -> None:
        """Tell it to end, and wait for that."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        printed, _ = self._process.communicate(timeout=_SECONDS)
        assert (self._process.returncode, printed) == (0, ""), self._log.read_text()
        self._process = None

    def client(self, name: str = "alice") -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.keys[name]}"}, timeout=_SECONDS)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes(1, cores=3)
    yield nodes
    nodes.close()


@pytest.fixture(scope="module")
def command(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    command = Served(tmp_path_factory.mktemp("served"), nodes.address)
    yield command
    command.stop()


@pytest.fixture
def served(command: Served) -> Served:
    """The command, which runs: the last test ends it, and whichever comes behind that starts it anew."""
    command.start()
    return command


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with served.client() as http:
        yield http


def asking(*ids: str, tokens: int = 4, stream: bool = False) -> dict[str, Any]:
    question = {"messages": [{"role": "user", "content": "Who?"}], "document_ids": ids}
    return {"model": "beacon-memory", **question, "max_completion_tokens": tokens, "stream": stream}


def ask(http: httpx.Client, *ids: str, tokens: int = 4) -> httpx.Response:
    return http.post("/v1/chat/completions", json=asking(*ids, tokens=tokens)).raise_for_status()


def test_questions_on_the_same_documents_go_to_the_replica_that_has_them_ready(http: httpx.Client) -> None:
    sets = [(f"d{n}",) for n in range(COUNT)] + [("d1", "d2"), ("d3", "d4", "d5")]
    first = [ask(http, *ids) for ids in sets]
    again = [ask(http, *reversed(ids)) for ids in sets]
    replicas = [reply.headers["x-replica"] for reply in first]
    assert len({*replicas}) == 2
    assert [reply.headers["x-replica"] for reply in again] == replicas
    places = [one["place"] for reply in again for one in reply.json()["memory"]["documents"]]
    assert set(places) <= {"ram", "device"}


def test_what_is_stored_through_the_writer_is_answered_by_the_others(http: httpx.Client) -> None:
    job = ended_job(http, http.put("/v1/documents/new", json={"text": "The miller has bought a boat."}))
    assert job["status"] == "done", job
    assert ask(http, "new").json()["memory"]["document_ids"] == ["new"]
    with http.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
        assert "event: done" in [*events.iter_lines()]
    assert http.delete("/v1/documents/new").json()["deleted"]
    gone = http.post("/v1/chat/completions", json=asking("new"))
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "document_not_found")
    assert http.post("/v1/documents:search", json={"query": "mill"}).json()["data"]
    assert http.get("/ready").json() == {"status": "ready"}


def test_keys_and_namespaces_hold_on_every_replica(served: Served, http: httpx.Client) -> None:
    with served.client("bob") as bob, httpx.Client(base_url=served.url, timeout=_SECONDS) as nobody:
        for n in range(4):  # on both
            assert bob.post("/v1/chat/completions", json=asking(f"d{n}")).status_code == 404
            assert nobody.post("/v1/chat/completions", json=asking(f"d{n}")).status_code == 401
        assert bob.get("/v1/documents").json()["data"] == []
        assert bob.get("/v1/documents/d1").status_code == 404
        assert bob.put("/v1/documents/d1", json={"text": "Mine."}).status_code == 403
        assert bob.delete("/v1/documents/d1").status_code == 403
        assert nobody.get("/v1/documents/d1").status_code == 401
    assert len(http.get("/v1/documents", params={"prefix": "d"}).json()["data"]) == COUNT
    large = http.post("/v1/chat/completions", content=b" " * 33_000_000)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")


def test_an_answer_streams_and_a_full_replica_sends_the_next_question_on(http: httpx.Client) -> None:
    asked = asking("d1", tokens=LONG, stream=True)
    home = ask(http, "d1").headers["x-replica"]
    with (
        http.stream("POST", "/v1/chat/completions", json=asked) as first,
        http.stream("POST", "/v1/chat/completions", json=asked) as second,
    ):
        lines = first.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["object"] == "chat.completion.chunk"
        assert {first.headers["x-replica"], second.headers["x-replica"]} == {home}
        assert ask(http, "d1").headers["x-replica"] != home
        left = time.monotonic()
    until(lambda: ask(http, "d1").headers["x-replica"] == home)  # where their client's leaving has freed their places
    freed = time.monotonic() - left
    whole = ask(http, "d1", tokens=LONG).json()["memory"]["seconds"]
    assert freed < whole / 2


def test_questions_go_on_while_a_replica_is_killed(nodes: Nodes, served: Served) -> None:
    until(lambda: len(nodes.workers(REPLICA)) == 2)
    stop, statuses = threading.Event(), []

    def go_on(number: int) -> None:
        with served.client() as http:
            while not stop.is_set():
                reply = http.post("/v1/chat/completions", json=asking(f"d{number}", tokens=20))
                statuses.append(reply.status_code)

    with ThreadPoolExecutor(4) as threads:
        clients = [threads.submit(go_on, n) for n in range(4)]
        until(lambda: len(statuses) > 4)
        nodes.workers(REPLICA)[0].kill()
        killed = len(statuses)
        until(lambda: len(statuses) > killed + 20)
        stop.set()
    assert [one.result() for one in clients] == [None] * 4
    assert set(statuses) == {200}
    with served.client() as http:  # and Ray starts another one
        until(lambda: len({ask(http, f"d{n}").headers["x-replica"] for n in range(COUNT)}) == 2)


def test_a_command_that_is_told_to_end_lets_answers_end(served: Served, http: httpx.Client) -> None:
    with http.stream("POST", "/v1/chat/completions", json=asking("d2", tokens=LONG, stream=True)) as stream:
        lines = stream.iter_lines()
        chunks = [next(lines)]
        ending = threading.Thread(target=served.stop)
        ending.start()
        chunks += [line for line in lines if line]
        ending.join()
    assert not served.running
    assert chunks[-1] == "data: [DONE]"
    assert json.loads(chunks[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def key(body: bytes, authorization: str = "Bearer a") -> str:
    headers = [(b"authorization", authorization.encode())]
    return key_of(Request({"type": "http", "headers": headers}), body)


def test_what_routes_a_request_is_its_documents_and_its_caller() -> None:
    one = key(b'{"document_ids": ["a", "b"], "messages": []}')
    assert one == key(b'{"document_ids": ["b", "a", "b"]}')
    assert len({one, key(b'{"document_ids": ["a"]}'), key(b'{"document_ids": ["a", "b"]}', "Bearer b")}) == 3
    bodies = [b"", b"\xff", b"[]", b"{}", b'{"document_ids": []}', b'{"document_ids": [1, "a"]}', b"[" * 100_000]
    assert {key(body) for body in [*bodies, b'{"document_ids": null}']} == {""}


def test_a_cluster_serves_others_with_keys_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without keys"):
        app(Serving(store=str(tmp_path)))
    with pytest.raises(ConfigError, match="min_replicas=3"):
        app(Serving(store=str(tmp_path), host="127.0.0.1", min_replicas=3, gpus=0))


def test_the_applications_of_the_page_are_those_that_ray_and_the_server_take() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    files = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    described = [yaml.safe_load(one["spec"]["serveConfigV2"]) if "spec" in one else one for one in files]
    assert len(described) == 2
    for one in described:
        (application,) = ServeDeploySchema.model_validate(one).applications
        module, _, name = application.import_path.partition(":")
        assert (getattr(import_module(module), name), application.name) == (app, NAME)
        assert isinstance(call_user_app_builder_with_args_if_necessary(app, application.args), serve.Application)
