"""Many requests decoded together, each behind its own memory and with options of its own.

The numbers are those of `generate`: logits processors and stopping criteria of a request are the ones that it makes,
which it hands to a function that generates in its place (`custom_generate`). transformers' own continuous batching
keeps K/V in pages that have equally many entries in every head, and so cannot carry a memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from beacon_memory.errors import InputError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.prefix import Prefix
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.packed_cache import OwnKV, PackedCache
from beacon_memory.modeling.prefix_attention import PrefixBatch
from beacon_memory.storage.files.locks import renew_in_forks

from .generate import Generation, Request, finished, refusals, require_room
from .schema import SchemaProcessor
from .streaming import TextPieces

__all__ = ["DecodeLoop", "Ticket"]

_LINGER_SECONDS = 5.0  # that the thread waits for more: what computes would have to warm up in a new one
_MOST_READ = 512  # tokens of prompts that a step reads: so long the other requests wait for their next token


class Ticket:
    """A request in a `DecodeLoop`.

    Iterating over it, once, yields pieces of its text as they come, and the whole `Generation` last, or raises what
    went wrong with it; `async for` does the same. Who ends that early cancels the request.

    tokens: generated so far. likelihoods: of each, see `Generation`.
    """

    def __init__(self, loop: DecodeLoop, config: GenerationConfig) -> None:
        self._loop = loop
        self._config = config
        self.tokens: list[int] = []
        self.likelihoods: list[float] = []
        self._seen = 0  # of the tokens, those that were iterated over
        self._first = 0.0
        self._ended = False
        self._error: Exception | None = None
        self._wake: Callable[[], object] = lambda: None

    @property
    def done(self) -> bool:
        """Tell whether no more tokens will come."""
        return self._ended

    def cancel(self) -> None:
        """End the request with the tokens that it has; one that is done stays as it is."""
        self._loop.cancel(self)

    def result(self) -> Generation:
        """Wait for the end, and return all that was generated, or raise what went wrong."""
        self._loop.wait(lambda: self._ended)
        if self._error is not None:
            raise self._error
        text = finished(self._loop.model, self.tokens, self._config, self._first)
        return replace(text, likelihoods=tuple(self.likelihoods[: len(text.tokens)]))

    def __iter__(self) -> Generator[str | Generation]:
        try:
            for piece in self._pieces():
                if piece is None:
                    self._loop.wait(lambda: self._ended or self._seen < len(self.tokens))
                else:
                    yield piece
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncGenerator[str | Generation]:
        here, news = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
                here.call_soon_threadsafe(news.set)

        self._wake = wake
        try:
            self._loop.drive_in_background()
            for piece in self._pieces():
                if piece is None:
                    await news.wait()
                    news.clear()
                else:
                    yield piece
        finally:
            self._wake = lambda: None
            self.cancel()

    def _pieces(self) -> Iterator[str | Generation | None]:
        """Iterate over what is there; None says that more has to arrive first."""
        text = TextPieces(self._loop.model.tokenizer, self._config.stop_strings or [])
        while True:
            ended = self._ended  # asked first, for tokens come before the end
            while self._seen < len(self.tokens):
                self._seen += 1
                if piece := text.add(self.tokens[self._seen - 1]):
                    yield piece
            if ended:
                break
            yield None
        whole = self.result()
        if rest := text.rest():
            yield rest
        yield whole

    def _add(self, token: int, likelihood: float, *, end: bool) -> None:
        self._first = self._first or time.perf_counter()
        self.likelihoods.append(likelihood)
        self.tokens.append(token)
        self._ended = end
        self._wake()

    def _end(self, error: Exception | None = None) -> None:
        self._error, self._ended = error, True
        self._wake()


@dataclass(slots=True, eq=False)
class _Row:
    """A request that waits or is being decoded.

    ids:   [1, tokens], prompt and answer so far.
    room:  tokens that it may have in all.
    own:   K/V of those that were read.
    count: how many more the current step reads.
    """

    ticket: Ticket
    prefix: Prefix
    ids: Tensor
    room: int
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    sample: bool
    generator: torch.Generator | None
    own: OwnKV
    count: int = 0

    @property
    def unread(self) -> int:
        return self.ids.shape[1] - self.own.read

    def next(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ids with the next one [1, tokens + 1], its log probability [1], and whether it is the last [1].

        logits: [vocab]
        """
        raw = logits[None].to(torch.float32, copy=True)
        total = raw.logsumexp(-1)
        scores: Tensor = self.processors(self.ids, raw)  # type: ignore[arg-type]
        if self.sample:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
        else:
            token = scores.argmax(-1, keepdim=True)
        ids = torch.cat((self.ids, token), dim=1)
        likelihood = logits[token[0]].to(torch.float32) - total
        return (
            ids,
            likelihood,
            self.criteria(ids, None),
        )  # no criterion that `generate` makes of options asks for scores


class DecodeLoop:
    """A loop in which requests are decoded together; they join and leave between its steps.

    A step reads the next token of each request, and prompts of those that join. Whoever waits for a request drives the
    loop, for all that are in it: it needs no thread, unless an event loop waits. Threads may share it.

        loop = DecodeLoop(model)
        tickets = [loop.submit(request, config) for request, config in requests]
        texts = [ticket.result().text for ticket in tickets]

    max_rows:  requests that are decoded at a time; others wait until one has left.
    max_bytes: of the K/V of their prompts and answers; a request that alone needs more is decoded alone.

    Raises InputError for bounds below 1.
    """

    def __init__(self, model: BeaconModel, *, max_rows: int = 32, max_bytes: int = 1 << 30) -> None:
        if max_rows < 1 or max_bytes < 1:
            raise InputError(f"max_rows={max_rows} and max_bytes={max_bytes} must be at least 1")
        self.model = model
        self.max_rows = max_rows
        self._max_tokens = max_bytes // (2 * math.prod(model.kv_shape) * model.dtype.itemsize)
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._renew()
        renew_in_forks(self)

    def _renew(self) -> None:
        """Begin anew in a process that was forked from this one: its requests are decoded there."""
        self._changed = threading.Condition()
        self._driven = self._driven_in_background = False
        self._batch = PrefixBatch([])
        for row in (*self._waiting, *self._rows):
            row.ticket._end(InputError("this request belongs to the process that was forked; submit it anew"))
        self._waiting.clear()
        self._rows.clear()

    def submit(
        self,
        request: Request,
        config: GenerationConfig,
        *,
        seed: int | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> Ticket:
        """Let a request join as soon as there is room for it; returns at once.

        seed:   of sampling; the same seed samples the same, whatever else is decoded.
        schema: a JSON schema that the text meets, see `SchemaProcessor`.
        Raises CapacityError if the request does not fit the model's positions, and InputError for options that
        transformers refuses, for an empty prompt, and for beams and several sequences, which `generate` gives.
        """
        for name in ("num_beams", "num_return_sequences"):
            if (given := getattr(config, name) or 1) > 1:
                raise InputError(f"{name}={given}: answers that are decoded with others, or streamed, are one each")
        if not len(request.prompt):
            raise InputError("the prompt is empty; it needs at least one token")
        room = len(request.prompt) + (config.max_new_tokens or 0)
        require_room(self.model, request.memory.span, len(request.prompt), config.max_new_tokens or 0)
        memory, device = request.memory, self.model.device
        ids = torch.tensor([list(request.prompt)], device=device)
        with refusals():
            processors, criteria = _prepared(self.model, ids, config)
            if schema is not None:
                processors.insert(0, SchemaProcessor(self.model, schema, config, len(request.prompt)))
            generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        prefix = self.model.prefix(memory) if isinstance(memory, MemoryKV) else memory
        ticket = Ticket(self, config)
        layers, heads, head_dim = self.model.kv_shape
        own = OwnKV((layers, heads, room, head_dim), self.model.dtype, device)
        row = _Row(ticket, prefix, ids, room, processors, criteria, bool(config.do_sample), generator, own)
        with self._changed:
            self._waiting.append(row)
        return ticket

    def as_finished(self, tickets: Iterable[Ticket]) -> Iterator[Ticket]:
        """Yield tickets in the order in which they are done; they are taken only as far as there is room for them.

        Who ends that early cancels the others.
        """
        pending: list[Ticket] = []
        try:
            for ticket in tickets:
                pending.append(ticket)
                if len(pending) >= self.max_rows:
                    yield from self._finished(pending)
            while pending:
                yield from self._finished(pending)
        finally:
            for ticket in pending:
                ticket.cancel()

    def _finished(self, pending: list[Ticket]) -> list[Ticket]:
        """Wait until some tickets are done, and take them out."""
        self.wait(lambda: any(ticket.done for ticket in pending))
        done = [ticket for ticket in pending if ticket.done]
        pending[:] = [ticket for ticket in pending if ticket not in done]
        return done

    def cancel(self, ticket: Ticket) -> None:
        """End a request with the tokens that it has."""
        with self._changed:
            if not ticket.done:
                ticket._end()
                self._changed.notify_all()
            if not self._driven:
                self._leave()

    def wait(self, reached: Callable[[], bool]) -> None:
        """Drive the loop until something is reached, or wait while another thread does."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: reached() or not self._driven)
                if reached():
                    return
                self._driven = True
                self._leave()
                self._join()
            try:
                self._step()
            finally:
                with self._changed:
                    self._driven = False
                    self._leave()
                    self._changed.notify_all()

    def drive_in_background(self) -> None:
        """Drive the loop in a thread, if none does yet, until nothing has been left to do for some seconds."""
        with self._changed:
            self._changed.notify_all()
            if not self._driven_in_background:
                threading.Thread(target=self._drive, name="beacon-memory-decode", daemon=True).start()
                self._driven_in_background = True

    def _drive(self) -> None:
        while True:
            self.wait(self._is_idle)
            with self._changed:
                if not self._changed.wait_for(lambda: not self._is_idle(), _LINGER_SECONDS):
                    self._driven_in_background = False
                    return

    def _is_idle(self) -> bool:
        return not self._rows and not self._waiting

    def _leave(self) -> None:
        """Let go of requests that are done."""
        self._rows = [row for row in self._rows if not row.ticket.done]
        self._waiting = deque(row for row in self._waiting if not row.ticket.done)
        if not self._rows:
            self._batch = PrefixBatch([])

    def _join(self) -> None:
        """Let requests join that there is room for, in their order."""
        while self._waiting and len(self._rows) < self.max_rows:
            row = self._waiting[0]
            if self._rows and sum(one.room for one in self._rows) + row.room > self._max_tokens:
                break
            self._rows.append(self._waiting.popleft())
            for criterion in row.criteria:
                if isinstance(criterion, MaxTimeCriteria):
                    criterion.initial_timestamp = time.time()

    @torch.inference_mode()
    def _step(self) -> None:
        """Read the next tokens of all requests, and take what comes after them."""
        left = _MOST_READ
        for row in self._rows:
            row.count = min(row.unread, left) if row.unread > 1 else 1
            left -= row.count if row.unread > 1 else 0
        self._read(sorted((row for row in self._rows if row.count), key=lambda row: row.count > 1))

    def _read(self, rows: list[_Row]) -> None:
        """Read together; if that fails, each by itself, so that only those fail that have to."""
        try:
            logits = self._logits(rows) if rows else ()
        except Exception as error:  # noqa: BLE001  # raised again for who waits for it
            if len(rows) == 1:
                _fail(rows[0], error)
            else:
                for row in rows:
                    self._read([row])
        else:
            _take(rows, logits)

    def _logits(self, rows: list[_Row]) -> Tensor:
        """Return the logits behind the new tokens of each request, [requests, vocab]."""
        device, counts = self.model.device, [row.count for row in rows]
        prefixes = [row.prefix for row in rows]
        single = counts.count(1)
        if [*map(id, prefixes[:single])] != [*map(id, self._batch.prefixes)]:
            self._batch = PrefixBatch(prefixes[:single])
        cache = PackedCache([row.own for row in rows], counts, self._batch, prefixes[single:])
        spans = [(row.own.read, row.own.read + row.count) for row in rows]
        output = self.model.base(
            input_ids=torch.cat([row.ids[:, start:stop] for row, (start, stop) in zip(rows, spans, strict=True)], 1),
            position_ids=torch.cat([torch.arange(*span, device=device) for span in spans])[None],
            attention_mask=torch.empty(1, 1, 0, 0, device=device),  # four axes: taken as it is, no mask is built
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor([*accumulate(counts)], device=device) - 1,
        )
        logits: Tensor = output.logits[0]
        return logits


def _take(rows: Iterable[_Row], logits: Iterable[Tensor]) -> None:
    """Take what requests have read as read, and the tokens that come after it; logits: behind it [vocab] of each."""
    found: list[tuple[_Row, Tensor, Tensor, Tensor]] = []
    for row, scores in zip(rows, logits, strict=True):
        if row.count < row.unread:
            row.own.read += row.count
            continue
        try:
            with refusals():
                found.append((row, *row.next(scores)))
        except Exception as error:  # noqa: BLE001  # raised again for who waits for it
            _fail(row, error)
    if not found:
        return
    tokens = torch.cat([ids[0, -1:] for _, ids, *_ in found]).tolist()
    likelihoods = torch.cat([likelihood for _, _, likelihood, _ in found]).tolist()
    ends = torch.cat([end for *_, end in found]).tolist()
    for (row, ids, *_), token, likelihood, end in zip(found, tokens, likelihoods, ends, strict=True):
        row.own.read, row.ids = ids.shape[1] - 1, ids
        if not row.ticket.done:  # else it was cancelled meanwhile
            row.ticket._add(token, likelihood, end=end)


def _fail(row: _Row, error: Exception) -> None:
    if not row.ticket.done:
        row.ticket._end(error)


def _prepared(
    model: BeaconModel, ids: Tensor, config: GenerationConfig
) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
    """Return the processors and criteria with which `generate` would generate behind the prompt [1, tokens]."""

    def take(
        _model: object,
        _ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        **_: Any,
    ) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
        return logits_processor, stopping_criteria

    criteria, without = StoppingCriteriaList(), config
    if config.stop_strings:  # which need the tokenizer, and it is not handed on beside a function
        criteria.append(StopStringCriteria(model.tokenizer, config.stop_strings))
        without = copy.copy(config)
        without.stop_strings = None
    prepared: tuple[LogitsProcessorList, StoppingCriteriaList] = model.base.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=without,
        stopping_criteria=criteria,
        custom_generate=take,
    )
    return prepared
