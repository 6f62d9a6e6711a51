"""Answering behind a memory with the stock model: all that is known of `generate` is here.

Facts that the tests pin down: to `generate`, a `MemoryCache` is empty, so prompts begin at position 0, behind the
memory; positions follow from the mask, so prompts of different lengths batch when padded on the left; beams and several
sequences for one prompt need the cache repeated; requests may share a memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer

from .attention import MemoryCache
from .errors import CapacityError, InputError
from .kv import MemoryKV
from .modeling import BeaconModel

__all__ = ["Generation", "Request", "chat_prompt", "generate", "generation_config", "require_room", "stream"]

Messages = str | Sequence[Mapping[str, Any]]
DEFAULT_MAX_NEW_TOKENS = 256
# What transformers would only notice in the middle of generating, or not at all.
_RANGES: dict[str, tuple[Any, float, float]] = {
    "max_new_tokens": (int, 1, math.inf),
    "num_beams": (int, 1, math.inf),
    "num_return_sequences": (int, 1, math.inf),
    "temperature": (int | float, 0, math.inf),
    "top_k": (int, 0, math.inf),
    "top_p": (int | float, 0, 1),
}


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt behind a memory.

    prefix: sink and memories; may have no slots.
    prompt: token ids that follow it.
    """

    prefix: MemoryKV
    prompt: Sequence[int]


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated text.

    tokens:         generated token ids, the end-of-sequence token included.
    text:           decoded, without special tokens and without the stop string that ended it.
    first_token_at: when the first token was there, on the clock of time.perf_counter.
    """

    tokens: tuple[int, ...]
    text: str
    first_token_at: float


def chat_prompt(
    model: BeaconModel, messages: Messages, *, behind_memory: bool, tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Token ids of a conversation, or of one question, in the model's chat template, up to where the answer begins.

    Behind a memory, the bos token that a template may set is left out: it stands in front of the memory. tools: JSON
    schemas of functions that the model may call. Raises InputError for a model whose template has no place for them.
    """
    tokenizer = model.tokenizer
    if tokenizer.chat_template is None:
        raise InputError("the model's tokenizer has no chat template: questions need a chat (instruct) model")
    conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
    if not conversation or not all(isinstance(m.get("content"), str) or m.get("tool_calls") for m in conversation):
        raise InputError(f"messages={messages!r} must be a text, or dicts with 'role' and 'content' texts")

    def render(**given: Any) -> str:
        return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False, **given))

    text = render(tools=list(tools)) if tools else render()
    if tools and text == render():
        raise InputError("the model's chat template has no place for tools: take a model that was trained to call them")
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if behind_memory and model.leading_bos and ids[:1] == model.leading_bos:
        return ids[1:]
    return ids


def generation_config(
    model: BeaconModel, stop: str | Sequence[str] | None, options: Mapping[str, Any]
) -> GenerationConfig:
    """The model's own generation settings with `options`, named as in transformers, put over them.

    Naming a sampling option (temperature, top_p, top_k, min_p, typical_p) switches sampling on unless do_sample says
    otherwise; temperature 0 is greedy. Raises InputError for an unknown option or a value that transformers refuses.
    """
    chosen = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, **options}
    if stop:
        chosen["stop_strings"] = [stop] if isinstance(stop, str) else list(stop)
    if chosen.get("temperature") == 0:
        chosen |= {"temperature": None, "do_sample": False}
    elif any(chosen.get(name) is not None for name in ("temperature", "top_p", "top_k", "min_p", "typical_p")):
        chosen.setdefault("do_sample", True)
    for name, (kind, least, most) in _RANGES.items():
        value = chosen.get(name)
        if value is not None and not (isinstance(value, kind) and least <= value <= most):
            raise InputError(
                f"{name}={value!r} must be {'a whole number' if kind is int else 'a number'} from {least} to {most}"
            )
    config = GenerationConfig.from_dict(model.base.generation_config.to_dict())
    try:
        unknown = config.update(**chosen)
        config.validate()
    except ValueError as error:
        raise InputError(f"these generation options cannot be used: {error}") from error
    if unknown:
        raise InputError(f"unknown generation options: {', '.join(f'{k}={v!r}' for k, v in unknown.items())}")
    return config


def require_room(model: BeaconModel, slots: int, prompt: int, new_tokens: int) -> None:
    """Raise CapacityError unless memory, prompt and answer together fit the model's positions."""
    if slots + prompt + new_tokens > model.max_positions:
        raise CapacityError(
            f"{slots} positions of memory, {prompt} prompt tokens and {new_tokens} tokens for the answer need "
            f"{slots + prompt + new_tokens} positions, but the model has {model.max_positions}; ask with fewer "
            "documents, add them again with a higher ratio, or allow fewer new tokens"
        )


def generate(
    model: BeaconModel,
    requests: Sequence[Request],
    config: GenerationConfig,
    *,
    seed: int | None = None,
    streamer: TextStreamer | None = None,
    cancelled: Event | None = None,
) -> list[list[Generation]]:
    """Generate for all requests in one batch; for each one list, of `config.num_return_sequences` texts.

    Raises CapacityError, before any work, if a request does not fit the model's positions.
    """
    for request in requests:
        require_room(model, request.prefix.span, len(request.prompt), config.max_new_tokens or 0)
    tokenizer = model.tokenizer
    longest = max(len(request.prompt) for request in requests)
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    prompts = torch.tensor([[pad] * (longest - len(r.prompt)) + list(r.prompt) for r in requests], device=model.device)
    prompt_mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in requests])
    prefixes = {id(request.prefix): request.prefix for request in requests}  # questions on one memory share it
    fronts = {key: model.front(prefix) for key, prefix in prefixes.items()}
    behind = any(request.prefix.slots for request in requests)  # what stands behind nothing is stock altogether
    cache = MemoryCache(
        [fronts[id(request.prefix)] for request in requests] if behind else (), config=model.base.config
    )
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    watch = _Watch(cancelled)
    with _seeded(seed, model.device), torch.inference_mode():
        output = model.base.generate(  # type: ignore[operator]
            input_ids=prompts,
            attention_mask=prompt_mask.to(model.device),
            past_key_values=cache,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([watch]),
            tokenizer=tokenizer,
            streamer=streamer,
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    texts = [_finish(model, row, ends, config.stop_strings or [], watch.first) for row in output[:, longest:].tolist()]
    each = config.num_return_sequences or 1
    return [texts[i : i + each] for i in range(0, len(texts), each)]


def _finish(
    model: BeaconModel, row: list[int], ends: Sequence[int | None], stops: Sequence[str], first: float
) -> Generation:
    stopped = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))  # behind it is padding
    tokens = row[:stopped]
    text = str(model.tokenizer.decode(tokens, skip_special_tokens=True))
    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))
    return Generation(tuple(tokens), text[:cut].strip(), first)


class _Watch(StoppingCriteria):
    """Notes when the first token was there, and stops when told to."""

    def __init__(self, cancelled: Event | None) -> None:
        self.cancelled = cancelled
        self.first = 0.0

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        self.first = self.first or time.perf_counter()
        stop = self.cancelled is not None and self.cancelled.is_set()
        return torch.full((len(input_ids),), stop, dtype=torch.bool, device=input_ids.device)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Sample with this seed, and leave the random state of the process as it was."""
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


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
