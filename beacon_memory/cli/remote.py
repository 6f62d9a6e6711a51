"""The server that `ask` and `add` go through, if BEACON_MEMORY_URL names one, without a model of their own.

What stands for the memory there has those of its methods that these commands use.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from beacon_memory.documents import Document
from beacon_memory.errors import BeaconMemoryError, DocumentNotFoundError, InputError, ServerError
from beacon_memory.results import Added, Answer, Evidence, LoadedDocument, Progress, SourcePassage, Usage

if TYPE_CHECKING:
    import httpx
    import typer

__all__ = ["RemoteMemory", "RemoteRow", "named_server"]

_URL, _KEY = "BEACON_MEMORY_URL", "BEACON_MEMORY_API_KEY"
_OF_SERVER = ("store", "namespace", "model", "adapter", "device", "dtype", "score", "picker")  # options that it decides
_SECONDS = 600.0  # to wait for an answer: those before it may be long


def named_server(context: typer.Context) -> RemoteMemory | None:
    """Return the server that the environment names for a command; None if it names none.

    Raises InputError for options of the command that are for the server to decide.
    """
    url = os.environ.get(_URL)
    if not url:
        return None
    for name in _OF_SERVER:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"--{name} is decided by the server that {_URL} names, {url}; unset that, or leave it out")
    return RemoteMemory(url, os.environ.get(_KEY))


@dataclass(frozen=True, slots=True)
class RemoteRow:
    """A document of a server, as far as `add` looks at it."""

    id: str
    metadata: Mapping[str, object]


class RemoteMemory:
    """The memory behind a server."""

    def __init__(self, url: str, key: str | None) -> None:
        import httpx

        self._url = url.rstrip("/")
        headers = {} if not key else {"Authorization": f"Bearer {key}"}
        try:
            self._http = httpx.Client(
                base_url=self._url,
                headers=headers,
                timeout=httpx.Timeout(_SECONDS, connect=10),
                verify=not self._url.lower().startswith("http://"),  # else all certificates are read for nothing
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise InputError(f"{_URL}={url!r} is no URL: {error}") from error

    def __enter__(self) -> RemoteMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def text(self, id: str) -> str:
        """Return the text of a document."""
        return str(self._sent("GET", _path(id), params={"text": "true"})["text"])

    def ask(self, question: str, ids: Sequence[str] | None, **options: Any) -> Answer:
        """Answer a question, as `BeaconMemory.ask` does."""
        reply = self._sent("POST", "/v1/chat/completions", json=_body(question, ids, options))
        return _answer(reply["choices"][0]["message"]["content"] or "", reply["usage"], reply["memory"])

    def stream(self, question: str, ids: Sequence[str] | None, **options: Any) -> Iterator[str | Answer]:
        """Yield pieces of an answer, and the whole Answer last, as `BeaconMemory.stream` does."""
        body = _body(question, ids, options) | {"stream": True, "stream_options": {"include_usage": True}}
        text, memory, usage = "", None, None
        for _, chunk in self._events("POST", "/v1/chat/completions", json=body):
            if "error" in chunk:
                raise ServerError(str(chunk["error"]["message"]))
            memory, usage = chunk.get("memory") or memory, chunk.get("usage") or usage
            if piece := chunk["choices"][0]["delta"].get("content") if chunk["choices"] else "":
                text += piece
                yield str(piece)
        if memory is None or usage is None:
            raise ServerError(f"{self._url} ended the answer in the middle; ask again")
        yield _answer(text, usage, memory)

    def show(self, id: str) -> RemoteRow:
        """Return what is known of a document; raises DocumentNotFoundError."""
        found = self._sent("GET", _path(id))
        return RemoteRow(found["id"], found["metadata"])

    def add_many(
        self,
        documents: Iterable[Document],
        ratio: int | str,
        compression: str,
        precision: str,
        *,
        progress: Callable[[Progress], None],
        on_added: Callable[[Added], None],
        on_error: Callable[[Document, BeaconMemoryError], None],
    ) -> None:
        """Add documents, one after another, as `BeaconMemory.add_many` does; each is waited for."""
        how = {"ratio": ratio, "compression": compression, "precision": precision}
        read = 0
        for document in documents:
            label = {name: getattr(document, name) for name in ("metadata", "tags", "pinned", "expires_at")}
            given = {name: value for name, value in label.items() if value is not None}
            body = {"text": document.text, **how, **given}
            try:
                job = self._sent("PUT", _path(document.id), json=body)
                for _, latest in self._events("GET", f"/v1/jobs/{job['id']}/events"):
                    job = latest
                    if job["tokens"]:
                        progress(Progress(read + job["tokens_read"], read + job["tokens"]))
                if job["status"] != "done":
                    raise ServerError(job["error"]["message"] if job["error"] else f"the job was {job['status']}")
                added = Added(**{**job["result"], "ratios": tuple(job["result"]["ratios"])})
                read += added.tokens
                on_added(added)
            except BeaconMemoryError as error:
                on_error(document, error)

    def _sent(self, method: str, path: str, **what: Any) -> Any:
        """Send a request, and return what comes back; raises ServerError if it is refused."""
        with self._reached():
            reply = self._http.request(method, path, **what)
            self._require(reply)
            return reply.json()

    def _events(self, method: str, path: str, **what: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the server-sent events of a request: name and data of each."""
        with self._reached(), self._http.stream(method, path, **what) as reply:
            if reply.is_error:
                reply.read()
            self._require(reply)
            name = ""
            for line in reply.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: {"):
                    yield name, json.loads(line.removeprefix("data: "))

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(
                f"the server {self._url}, which {_URL} names, cannot be reached: {error}; start it with "
                "`beacon-memory serve`, or unset the variable"
            ) from error

    def _require(self, reply: httpx.Response) -> None:
        if not reply.is_error:
            return
        try:
            error = reply.json()["error"]
            code, message = str(error["code"]), str(error["message"])
        except (ValueError, KeyError, TypeError):
            raise ServerError(f"{self._url} is no server of this kind: it answers {reply.status_code}") from None
        if code == "document_not_found":
            raise DocumentNotFoundError(message)
        advice = f"; set {_KEY}" if code == "invalid_api_key" else ""
        raise ServerError(f"{message}{advice}")


def _path(id: str) -> str:
    return f"/v1/documents/{quote(id, safe='')}"


def _body(question: str, ids: Sequence[str] | None, options: Mapping[str, Any]) -> dict[str, Any]:
    renamed = ("max_new_tokens", "schema")
    given = {name: value for name, value in options.items() if value is not None and name not in renamed}
    if (schema := options.get("schema")) is not None:
        given["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return {
        "model": "beacon-memory",
        "messages": [{"role": "user", "content": question}],
        "document_ids": ids,
        "max_completion_tokens": options["max_new_tokens"],
        **given,
    }


def _answer(text: str, usage: Mapping[str, Any], memory: Mapping[str, Any]) -> Answer:
    """Return an answer as the library has it."""
    documents = tuple(LoadedDocument(**one) for one in memory["documents"])
    slots, evidence = memory["slots"], memory["evidence"]
    return Answer(
        text=text,
        parts=(text,),
        ids=tuple(memory["document_ids"]),
        usage=Usage(slots, usage["prompt_tokens"] - slots, usage["completion_tokens"], documents),
        time_to_first_token=memory["time_to_first_token"],
        seconds=memory["seconds"],
        sources=tuple(SourcePassage(**one) for one in memory["sources"]),
        evidence=None if evidence is None else Evidence(**evidence),
    )
