from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from langchain_samples import babbling_model, filled_memory
from servers import client, running

from beacon_memory import BeaconMemory, BeaconModel
from beacon_memory.server.run import RunningServer


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    return babbling_model()


@pytest.fixture(scope="module")
def memory(model: BeaconModel, tmp_path_factory: pytest.TempPathFactory) -> BeaconMemory:
    """A memory of three documents, which a module shares."""
    return filled_memory(tmp_path_factory.mktemp("store"), model)


@pytest.fixture(scope="module")
def server(memory: BeaconMemory) -> Iterator[RunningServer]:
    """A server of this memory."""
    with running(memory) as server:
        yield server


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with client(server) as http:
        yield http


@pytest.fixture
def ai(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as ai:
        yield ai


@pytest.fixture
def fresh(model: BeaconModel, tmp_path: Path) -> Iterator[RunningServer]:
    """A server of a store of its own, with the three documents."""
    with running(filled_memory(tmp_path / "store", model)) as server:
        yield server
