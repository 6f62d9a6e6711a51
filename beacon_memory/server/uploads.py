"""Uploads: what a request to store or append brings, be it JSON or a file as it is.

A file's label comes as query parameters: `?tag=contract&pinned=true`.
"""

from __future__ import annotations

from email.message import Message
from typing import Annotated, Any, Self, TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, model_validator
from starlette.datastructures import QueryParams

from beacon_memory.documents import KEEP, Keep, Label, choose_precision
from beacon_memory.errors import InputError
from beacon_memory.formats.reading import read_text

__all__ = ["AppendBody", "LabelBody", "PutBody", "read_append", "read_put"]

_METADATA: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, JsonValue])
_OF_QUERY = ("pinned", "expires_at", "ratio", "compression", "precision")


_Form = TypeVar("_Form", bound="_Body")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class LabelBody(_Body):
    """The parts of a document's label that are to be changed; `expires_at: null` takes an expiry back."""

    metadata: Annotated[dict[str, JsonValue] | None, Field(description="Replaces all that was there.")] = None
    tags: Annotated[list[str] | None, Field(description="Replaces all that were there.")] = None
    pinned: Annotated[bool | None, Field(description="Whether a quota must never evict the document.")] = None
    expires_at: Annotated[str | None, Field(description="When it ceases to be there: 2031-05-03T00:00:00+00:00.")] = (
        None
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        Label(self.metadata or {}, self.tags or (), self.pinned or False, self.expires_at)  # raises for what cannot be
        return self

    def changes(self) -> dict[str, Any]:
        """Return the arguments of `MemoryStore.update`; raises InputError if there are none."""
        given: dict[str, object | Keep] = {
            name: value if value is not None or name == "expires_at" else KEEP
            for name in self.model_fields_set
            for value in (getattr(self, name),)
        }
        if not {name for name, value in given.items() if value is not KEEP}:
            raise InputError("nothing is to be changed: give metadata, tags, pinned or expires_at")
        return given


class PutBody(LabelBody):
    """A document to store: its text, its label (what is left out stays as it was), and how it is compressed."""

    text: str
    ratio: Annotated[int | str | list[int], Field(description="Tokens per memory slot: 2, 4, 8, ...; or auto.")] = (
        "auto"
    )
    compression: Annotated[str, Field(description="beacon, select, hybrid, or auto.")] = "auto"
    precision: Annotated[str, Field(description="float32, bfloat16, float16, int8, int4, or auto.")] = "auto"

    @model_validator(mode="after")
    def _readable(self) -> Self:
        choose_precision(self.precision)
        _require_text(self.text)
        return self


class AppendBody(_Body):
    """A text that is put behind a document."""

    text: str
    ratio: Annotated[int | None, Field(description="Of new windows; by default that of the last one.")] = None

    @model_validator(mode="after")
    def _readable(self) -> Self:
        _require_text(self.text)
        return self


async def read_put(request: Request, id: str) -> PutBody:
    """Return the document that a request brings."""
    return await _read(request, PutBody, id)


async def read_append(request: Request, id: str) -> AppendBody:
    """Return what a request puts behind a document."""
    return await _read(request, AppendBody, id)


async def _read(request: Request, form: type[_Form], id: str) -> _Form:
    header = Message()
    header["content-type"] = request.headers.get("content-type", "application/octet-stream")
    media_type, data = header.get_content_type(), await request.body()
    if media_type == "application/json":
        return await run_in_threadpool(form.model_validate_json, data)  # which may be long
    label = _of_query(request.query_params, form)
    # a client that says nothing of the type, as curl -T, may tell it by the ending of the id
    text = await run_in_threadpool(read_text, data, name=id, media_type=header["content-type"])
    return form.model_validate({"text": text, **label})


def _of_query(query: QueryParams, form: type[_Body]) -> dict[str, Any]:
    """Return the fields of a body that stand in the query."""
    given: dict[str, Any] = {name: query[name] for name in _OF_QUERY if name in query and name in form.model_fields}
    if given.get("ratio", "").isdecimal():
        given["ratio"] = int(given["ratio"])
    if "tags" in form.model_fields and (tags := query.getlist("tag")):
        given["tags"] = tags
    if "metadata" in form.model_fields and "metadata" in query:
        given["metadata"] = _METADATA.validate_json(query["metadata"])
    return given


def _require_text(text: str) -> None:
    if not text.strip():
        raise InputError("the text is empty or blank: there is nothing to compress")
