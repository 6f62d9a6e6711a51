"""Routes for jobs: how far a document is on its way into the store."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from beacon_memory.server.jobs import Job, JobStatus
from beacon_memory.server.service import Reader, Visit, Writer

__all__ = ["job_fields", "router"]

router = APIRouter(prefix="/v1/jobs", tags=["Jobs"])

_NO_NEWS = ": nothing new\n\n"  # a comment, so that nobody on the way takes the connection for dead


@router.get("", summary="List jobs")
def jobs(
    visit: Reader,
    status: Annotated[JobStatus | None, Query(description="Only those in this state.")] = None,
    document: Annotated[str | None, Query(description="Only those of this document.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """Return the jobs of the last day, the newest first."""
    found = visit.service.jobs.list(visit.caller.namespace, document=document, status=status, limit=limit)
    return {"object": "list", "data": [job_fields(visit, job) for job in found]}


@router.get("/{id}", summary="Show a job")
def job(visit: Reader, id: str) -> dict[str, Any]:
    """Return a job: its state, how many tokens are read, and in the end what became of it."""
    return job_fields(visit, visit.service.jobs.get(id, visit.caller.namespace))


@router.get("/{id}/events", summary="Watch a job", response_class=StreamingResponse)
async def events(visit: Reader, id: str) -> StreamingResponse:
    """Stream a job as server-sent events: one now, one whenever it has got on, and the last when it has ended.

    The event's name is the job's state, its data the job.
    """
    await run_in_threadpool(visit.service.jobs.get, id, visit.caller.namespace)  # 404 if there is none
    return StreamingResponse(_events(visit, id), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@router.delete("/{id}", summary="Cancel a job")
def cancel(visit: Writer, id: str) -> dict[str, Any]:
    """Cancel a job that waits or runs; one that has ended stays as it is. Returns it."""
    found = visit.service.jobs.get(id, visit.caller.namespace)
    if not found.status.ended:
        visit.service.compressing.cancel(found)
    return job_fields(visit, visit.service.jobs.get(id, visit.caller.namespace))


def job_fields(visit: Visit, job: Job) -> dict[str, Any]:
    """Return a job as clients see it."""
    progress = visit.service.compressing.progress(job)
    return {
        "id": job.id,
        "object": "job",
        "kind": job.kind,
        "document": job.document,
        "status": job.status,
        "tokens_read": 0 if progress is None else progress.tokens,
        "tokens": None if progress is None else progress.begun,
        "result": job.result,
        "error": job.error,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
    }


async def _events(visit: Visit, id: str) -> AsyncIterator[str]:
    async for told in visit.service.news.of(id):
        if not told:
            yield _NO_NEWS
            continue
        job = await run_in_threadpool(visit.service.jobs.get, id, visit.caller.namespace)
        fields = json.dumps(job_fields(visit, job), ensure_ascii=False)
        yield f"event: {job.status}\ndata: {fields}\n\n"
        if job.status.ended:
            return
