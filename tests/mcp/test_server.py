"""The server as others reach it: who is let in, and what it costs before the first call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from served import served
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory import BeaconMemory, ConfigError
from beacon_memory.config import BeaconConfig
from beacon_memory.mcp.server import HTTP_PATH, http_app, mcp_server

CALL = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[BeaconMemory]:
    model = tiny_model(
        "llama", BeaconConfig(beacon_window=64), tokenizer=tiny_tokenizer(), max_position_embeddings=4096
    )
    with BeaconMemory(tmp_path / "store", model) as memory:
        yield memory


async def test_many_clients_share_a_memory_by_http(memory: BeaconMemory) -> None:
    with served(http_app(mcp_server(lambda: memory), "127.0.0.1", None)) as url:
        async with Client(url + HTTP_PATH) as one, Client(url + HTTP_PATH) as other:
            await one.call_tool("remember", {"id": "owls", "text": "Two barn owls nest above the hayloft."})
            found = await other.call_tool("search", {"query": "hayloft"})
            assert found.structured_content is not None
            assert [hit["id"] for hit in found.structured_content["result"]] == ["owls"]


async def test_only_who_knows_the_token_is_let_in(memory: BeaconMemory) -> None:
    with served(http_app(mcp_server(lambda: memory), "0.0.0.0", "open sesame")) as url:
        for header in ("", "open sesame", "Bearer", "Bearer wrong", "Bearer open sesam", "Basic open sesame"):
            answer = httpx2.post(url + HTTP_PATH, json=CALL, headers={"Authorization": header})
            assert answer.status_code == 401, header
            assert answer.headers["www-authenticate"] == "Bearer"
        assert httpx2.post(url + HTTP_PATH, json=CALL).status_code == 401
        known = httpx2.AsyncClient(headers={"Authorization": "Bearer open sesame"})
        async with known, Client(streamable_http_client(url + HTTP_PATH, http_client=known)) as client:
            assert len((await client.list_tools()).tools) == 6


def test_a_page_of_another_origin_is_refused(memory: BeaconMemory) -> None:
    with served(http_app(mcp_server(lambda: memory), "127.0.0.1", None)) as url:
        for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
            assert httpx2.post(url + HTTP_PATH, json=CALL, headers=headers).status_code in {403, 421}


def test_without_a_token_only_this_machine_is_served(memory: BeaconMemory) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.7", "memory.example"):
        with pytest.raises(ConfigError, match="give a token"):
            http_app(mcp_server(lambda: memory), host, None)
    with pytest.raises(ConfigError, match="the token is empty"):
        http_app(mcp_server(lambda: memory), "127.0.0.1", "")


def test_a_server_answers_before_the_model_is_imported() -> None:
    script = (
        "import sys; from beacon_memory.mcp.server import mcp_server; mcp_server(lambda: None); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
