"""Routes for documents: stored, found, labelled, removed, and what a question would load of them.

An id is any text, slashes included, so what is done to all documents stands behind a colon: `/v1/documents:search`.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from beacon_memory.documents import check_id
from beacon_memory.errors import DocumentNotFoundError
from beacon_memory.formats.kinds import Format
from beacon_memory.memory import BeaconMemory
from beacon_memory.server.bodies import MemoryOptions
from beacon_memory.server.jobs import JobKind
from beacon_memory.server.leaving import while_connected
from beacon_memory.server.service import Reader, Visit, Writer
from beacon_memory.server.uploads import AppendBody, LabelBody, PutBody, read_append, read_put
from beacon_memory.storage.catalog.rows import DocumentRow

from .jobs import job_fields

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["Documents"])

IdempotencyKey = Annotated[
    str | None,
    Header(max_length=255, description="Any text of your own: the same request with the same key is done once."),
]
_HIDDEN = ("file", "segments", "method", "root", "used_at")  # of a row: names of files, and what only the store needs
_FILTER: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, str | int | float | bool | None])


class SearchBody(BaseModel):
    """A search for passages."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"query": "rent of the mill", "limit": 5}})

    query: str
    limit: Annotated[int, Field(ge=1, le=1000)] = 10
    document_ids: Annotated[list[str] | None, Field(description="Only passages of these documents.")] = None


class ExplainBody(MemoryOptions):
    """A question, to be told what it would load."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"example": {"question": "Who pays the rent?", "budget": "x8"}}
    )

    question: str


def _upload(form: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """Describe a body that may be JSON or a file."""
    schema = form.model_json_schema(ref_template="#/components/schemas/{model}")
    text, binary = ({"schema": {"type": "string"} | more} for more in ({}, {"format": "binary"}))
    texts = dict.fromkeys(("text/plain", "text/markdown", "text/html"), text)
    packed = {one.media_types[0]: binary for one in (Format.PDF, Format.DOCX)}
    content = {"application/json": {"schema": schema, "example": example}, **texts, **packed}
    return {"requestBody": {"required": True, "content": content}}


@router.get("/documents", summary="List documents")
def documents(
    visit: Reader,
    prefix: Annotated[str, Query(description="Only ids that begin with this.")] = "",
    tag: Annotated[list[str] | None, Query(description="Only with this tag; repeated, with all of them.")] = None,
    metadata: Annotated[
        str | None, Query(description='Only with these values: a JSON object, {"tenant": "Ada"}.', max_length=10_000)
    ] = None,
    after: Annotated[str, Query(description="Only ids behind this one: `last_id` of the page before.")] = "",
    limit: Annotated[int, Query(ge=1, le=1000, description="Most documents of a page.")] = 100,
) -> dict[str, Any]:
    """Return documents in the order of their ids, a page at a time."""
    wanted = None if metadata is None else _FILTER.validate_json(metadata)
    rows = visit.memory.list(prefix=prefix, tags=tag or (), metadata=wanted, after=after, limit=limit + 1)
    page = rows[:limit]
    return {
        "object": "list",
        "data": [_document_fields(row) for row in page],
        "has_more": len(rows) > limit,
        "last_id": page[-1].id if page else None,
    }


@router.post("/documents:search", summary="Search passages")
def search(visit: Reader, body: SearchBody) -> dict[str, Any]:
    """Return the passages that share words with a query, best first; a higher score is better."""
    hits = visit.memory.store.search(body.query, body.limit, documents=body.document_ids)
    return {"object": "list", "data": [asdict(hit) for hit in hits]}


@router.post("/documents:explain", summary="Explain what a question loads")
async def explain(visit: Reader, request: Request, body: ExplainBody) -> JSONResponse:
    """Tell what an answer would load, passage by passage and word by word; nothing is answered."""
    work = partial(visit.memory.explain, body.question, body.document_ids, budget=body.budget, limit=body.limit)
    return JSONResponse(asdict(await while_connected(request, visit.service.answering.run(work))))


@router.put(
    "/documents/{id:path}",
    status_code=202,
    summary="Store a document",
    openapi_extra=_upload(PutBody, {"text": "The lease of the mill ends on 3 May 2031.", "tags": ["contract"]}),
)
async def put(visit: Writer, request: Request, id: str, idempotency_key: IdempotencyKey = None) -> JSONResponse:
    """Store a document, or replace the one of this id: it is compressed in the background.

    Returns 202 as soon as the text is on disk, with the job that goes on with it, whatever happens to the server. A
    text that is stored already in the same way is left as it is. The body is JSON, or a file (text, Markdown, HTML,
    PDF, docx) with the label as query parameters: `?tag=contract&tag=2031&pinned=true&metadata={...}`.
    """
    check_id(id)
    body = await read_put(request, id)
    _check_how(visit.memory, body)
    work = body.model_dump()
    return await run_in_threadpool(_begin, visit, JobKind.PUT, id, work, idempotency_key)


@router.post(
    "/documents/{id:path}",
    status_code=202,
    summary="Append to a document",
    openapi_extra=_upload(AppendBody, {"text": "In 2030 the rent was raised."}),
)
async def append(visit: Writer, request: Request, id: str, idempotency_key: IdempotencyKey = None) -> JSONResponse:
    """Put a text behind a document: only the new text is read, in the background.

    An append that is sent twice is done twice, unless both have the same Idempotency-Key.
    """
    check_id(id)
    body = await read_append(request, id)
    if body.ratio is not None:
        visit.memory.model.config.require_ratio(body.ratio)
    return await run_in_threadpool(_append, visit, id, body.model_dump(), idempotency_key)


@router.get("/documents/{id:path}", summary="Show a document")
def document(
    visit: Reader, id: str, text: Annotated[bool, Query(description="Whether to return its text, too.")] = False
) -> dict[str, Any]:
    """Return what is known of a document, with its jobs that have not ended; 404 while it is not stored yet."""
    jobs = [job_fields(visit, job) for job in visit.service.jobs.unfinished(visit.caller.namespace, check_id(id))]
    try:
        row = visit.memory.show(id)
    except DocumentNotFoundError as error:
        if jobs:
            raise DocumentNotFoundError(f"{id!r} is not stored yet: see the job {jobs[-1]['id']}") from error
        raise
    fields = _document_fields(row) | {"jobs": jobs}
    return fields | {"text": visit.memory.store.text(id)} if text else fields


@router.patch("/documents/{id:path}", summary="Label a document")
def label(visit: Writer, id: str, body: LabelBody) -> dict[str, Any]:
    """Change the parts of a document's label that are given; metadata change as a whole."""
    return _document_fields(visit.memory.store.update(check_id(id), **body.changes()))


@router.delete("/documents/{id:path}", summary="Remove a document")
def remove(visit: Writer, id: str) -> dict[str, Any]:
    """Forget a document, and cancel its jobs; 404 if there is neither."""
    unfinished = visit.service.jobs.unfinished(visit.caller.namespace, check_id(id))
    cancelled = [visit.service.compressing.cancel(job) for job in reversed(unfinished)]
    try:
        visit.memory.remove(id)
    except DocumentNotFoundError:
        if not any(cancelled):
            raise
    return {"id": id, "object": "document.deleted", "deleted": True}


def _check_how(memory: BeaconMemory, body: PutBody) -> None:
    """Raise ConfigError at once for what would fail only when the document's turn comes."""
    memory.compressor.compression(body.compression)
    for ratio in body.ratio if isinstance(body.ratio, list) else [body.ratio]:
        if isinstance(ratio, int):
            memory.model.config.require_ratio(ratio)
        else:
            memory.compressor.ratios(1, ratio)


def _append(visit: Visit, id: str, work: dict[str, Any], idempotency_key: str | None) -> JSONResponse:
    """Add the job of an append; raises DocumentNotFoundError if there is no document, and none on its way."""
    if id not in visit.memory.store and not visit.service.jobs.unfinished(visit.caller.namespace, id):
        visit.memory.show(id)
    return _begin(visit, JobKind.APPEND, id, work, idempotency_key)


def _begin(visit: Visit, kind: JobKind, id: str, work: dict[str, Any], idempotency_key: str | None) -> JSONResponse:
    job, new = visit.service.jobs.add(visit.caller.namespace, kind, id, work, idempotency_key)
    if new:
        visit.service.compressing.wake()
    headers = {"Location": f"/v1/jobs/{job.id}"} | ({} if new else {"Idempotency-Replayed": "true"})
    return JSONResponse(job_fields(visit, job), 202, headers)


def _document_fields(row: DocumentRow) -> dict[str, Any]:
    return {"object": "document", **{name: one for name, one in asdict(row).items() if name not in _HIDDEN}}
