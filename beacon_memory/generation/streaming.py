"""Answers in pieces, as soon as they are generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from transformers import GenerationConfig, TextStreamer

from beacon_memory.modeling.model import BeaconModel

from .generate import Generation, Request, generate

__all__ = ["stream"]


class _QueueStreamer(TextStreamer):
    """A streamer that puts finished pieces of text into a queue."""

    def __init__(self, tokenizer: Any, queue: SimpleQueue[Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.queue = queue

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002  # the base class names it
        """Put a piece of text into the queue; `generate` calls this as soon as some words are certain."""
        self.queue.put(text)


def stream(
    model: BeaconModel, request: Request, config: GenerationConfig, *, seed: int | None = None
) -> Iterator[str | Generation]:
    """Generate one text; yields its pieces as they come, and the whole `Generation` at the end.

    Generation runs in a thread of its own, which ends when the iterator is closed. Stop strings are left out.
    """
    queue: SimpleQueue[str | BaseException | list[list[Generation]]] = SimpleQueue()
    cancelled = Event()

    def work() -> None:
        try:
            streamer = _QueueStreamer(model.tokenizer, queue)
            queue.put(generate(model, [request], config, seed=seed, streamer=streamer, cancelled=cancelled))
        except BaseException as error:  # noqa: BLE001  # raised again in the consumer's thread
            queue.put(error)

    thread = Thread(target=work, name="beacon-memory-generate", daemon=True)
    thread.start()
    held = _HeldBack(config.stop_strings or [])
    try:
        while True:
            item = queue.get()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, list):
                if rest := held.rest():
                    yield rest
                yield item[0][0]
                return
            if piece := held.add(item):
                yield piece
    finally:
        cancelled.set()
        thread.join()


class _HeldBack:
    """The end of a streamed text that could still become a stop string, and so is not given out yet."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.pending = ""
        self.done = False

    def add(self, piece: str) -> str:
        """Add a piece, and return all text that cannot become part of a stop string any more."""
        if self.done:
            return ""
        self.pending += piece
        found = min((at for stop in self.stops if (at := self.pending.find(stop)) >= 0), default=None)
        if found is not None:
            self.done = True
            certain, self.pending = self.pending[:found], ""
            return certain
        held = max(
            (n for stop in self.stops for n in range(1, len(stop)) if self.pending.endswith(stop[:n])), default=0
        )
        certain, self.pending = self.pending[: len(self.pending) - held], self.pending[len(self.pending) - held :]
        return certain

    def rest(self) -> str:
        """Return the text that was held back to the end and did not become a stop string."""
        rest, self.pending = self.pending, ""
        return rest
