"""Documents over HTTP: stored in the background, listed, found, labelled, grown and removed."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest
from file_samples import HTML, pdf, word
from langchain_samples import OWLS, ROOF, WELL
from servers import client, ended_job, put

from beacon_memory.formats.kinds import Format
from beacon_memory.server.run import RunningServer


@pytest.fixture
def own(fresh: RunningServer) -> httpx.Client:
    return client(fresh)


def test_stored_document_is_that_of_the_library(own: httpx.Client, fresh: RunningServer) -> None:
    job = put(own, "farm/barn%20%231", ROOF + WELL, tags=["b", "a"], metadata={"year": 1999}, pinned=True, ratio=4)
    row = fresh.service.memory.show("farm/barn #1")
    assert job["result"] == {**job["result"], "id": row.id, "status": "added", "slots": row.slots, "ratios": [4]}  # type: ignore[dict-item]
    shown = own.get("/v1/documents/farm%2Fbarn%20%231", params={"text": True}).json()
    assert (shown["id"], shown["text"], shown["tags"], shown["pinned"]) == (row.id, ROOF + WELL, ["a", "b"], True)
    assert not {"file", "root", "segments"} & shown.keys()
    assert put(own, "farm/barn%20%231", ROOF + WELL, ratio=4)["result"]["status"] == "unchanged"  # type: ignore[index]
    assert own.get("/v1/documents/farm/barn %231").json()["metadata"] == {"year": 1999}


@pytest.mark.parametrize("media", ["text/plain", "text/markdown; charset=utf-8"])
def test_text_is_stored_as_it_is_sent_with_a_label_in_the_query(own: httpx.Client, media: str) -> None:
    query = {"tag": ["x", "y"], "ratio": "4", "pinned": "true", "metadata": '{"a": 1}'}
    reply = own.put("/v1/documents/n.md", params=query, content=WELL.encode(), headers={"Content-Type": media})
    assert ended_job(own, reply)["status"] == "done"
    shown = own.get("/v1/documents/n.md", params={"text": True}).json()
    assert (shown["text"], shown["tags"], shown["ratios"], shown["pinned"]) == (WELL, ["x", "y"], [4], True)
    assert shown["metadata"] == {"a": 1}


@pytest.mark.parametrize(
    ("id", "media", "content", "said"),
    [
        ("a", "application/pdf", pdf("The well is deep."), "The well is deep."),
        ("a", Format.DOCX.media_types[0], word(), "| 2030 | 40 \u0142 |"),
        ("a", "text/html; charset=utf-8", HTML, "## Rent"),
        ("a.pdf", "application/octet-stream", pdf("The well is deep."), "The well is deep."),
    ],
    ids=["pdf", "docx", "html", "by the ending of the id"],
)
def test_files_are_read(own: httpx.Client, id: str, media: str, content: bytes, said: str) -> None:
    reply = own.put(f"/v1/documents/{id}", content=content, headers={"Content-Type": media})
    assert ended_job(own, reply)["status"] == "done"
    assert said in own.get(f"/v1/documents/{id}", params={"text": True}).json()["text"]


def test_the_end_of_the_id_tells_what_is_not_read(own: httpx.Client) -> None:
    reply = own.put("/v1/documents/a.png", content=b"\x89PNG")
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("media", "content", "status", "said"),
    [
        ("application/pdf", b"%PDF-1.7", 422, "no PDF file, or it is damaged"),
        ("application/msword", b"\xd0\xcf", 415, "application/msword"),
        ("image/png", b"\x89PNG", 415, "image/png"),
        ("text/plain", b"caf\xe9", 422, "byte 3"),
        ("text/plain", b" \n", 400, "empty or blank"),
        ("application/json", b"{", 400, "JSON"),
    ],
)
def test_upload_that_is_no_text_is_refused(
    http: httpx.Client, media: str, content: bytes, status: int, said: str
) -> None:
    reply = http.put("/v1/documents/new", content=content, headers={"Content-Type": media})
    assert (reply.status_code, said in reply.json()["error"]["message"]) == (status, True), reply.text
    assert http.get("/v1/documents/new").status_code == 404


@pytest.mark.parametrize(
    "fields",
    [
        {"text": ""},
        {"text": "a", "ratio": "strong"},
        {"text": "a", "ratio": -1},
        {"text": "a", "compression": "zip"},
        {"text": "a", "precision": "int3"},
        {"text": "a", "expires_at": "tomorrow"},
        {"text": "a", "tags": [""]},
        {"text": "a", "tag": ["x"]},
        {"text": "a", "metadata": [1]},
        {},
    ],
    ids=str,
)
def test_document_that_cannot_be_is_refused_at_once(http: httpx.Client, fields: dict[str, Any]) -> None:
    reply = http.put("/v1/documents/new", json=fields)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert http.get("/v1/jobs", params={"document": "new"}).json()["data"] == []


def test_list_has_filters_and_pages(own: httpx.Client) -> None:
    put(own, "a/1", OWLS, tags=["x"], metadata={"year": 1999})
    put(own, "a/2", WELL, tags=["x", "y"], metadata={"year": 2000})

    def ids(**query: Any) -> list[str]:
        return [one["id"] for one in own.get("/v1/documents", params=query).raise_for_status().json()["data"]]

    assert ids() == ["a/1", "a/2", "owls", "roof", "well"]
    assert ids(prefix="a/") == ids(tag="x") == ["a/1", "a/2"]
    assert ids(tag=["x", "y"]) == ids(metadata='{"year": 2000}') == ["a/2"]
    page = own.get("/v1/documents", params={"limit": 3}).json()
    assert (page["has_more"], page["last_id"]) == (True, "owls")
    assert ids(after=page["last_id"]) == ["roof", "well"]
    assert not own.get("/v1/documents", params={"after": "roof", "limit": 1}).json()["has_more"]
    assert own.get("/v1/documents", params={"metadata": "[1]"}).status_code == 400


def test_label_changes_only_what_is_given(own: httpx.Client) -> None:
    put(own, "roof", ROOF, tags=["x"], metadata={"year": 1999}, expires_at="2099-01-01T00:00:00+00:00", ratio=2)
    before = own.get("/v1/documents/roof").json()
    after = own.patch("/v1/documents/roof", json={"tags": ["y"], "expires_at": None}).json()
    assert (after["tags"], after["metadata"], after["expires_at"]) == (["y"], {"year": 1999}, None)
    assert after["slots"] == before["slots"]
    assert own.patch("/v1/documents/roof", json={}).status_code == 400
    assert own.patch("/v1/documents/roof", json={"text": "x"}).status_code == 400
    assert own.patch("/v1/documents/barn", json={"tags": []}).status_code == 404


def test_appended_text_is_found_and_an_idempotency_key_appends_it_once(own: httpx.Client) -> None:
    send = {"json": {"text": "A cat sleeps there, too."}, "headers": {"Idempotency-Key": "k1"}}
    first, again = (own.post("/v1/documents/owls", **send) for _ in range(2))  # type: ignore[arg-type]
    assert first.headers["location"] == again.headers["location"]
    assert (first.headers.get("idempotency-replayed"), again.headers["idempotency-replayed"]) == (None, "true")
    assert ended_job(own, again)["status"] == "done"
    assert own.get("/v1/documents/owls", params={"text": True}).json()["text"] == OWLS + "A cat sleeps there, too."
    other = own.post("/v1/documents/owls", json={"text": "No."}, headers={"Idempotency-Key": "k1"})
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert own.post("/v1/documents/barn", json={"text": "x"}).status_code == 404
    hits = own.post("/v1/documents:search", json={"query": "cat"}).json()["data"]
    assert [hit["document"] for hit in hits] == ["owls"]


def test_search_and_explain_tell_what_the_library_does(http: httpx.Client, server: RunningServer) -> None:
    (hit,) = http.post("/v1/documents:search", json={"query": "barn owls", "limit": 1}).json()["data"]
    assert hit["document"] == "owls"
    among = http.post("/v1/documents:search", json={"query": "the", "document_ids": ["well"]}).json()["data"]
    assert {hit["document"] for hit in among} == {"well"}
    told = http.post("/v1/documents:explain", json={"question": "Where do owls nest?", "budget": 20}).json()
    wanted = server.service.memory.explain("Where do owls nest?", budget=20)
    assert (told["ids"], told["slots"], len(told["passages"])) == (["owls"], wanted.slots, len(wanted.passages))
    assert http.post("/v1/documents:search", json={"query": "x", "limit": 0}).status_code == 400
    assert http.post("/v1/documents:explain", json={"question": "x", "document_ids": ["no"]}).status_code == 404


def test_removed_document_is_gone(own: httpx.Client) -> None:
    assert own.delete("/v1/documents/well").json() == {"id": "well", "object": "document.deleted", "deleted": True}
    assert own.get("/v1/documents/well").status_code == 404
    assert own.delete("/v1/documents/well").status_code == 404


def test_job_tells_its_progress_and_its_end_as_events(own: httpx.Client) -> None:
    reply = own.put("/v1/documents/long", json={"text": (ROOF + WELL + OWLS) * 30, "ratio": 2})
    events: list[tuple[str, dict[str, Any]]] = []
    with own.stream("GET", f"{reply.headers['location']}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                events.append((name, json.loads(line.removeprefix("data: "))))
    assert events[-1][0] == "done"
    assert all(name == job["status"] for name, job in events)
    read = [job["tokens_read"] for name, job in events if name == "running"]
    assert read == sorted(read)
    assert read[-1] > 0
    assert own.get("/v1/jobs/job_none/events").status_code == 404


def test_jobs_that_wait_are_cancelled_by_hand_or_when_their_document_is_removed(
    own: httpx.Client, fresh: RunningServer
) -> None:
    held = threading.Event()
    memory, busy = fresh.service.memory, fresh.service.compressing
    add_many = memory.add_many

    def slowly(*arguments: Any, **options: Any) -> Any:
        held.wait(30)
        return add_many(*arguments, **options)

    memory.add_many = slowly  # type: ignore[method-assign]
    try:
        first = own.put("/v1/documents/one", json={"text": ROOF})
        second, third = (own.put(f"/v1/documents/{id}", json={"text": WELL}) for id in ("two", "three"))
        assert own.delete(second.headers["location"]).json()["status"] == "cancelled"
        assert own.get("/v1/documents/three").json()["error"]["message"].startswith("'three' is not stored yet")
        assert own.delete("/v1/documents/three").json()["deleted"]
        assert own.get(third.headers["location"]).json()["status"] == "cancelled"
    finally:
        held.set()
    assert ended_job(own, first)["status"] == "done"
    assert busy.alive
    assert own.get("/v1/documents", params={"prefix": "t"}).json()["data"] == []
    listed = own.get("/v1/jobs", params={"status": "cancelled"}).json()["data"]
    assert [job["document"] for job in listed] == ["three", "two"]


def test_running_job_ends_after_its_pass_when_it_is_cancelled(own: httpx.Client) -> None:
    reply = own.put("/v1/documents/long", json={"text": (ROOF + WELL + OWLS) * 200, "ratio": 2})
    with own.stream("GET", f"{reply.headers['location']}/events") as stream:
        assert any('"tokens_read": ' in line and '"tokens_read": 0' not in line for line in stream.iter_lines())
    assert own.delete(reply.headers["location"]).json()["status"] == "cancelled"
    assert own.get("/v1/documents/long").status_code == 404
    assert put(own, "after", ROOF)["status"] == "done"


def test_job_that_fails_says_why_and_the_next_goes_on(own: httpx.Client, fresh: RunningServer) -> None:
    fresh.service.memory.store.configure(quota=1)
    job = ended_job(own, own.put("/v1/documents/new", json={"text": ROOF}))
    assert (job["status"], job["error"]["code"]) == ("failed", "quota_exceeded")  # type: ignore[index]
    fresh.service.memory.store.configure(quota=None)
    assert put(own, "new", ROOF)["status"] == "done"
