"""An answer in pieces, as soon as they are certain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TextStreamer

__all__ = ["TextPieces"]


class TextPieces(TextStreamer):
    """Turns tokens into pieces of text, without special tokens and without the stop string that ends it.

    A piece comes out when its words are certain, and cannot become part of a stop string any more.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._stops = stops
        self._pending = ""
        self._done = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002  # the base class names it
        """Keep words that are certain."""
        self._pending += text

    def add(self, token: int) -> str:
        """Add a token; returns the text that is certain by it, often none."""
        self.put(torch.tensor([token]))  # type: ignore[no-untyped-call]
        return self._certain()

    def rest(self) -> str:
        """Return the text that was held back to the end and did not become a stop string."""
        self.end()  # type: ignore[no-untyped-call]
        certain = self._certain()
        return certain if self._done else certain + self._pending

    def _certain(self) -> str:
        if self._done:
            return ""
        found = min((at for stop in self._stops if (at := self._pending.find(stop)) >= 0), default=None)
        if found is not None:
            self._done = True
            return self._pending[:found]
        held = max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._pending.endswith(stop[:n])), default=0
        )
        certain, self._pending = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
        return certain
