"""Routes for answers: chats, completions and the model's name, as OpenAI has them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from beacon_memory.results import Answer
from beacon_memory.server.bodies import ChatBody, CompletionBody, ToolQuestion
from beacon_memory.server.leaving import while_connected
from beacon_memory.server.logs import LOGGER
from beacon_memory.server.refusals import INTERNAL, refusal_of
from beacon_memory.server.replies import ChatReply, CompletionReply, Reply
from beacon_memory.server.responses import ResponseReply, ResponsesBody
from beacon_memory.server.service import Reader, Visit

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["Answers"])

_CHAT = {
    "model": "beacon-memory",
    "messages": [{"role": "user", "content": "Who pays the rent?"}],
    "document_ids": ["lease"],
    "max_completion_tokens": 64,
}
_RESPONSE = {
    "model": "beacon-memory",
    "input": "Who pays the rent?",
    "document_ids": ["lease"],
    "max_output_tokens": 64,
}
_COMPLETION = {"model": "beacon-memory", "prompt": "Who pays the rent?", "document_ids": ["lease"], "max_tokens": 64}


def _example(example: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"content": {"application/json": {"example": example}}}}


@router.get("/models", summary="List the model")
def models(visit: Reader) -> dict[str, Any]:
    """Return the one model that there is, under the name that requests give."""
    return {"object": "list", "data": [_model(visit)]}


@router.get("/models/{name:path}", summary="Show the model")
def model(visit: Reader, name: str) -> dict[str, Any]:
    """Return the model of a name; 404 if there is no such one."""
    visit.service.require_model(name)
    return _model(visit)


@router.post("/chat/completions", summary="Answer a conversation", openapi_extra=_example(_CHAT))
async def chat(visit: Reader, request: Request, body: ChatBody) -> Response:
    """Answer a conversation from memories, whole or as a stream of server-sent events.

    Without `document_ids` the question finds its documents, `[]` means none. The fields beside OpenAI's are told below;
    the reply has `memory` beside OpenAI's fields: what was loaded, and what it took.
    """
    return await _reply(visit, request, body, ChatReply)


@router.post("/completions", summary="Answer a prompt", openapi_extra=_example(_COMPLETION))
async def completion(visit: Reader, request: Request, body: CompletionBody) -> Response:
    """Answer a prompt, which is asked as a user's turn, in the form of OpenAI's completions."""
    return await _reply(visit, request, body, CompletionReply)


@router.post("/responses", summary="Answer as OpenAI's Responses do", openapi_extra=_example(_RESPONSE))
async def response(visit: Reader, request: Request, body: ResponsesBody) -> Response:
    """Answer a text or a conversation in the form of OpenAI's Responses; none is kept, so `input` has all of its turns.

    The fields beside OpenAI's, and `memory` in the reply, are those of chats.
    """
    return await _reply(visit, request, body, partial(ResponseReply, body))


async def _reply(
    visit: Visit,
    request: Request,
    body: ChatBody | CompletionBody | ResponsesBody,
    kind: Callable[[str, ToolQuestion, Any], Reply],
) -> Response:
    service, memory = visit.service, visit.memory
    service.require_model(body.model)
    asked = body.asked(memory)
    reply = kind(service.model_name, asked, memory.model.tokenizer)
    pieces = service.answering.pieces(memory, asked.question)
    if not body.stream:
        answer = await while_connected(request, _last(pieces))
        return JSONResponse(reply.whole(answer))
    first = await while_connected(request, anext(pieces))  # whatever is wrong with the question comes as a status
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return StreamingResponse(
        _events(request, reply, first, pieces, include_usage=include_usage),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _last(pieces: AsyncGenerator[str | Answer, None]) -> Answer:
    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Answer):
                return piece
    raise AssertionError("an Answer comes last")


async def _events(
    request: Request,
    reply: Reply,
    first: str | Answer,
    pieces: AsyncGenerator[str | Answer, None],
    *,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Yield a reply as server-sent events; the answer is cancelled when nobody takes them any more."""

    async def all_pieces() -> AsyncIterator[str | Answer]:
        yield first
        async for piece in pieces:
            yield piece

    async with aclosing(pieces):
        try:
            async for chunk in reply.chunks(all_pieces(), include_usage=include_usage):
                yield reply.event(chunk)
        except Exception as error:  # noqa: BLE001  # the status is sent already, so it is told in the stream
            refusal = refusal_of(error)
            if refusal is INTERNAL:
                LOGGER.exception("a stream failed", extra={"fields": {"request_id": request.state.request_id}})
            yield f"data: {json.dumps(refusal.body)}\n\n"
        yield reply.last_event


def _model(visit: Visit) -> dict[str, Any]:
    return {"id": visit.service.model_name, "object": "model", "created": 0, "owned_by": "beacon-memory"}
