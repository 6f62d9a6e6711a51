"""Answers in pieces, as they come."""

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
    """Hands finished pieces of text to a queue."""

    def __init__(self, tokenizer: Any, queue: SimpleQueue[Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.queue = queue

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002  # the base class names it
        """Called by `generate` as soon as some words are certain."""
        self.queue.put(text)


def stream(
    model: BeaconModel, request: Request, config: GenerationConfig, *, seed: int | None = None
) -> Iterator[str | Generation]:
    """Generate one text: yields its pieces as they come, and the whole `Generation` last.

    Generation runs in a thread, which ends when the iterator is closed. Stop strings are not part of the pieces.
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
    """Text that may still turn out to be the beginning of a stop string is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.pending = ""
        self.done = False

    def add(self, piece: str) -> str:
        """The part that is certain of all text so far and not yet given out."""
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
        """What was held back and did not become a stop string."""
        rest, self.pending = self.pending, ""
        return rest
