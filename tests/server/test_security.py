"""Who is let in, and how far: keys, rights, namespaces, origins, and bodies that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_samples import OWLS, ROOF, filled_memory
from servers import client, put, running

from beacon_memory import BeaconModel
from beacon_memory.server.keys import Right, add_key, remove_key
from beacon_memory.server.run import RunningServer
from beacon_memory.server.settings import ServerSettings

WHO = [{"role": "user", "content": "Who?"}]
ASK = {"model": "beacon-memory", "messages": WHO, "max_tokens": 2}


@dataclass(frozen=True)
class Tenants:
    """A server with a document of Alice's and one of Bob's, and their keys."""

    server: RunningServer
    keys: Path
    alice: str
    bob: str
    reader: str
    admin: str

    def as_(self, key: str | None) -> httpx.Client:
        return client(self.server, key)

    def everything(self) -> object:
        """All documents of all namespaces, and all jobs."""
        service = self.server.service
        return (
            [service.memory_of(name).list() for name in ("", "alice", "bob")],
            [[job.id for job in service.jobs.list(name)] for name in ("", "alice", "bob")],
        )


@pytest.fixture(scope="module")
def tenants(model: BeaconModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("tenants")
    keys, both = folder / "keys.json", (Right.READ, Right.WRITE)
    alice, bob = (add_key(keys, name, name, both) for name in ("alice", "bob"))
    reader = add_key(keys, "reader", "alice", [Right.READ])
    admin = add_key(keys, "admin", "", [Right.ADMIN])
    settings = ServerSettings(host="127.0.0.1", keys=keys, most_body=100_000)
    with running(filled_memory(folder / "store", model), settings) as server:
        tenants = Tenants(server, keys, alice, bob, reader, admin)
        with tenants.as_(alice) as http:
            put(http, "diary", f"{ROOF} I hid the key under the blue stone.")
        with tenants.as_(bob) as http:
            put(http, "owls", OWLS)
        yield tenants


WRONG = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer none"},
    {"Authorization": "Bearer {alice}x"},
    {"Authorization": "Bearer {cut}"},
    {"Authorization": "Basic {alice}"},
    {"Authorization": "{alice}"},
    {"X-API-Key": "{alice}"},
    {"Authorization": "Bearer {hash}"},
    {"Cookie": "key={alice}"},
]


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_wrong_key_opens_nothing(tenants: Tenants, headers: dict[str, str]) -> None:
    before = tenants.everything()
    stored = json.loads(tenants.keys.read_text(encoding="utf-8"))["keys"][0]["sha256"]
    values = {"alice": tenants.alice, "cut": tenants.alice[:-1], "hash": stored}
    given = {name: value.format(**values).strip() for name, value in headers.items()}
    with tenants.as_(None) as http:
        http.headers.update(given)
        replies = [
            http.post("/v1/chat/completions", json=ASK),
            http.get("/v1/documents"),
            http.put("/v1/documents/diary", json={"text": "changed"}),
            http.put("/v1/documents/diary", content=b"{"),
            http.delete("/v1/documents/diary"),
            http.get("/metrics"),
            http.get("/v1/nothing"),
            http.get("/v1/documents/diary", params={"api_key": tenants.alice}),
        ]
    assert {reply.status_code for reply in replies} == {401}
    assert {reply.json()["error"]["code"] for reply in replies} == {"invalid_api_key"}
    assert all(reply.headers["www-authenticate"] == "Bearer" for reply in replies)
    assert tenants.everything() == before


CROSSED: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/v1/documents/diary", {}),
    ("GET", "/v1/documents/diary", {"headers": {"X-Namespace": "alice", "namespace": "alice"}}),
    ("GET", "/v1/documents/diary", {"params": {"namespace": "alice", "text": True}}),
    ("GET", "/v1/documents/alice/diary", {}),
    ("GET", "/v1/documents/..%2Falice%2Fdiary", {}),
    ("GET", "/v1/documents/%2Fdiary", {}),
    ("PATCH", "/v1/documents/diary", {"json": {"tags": ["mine"]}}),
    ("DELETE", "/v1/documents/diary", {}),
    ("POST", "/v1/documents/diary", {"json": {"text": "and Bob's"}}),
    ("POST", "/v1/chat/completions", {"json": {**ASK, "document_ids": ["diary"]}}),
    ("POST", "/v1/chat/completions", {"json": {**ASK, "document_ids": ["owls", "diary"], "stream": True}}),
    ("POST", "/v1/documents:explain", {"json": {"question": "key?", "document_ids": ["diary"]}}),
    ("GET", "/v1/jobs/{job}", {}),
    ("GET", "/v1/jobs/{job}/events", {}),
    ("DELETE", "/v1/jobs/{job}", {}),
]


@pytest.mark.parametrize(("method", "path", "what"), CROSSED, ids=str)
def test_what_is_in_another_namespace_is_not_there(
    tenants: Tenants, method: str, path: str, what: dict[str, Any]
) -> None:
    before = tenants.everything()
    (job,) = tenants.server.service.jobs.list("alice")
    with tenants.as_(tenants.bob) as http:
        reply = http.request(method, path.format(job=job.id), **what)
    assert reply.status_code == 404, reply.text
    assert "blue stone" not in reply.text
    assert tenants.everything() == before


@pytest.mark.parametrize("where", ["namespace", "user", "store"])
def test_no_field_of_a_body_leads_into_another_namespace(tenants: Tenants, where: str) -> None:
    with tenants.as_(tenants.bob) as http:
        asked = {**ASK, "messages": [{"role": "user", "content": "Where is the key hidden?"}], where: "alice"}
        reply = http.post("/v1/chat/completions", json=asked)
        assert reply.status_code == (400 if where == "namespace" else 200)
        assert reply.status_code == 400 or reply.json()["memory"]["document_ids"] == ["owls"]
        found = http.post("/v1/documents:search", json={"query": "key blue stone"}).json()["data"]
        assert found == []
        assert [one["id"] for one in http.get("/v1/documents").json()["data"]] == ["owls"]


def test_same_id_and_idempotency_key_in_two_namespaces_are_two(tenants: Tenants) -> None:
    texts = {tenants.alice: "Alice's note.", tenants.bob: "Bob's note."}
    for key, text in texts.items():
        with tenants.as_(key) as http:
            http.headers["Idempotency-Key"] = "same"
            put(http, "note", text)
    for key, text in texts.items():
        with tenants.as_(key) as http:
            assert http.get("/v1/documents/note", params={"text": True}).json()["text"] == text
            assert http.delete("/v1/documents/note").status_code == 200


def test_rights_bound_what_a_key_may_do(tenants: Tenants) -> None:
    before = tenants.everything()
    with tenants.as_(tenants.reader) as http:
        assert http.get("/v1/documents/diary").status_code == 200
        assert http.post("/v1/chat/completions", json=ASK).status_code == 200
        writes = [
            http.put("/v1/documents/diary", json={"text": "changed"}),
            http.post("/v1/documents/diary", json={"text": "more"}),
            http.patch("/v1/documents/diary", json={"tags": ["x"]}),
            http.delete("/v1/documents/diary"),
            http.delete("/v1/jobs/any"),
            http.get("/metrics"),
        ]
    assert {reply.status_code for reply in writes} == {403}
    assert tenants.everything() == before
    with tenants.as_(tenants.admin) as http:
        assert "beacon_memory_requests_total" in http.get("/metrics").text
        assert http.get("/v1/documents/roof").status_code == 200
        assert http.get("/v1/documents/diary").status_code == 404


def test_key_that_is_removed_is_refused_at_once_and_an_unreadable_file_lets_nobody_in(tenants: Tenants) -> None:
    key = add_key(tenants.keys, "guest", "alice", [Right.READ])
    with tenants.as_(key) as http:
        assert http.get("/v1/documents").status_code == 200
        remove_key(tenants.keys, "guest")
        assert http.get("/v1/documents").status_code == 401
    kept = tenants.keys.read_bytes()
    with tenants.as_(tenants.alice) as http:
        tenants.keys.write_bytes(b"{")
        reply = http.get("/v1/documents")
        assert (reply.status_code, str(tenants.keys) in reply.text) == (500, False)
        tenants.keys.write_bytes(kept)
        assert http.get("/v1/documents").status_code == 200


def test_who_watches_the_server_needs_no_key(tenants: Tenants) -> None:
    with tenants.as_(None) as http:
        assert [http.get(path).status_code for path in ("/health", "/ready", "/openapi.json")] == [200, 200, 200]


DEEP = b'{"model": "beacon-memory", "messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
ONE = b'{"role": "user", "content": "Who?"}'
BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"7",
    b"\xff\xfe",
    b'{"model": "beacon-memory"}',
    b'{"messages": [%s]}' % ONE,
    DEEP[:90_000],
    b'{"model": "beacon-memory", "messages": ' + b"[" * 9_000 + b"]" * 9_000 + b"}",
    b'{"model": 1, "messages": [%s]}' % ONE,
    b'{"model": null, "messages": [%s]}' % ONE,
    *(
        b'{"model": "beacon-memory", "messages": [%s], %s}' % (ONE, field)
        for field in (
            b'"max_tokens": 0',
            b'"max_tokens": -1',
            b'"max_tokens": 1.5',
            b'"max_tokens": "many"',
            b'"max_tokens": 1e400',
            b'"max_tokens": 99999999999999999999999',
            b'"temperature": NaN',
            b'"temperature": Infinity',
            b'"temperature": -1',
            b'"temperature": "hot"',
            b'"top_p": 0',
            b'"top_p": 2',
            b'"seed": 1e30',
            b'"seed": "a"',
            b'"stop": [""]',
            b'"stop": [1]',
            b'"stop": {"a": 1}',
            b'"stop": ["a","b","c","d","e","f","g","h","i","j","k","l","m","n","o","p","q"]',
            b'"stream": "perhaps"',
            b'"tools": [{}]',
            b'"tools": [{"type": "function", "function": {"name": ""}}]',
            b'"tool_choice": {"function": 1}',
            b'"tool_choice": "any tool"',
            b'"response_format": {"type": "xml"}',
            b'"response_format": {"type": "json_schema"}',
            b'"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}',
            b'"response_format": {"type": "json_object"}, "abstain": true',
            b'"n": 3',
            b'"logprobs": true',
            b'"document_ids": "roof"',
            b'"document_ids": [1]',
            b'"document_ids": [""]',
            b'"document_ids": ["\\ud800"]',
            b'"budget": -1',
            b'"budget": "lots"',
            b'"budget": [1]',
            b'"limit": 0',
            b'"limit": 1000000',
            b'"chat_template_kwargs": {"no_such": 1}',
            b'"unknown": 1',
        )
    ),
    *(
        b'{"model": "beacon-memory", "messages": [%s]}' % message
        for message in (
            b"{}",
            b'{"role": "king", "content": "x"}',
            b'{"role": "user", "content": 1}',
            b'{"role": "user", "content": "\\ud800"}',
            b'{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}',
            b'{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]}',
        )
    ),
]


def test_malformed_body_is_refused_and_changes_nothing(tenants: Tenants) -> None:
    assert len(BODIES) >= 50
    before = tenants.everything()
    folder = str(tenants.keys.parent)
    with tenants.as_(tenants.alice) as http:
        for body in BODIES:
            reply = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
            error = reply.json()["error"]
            assert reply.status_code in (400, 404), (body[:100], reply.text)
            assert {*error} == {"message", "type", "param", "code"}, body[:100]
            assert len(reply.text) < 3000
            assert not any(word in reply.text for word in (folder, "Traceback", ".py", os.sep + "lib")), reply.text
        assert http.post("/v1/chat/completions", json=ASK).status_code == 200
    assert tenants.everything() == before


def test_body_that_is_too_large_is_refused_before_it_is_read(tenants: Tenants) -> None:
    before = tenants.everything()

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 1000

    with tenants.as_(tenants.alice) as http:
        for content in (b"x" * 200_000, endless()):
            reply = http.put("/v1/documents/large", content=content, headers={"Content-Type": "text/plain"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert tenants.everything() == before


def test_pages_of_web_sites_may_not_call(server: RunningServer, http: httpx.Client) -> None:
    own = server.url
    for origin in ("https://example.org", "null", "http://localhost:1", f"{own}1"):
        reply = http.post("/v1/documents/roof", content=b"x", headers={"Origin": origin, "Content-Type": "text/plain"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in reply.headers
    assert http.get("/v1/documents", headers={"Origin": own}).status_code == 200
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "PUT"}
    assert "access-control-allow-origin" not in http.options("/v1/documents/roof", headers=asked).headers


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org", "", "localhost.example.org:80", "0.0.0.0"])
def test_name_of_a_web_site_that_leads_here_is_refused_without_keys(http: httpx.Client, host: str) -> None:
    reply = http.get("/v1/documents", headers={"Host": host})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host_not_allowed")


def test_allowed_web_site_may_call(model: BeaconModel, tmp_path: Path) -> None:
    settings = ServerSettings(origins=("https://example.org",))
    with running(filled_memory(tmp_path / "store", model), settings) as server, client(server) as http:
        reply = http.get("/v1/documents", headers={"Origin": "https://example.org"})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "https://example.org")
        asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "PUT"}
        assert http.options("/v1/documents/roof", headers=asked).status_code == 200
        assert http.get("/v1/documents", headers={"Origin": "https://example.com"}).status_code == 403
