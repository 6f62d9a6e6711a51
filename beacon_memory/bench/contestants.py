"""The contestants of the race: ways to answer questions on a text that was read before, each as its own users have it.

    stock            transformers with the whole text in the prompt: it is read anew for every question
    stock-cache      transformers with the text's K/V in a DynamicCache, kept in a safetensors file
    expected:R, kvzip:R   1/R of the text's K/V, by ExpectedAttention and KVzip in the pipeline of the package kvpress
    window-loop:R    beacons, read window by window with the language-model head, the published way; it only reads
    beacon:R, select:R, select-expected:R, hybrid:R   documents of a BeaconMemory; select:R@int8 and @int4 in fewer bits
    llama.cpp        the prompt cache of llama.cpp, on the weights of the default model in the 4 bits that they come in

A first token is there when the head has computed its scores, on a model that is loaded; so all are timed the same way.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.errors import DocumentNotFoundError, InputError, MissingDependencyError
from beacon_memory.memory import BeaconMemory
from beacon_memory.modeling.default_model import ensure_default_model
from beacon_memory.modeling.loading import load_base
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.storage.files.durable import sync_file

from .llama_cpp import LlamaCpp
from .measuring import QUESTION, random_text
from .model import load, window_loop

__all__ = ["Contestant", "Form", "ModelNames", "Place", "contestant", "form_of", "our_model", "texts"]

# Where an answer takes what was kept of a text: from files on the disk, from files in the page cache, or from what is
# ready since a question before; or it takes nothing of it.
Place = Literal["cold", "ram", "hot", "nothing"]
_PRESSES = {"expected": "ExpectedAttentionPress", "kvzip": "KVzipPress"}
_OURS = ("beacon", "select", "select-expected", "hybrid")
_ALONE = {"stock": "transformers", "stock-cache": "transformers", "llama.cpp": "llama.cpp"}  # and their processes
_FORM = re.compile(rf"({'|'.join([*_PRESSES, *_OURS, 'window-loop'])}):([1-9][0-9]*)(?:@(int8|int4))?")
_ROOM = 128  # positions for question and template, beside those of the answer


@dataclass(frozen=True, slots=True)
class ModelNames:
    """The model of a race: what `BeaconModel.from_pretrained` takes."""

    model: str | None
    adapter: str | None
    device: str | None
    dtype: str


@dataclass(frozen=True, slots=True)
class Form:
    """A contestant, as its name describes it."""

    name: str
    method: str
    ratio: int = 1
    precision: str = "auto"

    @property
    def process(self) -> str:
        """Return in which process it runs; those in the same one share a model."""
        if self.method in _ALONE:
            return _ALONE[self.method]
        return "kvpress" if self.method in _PRESSES else "beacon_memory"

    @property
    def keeps(self) -> bool:
        """Tell whether it keeps what it read, for later processes; else it reads the text for each question anew."""
        return self.name in ("stock-cache", "llama.cpp") or self.method in _OURS


def form_of(name: str) -> Form:
    """Return what a name says; raises InputError for one that names no contestant."""
    if name in _ALONE:
        return Form(name, name)
    match = _FORM.fullmatch(name)
    if match is None or (match[3] and match[1] not in _OURS):
        known = [*_ALONE, *(f"{one}:R" for one in (*_PRESSES, "window-loop", *_OURS)), "select:R@int4"]
        raise InputError(f"unknown contestant {name!r}; there are {', '.join(known)}, R being a ratio such as 8")
    return Form(name, match[1], int(match[2]), match[3] or "auto")


class Contestant(Protocol):
    """One way to answer from one text.

    device: that it computes on.
    places: from where it can answer, in the order in which that is measured; none if it cannot answer at all.
    files:  what it has kept of the text.
    """

    device: torch.device
    places: Sequence[Place]

    @property
    def files(self) -> Sequence[Path]:
        """Return the files that it has kept."""

    def read(self) -> None:
        """Read the text, and keep what answers need."""

    def answer(self, place: Place, tokens: int) -> Sequence[float]:
        """Answer a question with so many tokens; returns the seconds from the question to each."""


def contestant(form: Form, names: ModelNames, text: str, folder: Path) -> Contestant:
    """Return the contestant of a form for one text, which keeps its files in a folder; a process loads one model."""
    kinds: dict[str, Any] = {
        "stock": _Stock,
        "stock-cache": _StockCache,
        "llama.cpp": partial(LlamaCpp, room=_ROOM),
        "window-loop": _WindowLoop,
        **dict.fromkeys(_PRESSES, _Pressed),
    }
    one: Contestant = kinds.get(form.method, _Ours)(form, names, text, folder)
    return one


def texts(names: ModelNames, lengths: Sequence[int], answer: int) -> list[tuple[int, str]]:
    """Return random words of so many tokens, or as many as leave room for question and answer: tokens and text."""
    model, tokenizer = _stock_model(names)
    room = int(model.config.max_position_embeddings) - _ROOM - answer
    ids = tokenizer(random_text(max(lengths)), add_special_tokens=False)["input_ids"]
    sizes = dict.fromkeys(min(tokens, room, len(ids)) for tokens in lengths)
    return [(tokens, str(tokenizer.decode(ids[:tokens]))) for tokens in sizes]


@cache
def _stock_model(names: ModelNames) -> tuple[Any, Any]:
    base, tokenizer = load_base(names.model or ensure_default_model(), names.device, names.dtype)
    base.generation_config.eos_token_id = None  # answers are as long as they are asked to be
    return base.eval(), tokenizer


@cache
def our_model(names: ModelNames) -> BeaconModel:
    """Return the model of this process with its beacons, those of the paper."""
    return load(names.model, names.adapter, names.device, names.dtype)


@cache
def _our_compressor(names: ModelNames) -> BeaconCompressor:
    return BeaconCompressor(our_model(names))


@contextmanager
def _timed(model: Any) -> Iterator[list[float]]:
    """Note the seconds from here to each time that the head has computed scores."""
    started = time.perf_counter()
    times: list[float] = []

    def note(*_: object) -> None:
        if model.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - started)

    hook = model.get_output_embeddings().register_forward_hook(note)
    try:
        yield times
    finally:
        hook.remove()


class _Stock:
    """The whole text in the prompt, by stock `generate`."""

    places: Sequence[Place] = ("cold",)

    def __init__(self, form: Form, names: ModelNames, text: str, folder: Path) -> None:
        self._model, tokenizer = _stock_model(names)
        self.device: torch.device = self._model.device
        leading = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        self._text = [*leading, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        message = [{"role": "user", "content": QUESTION}]
        self._question = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        self._path = folder / f"{form.name} {len(self._text)}.safetensors"

    @property
    def files(self) -> Sequence[Path]:
        return ()

    @torch.inference_mode()
    def read(self) -> None:
        self._model.model(input_ids=self._ids(self._text), use_cache=False)

    def answer(self, place: Place, tokens: int) -> Sequence[float]:  # noqa: ARG002  # it reads the text anew
        return self._generated(lambda: None, tokens)

    def _generated(self, kept: Callable[[], DynamicCache | None], tokens: int) -> list[float]:
        with _timed(self._model) as times:
            prompt = self._ids([*self._text, *self._question])
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=kept(),
                max_new_tokens=tokens,
                do_sample=False,
            )
        return times

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.device)


class _StockCache(_Stock):
    """The text's K/V in a DynamicCache, kept in a file; stock `generate` goes on behind them."""

    places = ("cold", "ram", "hot")

    @property
    def files(self) -> Sequence[Path]:
        return (self._path,)

    @torch.inference_mode()
    def read(self) -> None:
        read = DynamicCache(config=self._model.config)
        self._model.model(input_ids=self._ids(self._text), past_key_values=read)
        layers: list[Any] = list(read.layers)
        tensors = {f"keys {number}": layer.keys for number, layer in enumerate(layers)}
        save_file(tensors | {f"values {number}": layer.values for number, layer in enumerate(layers)}, self._path)
        sync_file(self._path)

    def answer(self, place: Place, tokens: int) -> Sequence[float]:
        if place != "hot":
            return self._generated(self._load, tokens)
        self._ready.crop(len(self._text) - self._ready.get_seq_length())  # the question before
        return self._generated(lambda: self._ready, tokens)

    def _load(self) -> DynamicCache:
        tensors = load_file(self._path, device=str(self.device))
        self._ready = DynamicCache(config=self._model.config)
        for layer in range(len(tensors) // 2):
            self._ready.update(tensors[f"keys {layer}"], tensors[f"values {layer}"], layer)
        return self._ready


class _Pressed:
    """K/V that a press chose, in the pipeline of kvpress: it reads the text, then answers one question or two."""

    places: Sequence[Place] = ("cold", "hot")

    def __init__(self, form: Form, names: ModelNames, text: str, _: Path) -> None:
        try:
            import kvpress
        except ImportError as error:
            needed = f"{form.name} needs the package kvpress: pip install 'beacon-memory[eval]'"
            raise MissingDependencyError(needed) from error
        self._model, tokenizer = _stock_model(names)
        self.device = self._model.device
        self._model.model.register_forward_pre_hook(_with_positions, with_kwargs=True)
        self._pipeline: Any = kvpress.KVPressTextGenerationPipeline(model=self._model, tokenizer=tokenizer)
        self._press: Any = getattr(kvpress, _PRESSES[form.method])(compression_ratio=1 - 1 / form.ratio)
        self._text = text
        self._second: Sequence[float] = ()

    @property
    def files(self) -> Sequence[Path]:
        return ()

    def read(self) -> None:
        inputs = self._pipeline.preprocess(self._text, questions=[], answer_prefix="", max_context_length=1 << 30)
        self._pipeline.forward(inputs, press=self._press)

    def answer(self, place: Place, tokens: int) -> Sequence[float]:
        if place == "hot":
            return self._second
        with _timed(self._model) as times:
            self._pipeline(self._text, questions=[QUESTION] * 2, press=self._press, max_new_tokens=tokens)
        first, second = times[-2 * tokens : -tokens], times[-tokens:]  # KVzip runs the head while it reads, too
        self._second = [seconds - first[-1] for seconds in second]
        return first


def _with_positions(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hand on how many tokens were read before, which presses look for, and transformers does not tell any more."""
    before, new = kwargs["past_key_values"].get_seq_length(), kwargs["input_ids"].shape[1]
    return args, {**kwargs, "cache_position": torch.arange(before, before + new)}


class _WindowLoop:
    """Windows one after another, each with the head; it keeps nothing, and is here for how fast it reads."""

    places: Sequence[Place] = ()

    def __init__(self, form: Form, names: ModelNames, text: str, _: Path) -> None:
        self._compressor = _our_compressor(names)
        self.device = self._compressor.model.device
        self._ids = self._compressor.tokenize(text).ids
        self._ratio = form.ratio

    @property
    def files(self) -> Sequence[Path]:
        return ()

    def read(self) -> None:
        window_loop(self._compressor, self._ids, self._ratio)

    def answer(self, place: Place, tokens: int) -> Sequence[float]:
        raise InputError(f"the window loop only reads, and gives no answer of {tokens} tokens from {place!r}")


class _Ours:
    """A document of a BeaconMemory."""

    places: Sequence[Place] = ("cold", "ram", "hot", "nothing")

    def __init__(self, form: Form, names: ModelNames, text: str, folder: Path) -> None:
        compression, _, score = form.method.partition("-")
        self._how: dict[str, Any] = {"ratio": form.ratio, "compression": compression, "precision": form.precision}
        self._text = text
        self._id = f"{form.name} {len(text)}"
        self._forgetful, self._warm = (_our_memory(names, folder, score or "repeat", kept) for kept in (0, None))
        self.device = self._warm.model.device

    @property
    def files(self) -> Sequence[Path]:
        store = self._warm.store
        return (store.folder / store.row(self._id).file,)

    def read(self) -> None:
        with suppress(DocumentNotFoundError):
            self._warm.remove(self._id)
        self._warm.add(self._id, self._text, **self._how)

    def answer(self, place: Place, tokens: int) -> Sequence[float]:
        memory = self._warm if place == "hot" else self._forgetful
        documents = [] if place == "nothing" else [self._id]
        if place == "hot":
            memory.warm(documents)
        with _timed(memory.model.base) as times:
            memory.ask(QUESTION, documents, max_new_tokens=tokens, eos_token_id=None)
        return times


@cache
def _our_memory(names: ModelNames, folder: Path, score: str, hot_bytes: int | None) -> BeaconMemory:
    return BeaconMemory(folder, our_model(names), score=score, hot_bytes=hot_bytes)
