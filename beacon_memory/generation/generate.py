"""Generation with a memory as the prefix of the prompt, by the stock model's own `generate`.

This module and `decode_loop` rely on details of `generate`, which tests check. Here:

* a `MemoryCache` looks empty to it, so prompts begin at position 0, right after the memory;
* it computes positions from the mask, so prompts of different lengths are batched by padding on the left;
* for beams, and for several sequences from one prompt, the cache has to be repeated;
* several requests may share a memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from beacon_memory.errors import BeaconMemoryError, CapacityError, InputError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.prefix import Prefix
from beacon_memory.modeling.cache import MemoryCache
from beacon_memory.modeling.model import BeaconModel

__all__ = ["Generation", "Request", "finished", "generate", "refusals", "require_room"]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt that follows a memory.

    memory: sink and documents, one after another; it may have no slots. A `Prefix` is ready for attention.
    prompt: token ids.
    """

    memory: MemoryKV | Prefix
    prompt: Sequence[int]


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated text.

    tokens:         generated token ids, the end-of-sequence token included.
    text:           their text, without special tokens and without the stop string that ended it.
    first_token_at: time of the first token, in seconds on the clock of time.perf_counter.
    likelihoods:    log probability that the model gives each token, before options change it; () if nobody looked.
    ended:          whether the model or a stop string ended it; False if it was cut off.
    """

    tokens: tuple[int, ...]
    text: str
    first_token_at: float
    likelihoods: tuple[float, ...] = ()
    ended: bool = True


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
) -> list[list[Generation]]:
    """Generate for all requests in one batch; returns for each a list of `config.num_return_sequences` texts.

    Raises CapacityError, before any work is done, if a request does not fit the model's positions, and InputError for
    options that transformers refuses.
    """
    for request in requests:
        require_room(model, request.memory.span, len(request.prompt), config.max_new_tokens or 0)
    tokenizer = model.tokenizer
    longest = max(len(request.prompt) for request in requests)
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    prompts = torch.tensor([[pad] * (longest - len(r.prompt)) + list(r.prompt) for r in requests], device=model.device)
    prompt_mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in requests])
    memories = {id(request.memory): request.memory for request in requests}  # questions on one memory share it
    prefixes = {
        key: model.prefix(memory) if isinstance(memory, MemoryKV) else memory for key, memory in memories.items()
    }
    cache = MemoryCache([prefixes[id(request.memory)] for request in requests], config=model.base.config)
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    timer = _FirstTokenTimer()
    with refusals(), _seeded(seed, model.device), torch.inference_mode():
        output = model.base.generate(  # type: ignore[operator]
            input_ids=prompts,
            attention_mask=prompt_mask.to(model.device),
            past_key_values=cache,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([timer]),
            tokenizer=tokenizer,
        )
    texts = [finished(model, row, config, timer.first) for row in output[:, longest:].tolist()]
    each = config.num_return_sequences or 1
    return [texts[i : i + each] for i in range(0, len(texts), each)]


def finished(model: BeaconModel, row: list[int], config: GenerationConfig, first: float) -> Generation:
    """Return what a row of generated tokens says; behind its end it may have padding."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stopped = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    tokens = row[:stopped]
    text = str(model.tokenizer.decode(tokens, skip_special_tokens=True))
    cut = min((at for stop in config.stop_strings or [] if (at := text.find(stop)) >= 0), default=None)
    ended = cut is not None or any(token in ends for token in tokens[-1:])
    return Generation(tuple(tokens), text[:cut].strip(), first, ended=ended)


@contextmanager
def refusals() -> Iterator[None]:
    """Turn into InputError what transformers and torch raise for options that are looked at only in generating."""
    try:
        yield
    except BeaconMemoryError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise InputError(f"transformers cannot generate with these options: {error}") from error
    except RuntimeError as error:
        if "probability tensor" not in str(error):  # as torch says where no token may come, or with endless scores
            raise
        raise InputError(f"these options leave no token to sample from: {error}") from error


class _FirstTokenTimer(StoppingCriteria):
    """The time of the first token; it stops nothing."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        self.first = self.first or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Sample with a seed, and restore the random state of the process afterwards."""
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield
