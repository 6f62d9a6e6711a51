"""A server at its limit: many clients, some of which break off, beside documents that are being compressed."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from langchain_samples import OWLS, ROOF, WELL, filled_memory
from servers import running

from beacon_memory import BeaconModel
from beacon_memory.server.settings import ServerSettings

_CLIENTS = 24
_SECONDS = 8.0
_LENGTH = 12  # tokens of an answer


async def test_clients_at_the_limit_get_the_right_answer_or_are_told_to_come_back(
    model: BeaconModel, tmp_path: Path
) -> None:
    memory = filled_memory(tmp_path / "store", model)
    named = [["roof"], ["well"], ["owls"], ["owls", "roof"], []]
    wanted = [memory.ask("Who?", ids, max_new_tokens=_LENGTH).text for ids in named]
    statuses: Counter[int] = Counter()
    draw, until = random.Random(1), time.monotonic() + _SECONDS
    settings = ServerSettings(most_running=6, most_waiting=6)
    with running(memory, settings) as server:
        limits = httpx.Limits(max_connections=2 * _CLIENTS)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:

            async def ask() -> None:
                while time.monotonic() < until:
                    number = draw.randrange(len(named))
                    body: dict[str, Any] = {
                        "model": "beacon-memory",
                        "messages": [{"role": "user", "content": "Who?"}],
                        "document_ids": named[number],
                        "max_tokens": _LENGTH,
                    }
                    asking = asyncio.ensure_future(http.post("/v1/chat/completions", json=body))
                    if draw.random() < 0.25:  # breaks off
                        await asyncio.sleep(draw.random() / 10)
                        asking.cancel()
                        await asyncio.gather(asking, return_exceptions=True)
                        continue
                    reply = await asking
                    statuses[reply.status_code] += 1
                    if reply.status_code == 200:
                        assert reply.json()["choices"][0]["message"]["content"] == wanted[number]
                    else:
                        assert int(reply.headers["retry-after"]) >= 1
                        await asyncio.sleep(0.05)

            async def store() -> None:
                number = 0
                while time.monotonic() < until:
                    text = (ROOF, WELL, OWLS)[number % 3] * 20 + str(number)
                    reply = await http.put(f"/v1/documents/new-{number}", json={"text": text})
                    assert reply.status_code == 202
                    number += 1
                    await asyncio.sleep(0.3)

            await asyncio.gather(*(ask() for _ in range(_CLIENTS)), store())
            while any(not job.status.ended for job in server.service.jobs.list("", limit=1000)):
                await asyncio.sleep(0.05)
        answering = server.service.answering
        jobs = server.service.jobs.list("", limit=1000)
        assert {*statuses} == {200, 429}
        assert statuses[200] >= 10
        assert {job.status for job in jobs} == {"done"}
        assert (answering.running, answering.waiting) == (0, 0)
    assert memory.verify() == []
