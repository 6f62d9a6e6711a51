"""A server as a process: killed, stopped, overloaded, left by its clients."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_samples import ROOF, WELL, filled_memory, in_words
from servers import ServerProcess, client, ended_job, put, running, until
from tiny_models import tiny_base, tiny_checkpoint

from beacon_memory import BeaconMemory, BeaconModel, ConflictError
from beacon_memory.server.run import RunningServer
from beacon_memory.server.settings import ServerSettings
from beacon_memory.storage.store import MemoryStore

ASK: dict[str, Any] = {"model": "beacon-memory", "messages": [{"role": "user", "content": "Who?"}]}
LONG = "".join(f"In year {year} the roof was mended by number {year * 7}. " for year in range(450))
WINDOW = 1024  # tokens: a pass is told before what it has read is written
_SECONDS = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny_base("llama", max_position_embeddings=4096)
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), base)


def test_upload_goes_on_after_a_kill_in_the_middle_of_it(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with ServerProcess(store, checkpoint) as server, client(server) as http:
        put(http, "first", ROOF)
        location = http.put("/v1/documents/long", json={"text": LONG, "tags": ["x"]}).headers["location"]
        behind = http.put("/v1/documents/behind", json={"text": WELL}).headers["location"]
        with http.stream("GET", f"{location}/events") as stream:  # until some of it is read, and written
            told = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
            assert any(job["status"] == "running" and job["tokens_read"] > 3 * WINDOW for job in told)
        server.kill()
    read = len([*store.glob("unfinished/*/*.safetensors")])
    assert read > 0
    with ServerProcess(store, checkpoint) as server, client(server) as http:
        for place in (location, behind):
            job: dict[str, Any] = {"status": "queued"}
            while job["status"] in ("queued", "running"):
                job = http.get(place).raise_for_status().json()
                time.sleep(0.02)
            assert job["status"] == "done", job
        shown = http.get("/v1/documents/long", params={"text": True}).json()
        assert (shown["text"], shown["tags"]) == (LONG, ["x"])
        assert [one["id"] for one in http.get("/v1/documents").json()["data"]] == ["behind", "first", "long"]
        reply = http.post("/v1/chat/completions", json={**ASK, "document_ids": ["long"], "max_tokens": 2})
        assert reply.status_code == 200
        assert server.terminate() == 0
    log = [json.loads(line) for line in server.log.read_text(encoding="utf-8").splitlines()]
    assert {"request", "job"} <= {line["message"] for line in log}
    assert not any("long" in str(line.get("route")) for line in log)


def test_server_that_is_told_to_end_lets_an_answer_end_and_keeps_its_jobs(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with ServerProcess(store, checkpoint) as server, client(server) as http:
        put(http, "roof", ROOF)
        asked = {**ASK, "document_ids": ["roof"], "max_tokens": 150, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=asked) as stream:
            lines = stream.iter_lines()
            next(lines)
            location = http.put("/v1/documents/long", json={"text": LONG}).headers["location"]
            status: list[int] = []
            ending = threading.Thread(target=lambda: status.append(server.terminate()))
            ending.start()
            assert [*lines][-2] == "data: [DONE]"
        ending.join(_SECONDS)
        assert status == [0]
    with ServerProcess(store, checkpoint) as server, client(server) as http:
        assert http.get(location).json()["status"] in ("queued", "running", "done")


def test_only_one_server_works_on_a_store(fresh: RunningServer) -> None:
    with pytest.raises(ConflictError, match="another server"):
        RunningServer(fresh.service.memory, ServerSettings(port=0))


@pytest.fixture
def narrow(model: BeaconModel, tmp_path: Path) -> Iterator[RunningServer]:
    """A server that answers two at a time, and lets one wait."""
    with running(filled_memory(tmp_path / "store", model), ServerSettings(most_running=2, most_waiting=1)) as server:
        yield server


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch, narrow: RunningServer) -> dict[str, Any]:
    """A question whose answer takes long: the model must write words and may not end."""
    memory, words = narrow.service.memory, in_words(narrow.service.memory)
    astream = memory.astream

    def in_those(question: Any, *rest: Any) -> Any:
        question.options.update(words)
        return astream(question, *rest)

    monkeypatch.setattr(memory, "astream", in_those)
    return {**ASK, "document_ids": ["roof"], "max_tokens": 3000}


def test_overload_is_told_and_disturbs_nobody(narrow: RunningServer, endless: dict[str, Any]) -> None:
    answering = narrow.service.answering
    short = {**endless, "max_tokens": 400}
    with client(narrow) as http, ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(http.post, "/v1/chat/completions", json=short) for _ in range(3)]
        until(lambda: (answering.running, answering.waiting) == (2, 1))
        refused = http.post("/v1/chat/completions", json=short)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert http.get("/v1/documents").status_code == 200
        texts = [one.result().json()["choices"][0]["message"]["content"] for one in asked]
    assert len({*texts}) == 1
    assert len(texts[0]) > 300
    assert (answering.running, answering.waiting) == (0, 0)


def test_who_waits_too_long_is_refused(model: BeaconModel, tmp_path: Path) -> None:
    settings = ServerSettings(most_running=1, most_wait=0.05)
    with running(filled_memory(tmp_path / "store", model), settings) as server, client(server) as http:
        answering = server.service.answering
        held = answering._places
        held._value = 0  # as if an answer took long
        refused = http.post("/v1/chat/completions", json=ASK)
        assert (refused.status_code, "no place came free" in refused.text) == (429, True)
        held._value = 1
        assert http.post("/v1/chat/completions", json={**ASK, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_away_frees_its_place(narrow: RunningServer, endless: dict[str, Any], stream: bool) -> None:
    answering, loop = narrow.service.answering, narrow.service.memory._loop
    with client(narrow) as http:
        if stream:
            with http.stream("POST", "/v1/chat/completions", json={**endless, "stream": True}) as reply:
                lines = reply.iter_lines()  # kept, for httpx closes the connection when nobody has it any more
                assert next(lines).startswith("data: ")
                assert answering.running == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/chat/completions", json=endless, timeout=0.5)
        until(lambda: answering.running == 0)
        until(lambda: not loop._rows)
    with client(narrow) as http:
        assert http.post("/v1/chat/completions", json={**endless, "max_tokens": 2}).status_code == 200


def test_client_that_goes_away_while_it_waits_leaves_the_queue(narrow: RunningServer, endless: dict[str, Any]) -> None:
    answering = narrow.service.answering
    with client(narrow) as http, ThreadPoolExecutor(2) as threads:
        asked = {**endless, "max_tokens": 1500}
        busy = [threads.submit(http.post, "/v1/chat/completions", json=asked) for _ in range(2)]
        until(lambda: answering.running == 2)
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=asked, timeout=0.3)
        until(lambda: answering.waiting == 0)
        assert [one.result().status_code for one in busy] == [200, 200]


def test_answers_come_while_a_document_is_compressed(fresh: RunningServer) -> None:
    with client(fresh) as http:
        reply = http.put("/v1/documents/long", json={"text": LONG[:4000]})
        seconds = []
        while http.get(reply.headers["location"]).json()["status"] != "done":
            started = time.perf_counter()
            asked = http.post("/v1/chat/completions", json={**ASK, "document_ids": ["roof"], "max_tokens": 4})
            assert asked.status_code == 200
            seconds.append(time.perf_counter() - started)
        whole = fresh.service.jobs.get(reply.headers["location"].rpartition("/")[2], "")
    assert len(seconds) >= 3, "the compression must take longer than some answers"
    assert whole.ended_at is not None


def test_same_document_is_read_from_its_file_once(fresh: RunningServer) -> None:
    with client(fresh) as http:
        asked = {**ASK, "document_ids": ["roof"], "max_tokens": 2}
        replies = [http.post("/v1/chat/completions", json=asked).json() for _ in range(3)]
        places = [reply["memory"]["documents"][0]["place"] for reply in replies]
        assert (places[0], {*places[1:]} <= {"ram", "device"}) == ("cold", True)
        page = http.get("/metrics").text
    assert 'beacon_memory_loaded_documents_total{place="cold"} 1.0' in page
    assert "beacon_memory_store_documents 3.0" in page
    assert "beacon_memory_first_token_seconds_count 3.0" in page


def test_metrics_tell_what_object_storage_had_to_send(model: BeaconModel, tmp_path: Path) -> None:
    store, asked = MemoryStore(tmp_path / "store", files=(tmp_path / "bucket").as_uri()), {**ASK, "max_tokens": 2}
    BeaconMemory(store, model, reserve=100).add("roof", ROOF, ratio=2)
    shutil.rmtree(tmp_path / "store" / "cache")
    with running(BeaconMemory(store, model, reserve=100)) as server, client(server) as http:
        for _ in range(3):
            http.post("/v1/chat/completions", json={**asked, "document_ids": ["roof"]}).raise_for_status()
        page = http.get("/metrics").text
    assert 'beacon_memory_loaded_documents_total{place="remote"} 1.0' in page
    assert 'beacon_memory_loaded_documents_total{place="ram"} 2.0' in page


def test_failure_inside_is_told_without_its_cause(
    fresh: RunningServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error", str(tmp_path / "kv"))

    monkeypatch.setattr(fresh.service.memory, "_asked", broken)
    monkeypatch.setattr(fresh.service.memory.store, "list", broken)
    with client(fresh) as http:
        http.headers["X-Request-Id"] = "mine-1"
        replies = [
            http.post("/v1/chat/completions", json=ASK),
            http.post("/v1/chat/completions", json={**ASK, "stream": True}),
            http.get("/v1/documents"),
        ]
    for reply in replies:
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
        assert str(tmp_path) not in reply.text
        assert reply.headers["x-request-id"] == "mine-1"


def test_failure_in_the_middle_of_a_stream_is_told_in_it(
    fresh: RunningServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory = fresh.service.memory

    async def broken(*_: Any) -> Any:
        yield "The"
        raise OSError(5, "Input/output error", str(tmp_path / "kv"))

    monkeypatch.setattr(memory, "astream", broken)
    with client(fresh) as http:
        reply = http.post("/v1/chat/completions", json={**ASK, "stream": True})
    *_, error, done = [line for line in reply.text.splitlines() if line]
    assert (reply.status_code, done) == (200, "data: [DONE]")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert str(tmp_path) not in reply.text
    assert fresh.service.answering.running == 0


def test_append_is_not_repeated_where_the_server_died_right_behind_it(fresh: RunningServer) -> None:
    service = fresh.service
    with client(fresh) as http:
        job = ended_job(http, http.post("/v1/documents/owls", json={"text": " A cat, too."}))
        text = service.memory.store.text("owls")
        with service.jobs._database.transaction() as db:  # as a kill before the job's end was written leaves it
            db.execute(
                "UPDATE jobs SET status = 'queued', work = ?, ended_at = NULL, result = NULL WHERE id = ?",
                [json.dumps({"text": " A cat, too.", "ratio": None}), job["id"]],
            )
        service.compressing.wake()
        until(lambda: service.jobs.get(str(job["id"]), "").status.ended)
    assert service.jobs.get(str(job["id"]), "").result is not None
    assert service.memory.store.text("owls") == text
