"""A server at its limit for minutes: `beacon-memory bench serve --minutes 10`.

Clients ask, every fourth of their requests breaks off, and documents are compressed meanwhile. All is computed in
float32, in which an answer does not depend on those that are decoded beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
import psutil

from .measuring import QUESTION, Figure, random_text

__all__ = ["asked_body", "run"]

_BREAK_OFF = 0.25
_MOST_PATIENT = 5.0  # seconds until a client breaks off
_BETWEEN_DOCUMENTS = 5.0
_TOKENS = 500  # of each document
_SECONDS = 600.0  # to wait for an answer
_MIB = 1 << 20


@dataclass(slots=True)
class _Seen:
    """The sight of all clients: replies by status, those that broke off, errors, wrong answers, bytes of the server."""

    statuses: Counter[int] = field(default_factory=Counter)
    broken_off: int = 0
    errors: list[str] = field(default_factory=list)
    wrong: int = 0
    stored: int = 0
    resident: list[int] = field(default_factory=list)


def asked_body(id: str, new_tokens: int) -> dict[str, Any]:
    """Return the body of a question about a document."""
    return {
        "model": "beacon-memory",
        "messages": [{"role": "user", "content": QUESTION}],
        "document_ids": [id],
        "max_completion_tokens": new_tokens,
    }


def run(
    url: str, process: int, wanted: dict[str, str], *, clients: int, minutes: float, new_tokens: int
) -> Iterator[Figure]:
    """Keep a server at its limit; yields what went wrong, and how much its memory grew.

    process: id of the server's process. wanted: documents, and the answers of the library about them.
    """
    seen = asyncio.run(_soaked(url, process, wanted, clients, 60 * minutes, new_tokens))
    answered, refused = seen.statuses[200], seen.statuses[429]
    detail = f"{answered:,} answers, {refused:,} told to come back, {seen.broken_off:,} broken off, {minutes:g} minutes"
    if seen.errors:
        detail += f"; {seen.errors[0]}"
    yield Figure(f"{clients} clients: errors other than 429", len(seen.errors), "0", detail)
    yield Figure(f"{clients} clients: answers that are not the library's", seen.wrong, "0", f"of {answered:,}")
    quarter = max(1, len(seen.resident) // 4)
    before = statistics.median(seen.resident[quarter : 2 * quarter])
    after = statistics.median(seen.resident[-quarter:])
    detail = f"{after / _MIB:,.0f} / {before / _MIB:,.0f} MiB, last and second quarter; {seen.stored} documents stored"
    yield Figure(f"{clients} clients: growth of the server's memory", after / before, "at most 1.05", detail)


async def _soaked(
    url: str, process: int, wanted: dict[str, str], clients: int, seconds: float, new_tokens: int
) -> _Seen:
    seen, until = _Seen(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=2 * clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=_SECONDS, limits=limits) as http:
        asking = (_client(http, wanted, seen, until, new_tokens, number) for number in range(clients))
        await asyncio.gather(*asking, _documents(http, seen, until), _watched(process, seen, until))
        for status in ("queued", "running"):
            while (await http.get("/v1/jobs", params={"status": status})).json()["data"]:
                await asyncio.sleep(1)
        failed = (await http.get("/v1/jobs", params={"status": "failed"})).json()["data"]
        seen.errors += [f"the job of {job['document']} failed" for job in failed]
    return seen


async def _client(
    http: httpx.AsyncClient, wanted: dict[str, str], seen: _Seen, until: float, new_tokens: int, number: int
) -> None:
    draw, ids = random.Random(number), [*wanted]
    while time.monotonic() < until:
        id = draw.choice(ids)
        asking = asyncio.ensure_future(http.post("/v1/chat/completions", json=asked_body(id, new_tokens)))
        if draw.random() < _BREAK_OFF:
            await asyncio.wait({asking}, timeout=draw.uniform(0, _MOST_PATIENT))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            seen.broken_off += 1
            continue
        try:
            reply = await asking
        except httpx.HTTPError as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
            continue
        seen.statuses[reply.status_code] += 1
        if reply.status_code == 429:
            await asyncio.sleep(min(1.0, float(reply.headers["retry-after"])))
        elif reply.status_code == 200:
            seen.wrong += reply.json()["choices"][0]["message"]["content"] != wanted[id]
        else:
            seen.errors.append(f"{reply.status_code}: {reply.text[:200]}")


async def _documents(http: httpx.AsyncClient, seen: _Seen, until: float) -> None:
    for number in count():
        text = f"{number}: {random_text(_TOKENS)}"
        reply = await http.put(f"/v1/documents/beside-{number}", json={"text": text})
        seen.stored += reply.status_code == 202
        if reply.status_code not in (202, 429):
            seen.errors.append(f"{reply.status_code}: {reply.text[:200]}")
        if time.monotonic() + _BETWEEN_DOCUMENTS > until:
            return
        await asyncio.sleep(_BETWEEN_DOCUMENTS)


async def _watched(process: int, seen: _Seen, until: float) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # which the clients tell of
        server = psutil.Process(process)
        while time.monotonic() < until:
            seen.resident.append(server.memory_info().rss)
            await asyncio.sleep(1)
