"""The tools as an agent meets them, through the package's own client in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from event_loop import awake_during
from mcp import Client
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory import BeaconMemory, Progress
from beacon_memory.config import BeaconConfig
from beacon_memory.mcp.server import mcp_server
from beacon_memory.modeling.model import BeaconModel

LEASE = "The lease of the mill ends on 3 May 2031. The rent is paid by the miller, Ada Flint."
OWLS = "Two barn owls nest above the hayloft. The well beside it is deep."


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    config = BeaconConfig(beacon_window=64)
    # of these weights a word comes out every few tokens
    return tiny_model("llama", config, tokenizer=tiny_tokenizer(), max_position_embeddings=4096, seed=7)


@pytest.fixture
def memory(model: BeaconModel, tmp_path: Path) -> Iterator[BeaconMemory]:
    with BeaconMemory(tmp_path / "store", model) as memory:
        yield memory


def connected(memory: BeaconMemory, **options: Any) -> Client:
    return Client(mcp_server(lambda: memory, **options))


async def call(client: Client, name: str, **arguments: Any) -> Any:
    """What a tool returns; fails with the text of an error."""
    result = await client.call_tool(name, arguments)
    assert not result.is_error, result.content
    assert result.structured_content is not None
    return result.structured_content


async def refused(client: Client, name: str, **arguments: Any) -> str:
    """Why a tool refuses a call."""
    result = await client.call_tool(name, arguments)
    assert result.is_error
    return str(result.content[0].text)  # type: ignore[union-attr]


async def test_every_tool_and_every_argument_is_described(memory: BeaconMemory) -> None:
    async with connected(memory) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert client.instructions is not None
    assert set(tools) == {"remember", "append", "search", "ask", "list", "forget"}
    for tool in tools.values():
        assert tool.title
        assert len(tool.description or "") > 100
        assert "\n    " not in (tool.description or "")
        assert tool.input_schema["properties"].keys().isdisjoint({"context", "self"})
        for name, argument in tool.input_schema["properties"].items():
            assert argument.get("description"), f"{tool.name} {name}"
        assert tool.output_schema is not None
        assert tool.annotations is not None
        assert tool.annotations.open_world_hint is False
    reading = {name for name, tool in tools.items() if tool.annotations and tool.annotations.read_only_hint}
    assert reading == {"search", "ask", "list"}
    assert tools["forget"].annotations is not None
    assert tools["forget"].annotations.destructive_hint is True


async def test_what_is_remembered_is_found_asked_and_forgotten(memory: BeaconMemory) -> None:
    async with connected(memory) as client:
        stored = await call(client, "remember", id="lease", text=LEASE, tags=["contract"], metadata={"year": 2031})
        assert (stored["id"], stored["status"], stored["evicted"]) == ("lease", "added", [])
        assert memory.store.text("lease") == LEASE
        assert (await call(client, "remember", id="lease", text=LEASE))["status"] == "unchanged"
        await call(client, "remember", id="owls", text=OWLS)

        (found, *_) = (await call(client, "search", query="who pays the rent"))["result"]
        assert (found["id"], found["text"]) == ("lease", LEASE[found["start"] : found["stop"]])
        assert (await call(client, "search", query="zeppelin"))["result"] == []
        assert (await call(client, "search", query="rent", ids=["owls"]))["result"] == []

        answered = await call(client, "ask", question="Who pays the rent?", ids=["lease"], max_tokens=8)
        expected = memory.ask("Who pays the rent?", ["lease"], max_new_tokens=8)
        assert (answered["answer"], answered["ids"]) == (expected.text, ["lease"])
        assert answered["supported"] is expected.supported
        assert "".join(sorted((one["text"] for one in answered["passages"]), key=LEASE.index)) == LEASE
        for passage in answered["passages"]:
            assert passage["text"] == LEASE[passage["start"] : passage["stop"]]
            assert 0 < passage["loaded"] <= 1

        assert (await call(client, "append", id="owls", text=" It ran dry in 2030."))["status"] == "appended"
        assert memory.store.text("owls") == f"{OWLS} It ran dry in 2030."

        assert await call(client, "forget", ids=["lease", "owls", "lease"]) == {"forgotten": ["lease", "owls"]}
        assert memory.list() == []


async def test_documents_are_listed_page_by_page(memory: BeaconMemory) -> None:
    memory.add_many([(f"note/{n}", f"Note {n}.") for n in range(5)])
    memory.store.update("note/3", tags=["odd"], metadata={"n": 3})
    async with connected(memory) as client:
        seen, after = [], ""
        while after is not None:
            page = await call(client, "list", prefix="note/", after=after, limit=2)
            seen += [row["id"] for row in page["documents"]]
            after = page["next"]
        assert seen == [f"note/{n}" for n in range(5)]
        (row,) = (await call(client, "list", tags=["odd"]))["documents"]
    assert (row["id"], row["tags"], row["metadata"]) == ("note/3", ["odd"], {"n": 3})


async def test_a_refusal_says_why_and_changes_nothing(memory: BeaconMemory) -> None:
    memory.add("lease", LEASE)
    async with connected(memory) as client:
        assert "no document 'leas' is stored; did you mean 'lease'?" in await refused(
            client, "ask", question="Who?", ids=["leas"]
        )
        assert "no document 'leas' is stored" in await refused(client, "search", query="rent", ids=["leas"])
        assert "no document 'well' is stored" in await refused(client, "append", id="well", text="Dry.")
        assert "no document 'well' is stored" in await refused(client, "forget", ids=["lease", "well"])
        assert "budget='all' must be a number of memory slots" in await refused(
            client, "ask", question="Who?", ids=["lease"], budget="all"
        )
        assert "the document is empty or blank" in await refused(client, "remember", id="blank", text=" \n")
        assert "id" in await refused(client, "remember", text="Without an id.")
        assert "less than or equal to 50" in await refused(client, "search", query="rent", limit=1000)
        assert "positions" in await refused(client, "ask", question="Who? " * 2000, ids=["lease"])
    assert [row.id for row in memory.list()] == ["lease"]


async def test_an_empty_memory_says_so(memory: BeaconMemory) -> None:
    async with connected(memory) as client:
        assert "no document is stored yet" in await refused(client, "ask", question="Who pays the rent?")
        assert (await call(client, "list")) == {"documents": [], "next": None}


async def test_an_error_that_nobody_expected_tells_the_agent_nothing_of_the_machine() -> None:
    def broken() -> BeaconMemory:
        raise OSError("/secret/path")

    async with Client(mcp_server(broken)) as client:
        assert "/secret/path" not in await refused(client, "list")


async def test_read_only_offers_nothing_that_changes(memory: BeaconMemory) -> None:
    memory.add("lease", LEASE)
    async with connected(memory, read_only=True) as client:
        assert {tool.name for tool in (await client.list_tools()).tools} == {"search", "ask", "list"}
        assert "forget" in await refused(client, "forget", ids=["lease"])
    assert "lease" in memory.store


async def test_a_namespace_sees_no_other(memory: BeaconMemory) -> None:
    memory.add("lease", LEASE)
    async with connected(memory.within("alice")) as client:
        assert (await call(client, "list"))["documents"] == []
        assert (await call(client, "search", query="rent"))["result"] == []
        await refused(client, "ask", question="Who pays?", ids=["lease"])
        await refused(client, "forget", ids=["lease"])
    assert "lease" in memory.store


async def test_progress_is_told_to_clients_that_ask_for_it(memory: BeaconMemory) -> None:
    told: list[tuple[float, float | None, str | None]] = []

    async def tell(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total, message))

    async with connected(memory) as client:
        await client.call_tool("remember", {"id": "lease", "text": LEASE * 20}, progress_callback=tell)
        assert told[-1][0] == told[-1][1] == memory.show("lease").tokens
        assert told[-1][2] == "reading"
        assert [done for done, *_ in told] == sorted(done for done, *_ in told)
        memory.add("short", LEASE)
        told.clear()
        answered = await client.call_tool(
            "ask", {"question": "Who pays?", "ids": ["short"], "max_tokens": 100}, progress_callback=tell
        )
    assert len(told) > 2
    assert told[0][2] == "answering"
    assert answered.structured_content is not None
    assert answered.structured_content["answer"].startswith(str(told[-1][2]))


async def test_the_event_loop_goes_on_while_documents_are_read(memory: BeaconMemory) -> None:
    async with connected(memory) as client:
        reading = client.call_tool("remember", {"id": "long", "text": LEASE * 200})
        assert await awake_during(reading) > 0.1


async def test_a_question_that_is_cancelled_is_not_answered_to_its_end(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.add("lease", LEASE)
    begun, closed, answered = threading.Event(), threading.Event(), threading.Event()
    whole = memory.stream

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        try:
            for piece in whole(*arguments, **options):
                begun.set()
                yield piece
            answered.set()
        finally:
            closed.set()

    monkeypatch.setattr(memory, "stream", watched)
    async with connected(memory) as client:
        asking = client.call_tool("ask", {"question": "Who pays?", "ids": ["lease"], "max_tokens": 2000})
        await cancelled(asking, begun)
        assert await asyncio.to_thread(closed.wait, 60)
    assert not answered.is_set()


async def test_a_document_whose_reading_is_cancelled_is_not_stored(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    whole = memory.add_many

    def watched(documents: Any, *, progress: Callable[[Progress], None]) -> Any:
        def told(one: Progress) -> None:
            begun.set()
            progress(one)

        return whole(documents, progress=told)

    monkeypatch.setattr(memory, "add_many", watched)
    async with connected(memory) as client:
        await cancelled(client.call_tool("remember", {"id": "long", "text": LEASE * 2000}), begun)
        assert (await call(client, "remember", id="short", text="Read next."))["status"] == "added"
    assert [row.id for row in memory.list()] == ["short"]


async def cancelled(work: Coroutine[Any, Any, object], begun: threading.Event) -> None:
    """Cancels a call once its work has begun."""
    task = asyncio.create_task(work)
    assert await asyncio.to_thread(begun.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
