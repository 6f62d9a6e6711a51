"""Baselines that select K/V without training, by the presses of the package kvpress.

A press keeps some of the text's own K/V, at their own positions. It sees only the text, never the question. It runs on
a stock model with the LoRA merged in, which is another copy than the model with the beacons.
"""

from __future__ import annotations

import copy
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from beacon_memory.errors import InputError, MissingDependencyError
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.modeling.answering import in_answers, install_answering
from beacon_memory.modeling.loading import load_base
from beacon_memory.modeling.lora import lora_factors, merge_lora
from beacon_memory.modeling.model import BeaconModel

from .baselines import Outcome, ReadingBaseline, mean_nll
from .items import Item
from .pieces import Passages, cut_middle

__all__ = ["PRESSES", "Selected", "Selection", "stock_model"]

PRESSES = {"expected": "ExpectedAttentionPress", "snapkv": "SnapKVPress", "kvzip": "KVzipPress"}


def stock_model(model: BeaconModel) -> PreTrainedModel:
    """Load the base of `model` again, without beacons, and merge its LoRA; it gets that of answers, too."""
    base, _ = load_base(str(model.base.config.name_or_path), model.device, model.dtype)
    answers = None if model.answers is None else lora_factors(base, model.answers)
    stock = base if model.lora is None else merge_lora(base, model.lora)
    if answers is not None:
        deque(install_answering(stock, *answers), maxlen=0)
    stock.eval()
    return stock


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The K/V that a press has kept of a text.

    cache:    cache of the stock model, with keys after RoPE. It has fewer slots than the text has tokens, or all of
              them, some of which are hidden.
    hidden:   [layers, kv_heads, slots] bool, which slots a head does not see; None if every head sees all of its slots.
    read:     number of tokens that were read, the sink included; the next token has this position.
    kv_bytes: bytes of the K/V that are kept, without the sink.
    cut:      see Outcome.
    """

    cache: DynamicCache
    hidden: Tensor | None
    read: int
    kv_bytes: int
    cut: bool

    def fresh_cache(self) -> DynamicCache:
        """Return a cache that can grow. It shares the tensors, which do not change, because a cache copies to grow."""
        cache = DynamicCache()
        for number, layer in enumerate(_layers(self.cache)):
            cache.update(cast(Tensor, layer.keys), cast(Tensor, layer.values), number)
        return cache


class Selected(ReadingBaseline[Selection]):
    """The baselines `expected:R`, `snapkv:R` and `kvzip:R`."""

    def __init__(self, name: str, model: BeaconModel, stock: PreTrainedModel, press: str, ratio: int) -> None:
        super().__init__(name, model)
        try:
            import kvpress
        except ImportError as error:
            raise MissingDependencyError(
                f"{name} needs the package kvpress: pip install 'beacon-memory[eval]'"
            ) from error
        self.stock, self.ratio = stock, ratio
        self.press: Any = getattr(kvpress, PRESSES[press])()
        self._folder = self._save_repeating_tokenizer() if press == "kvzip" else None

    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[Outcome]:
        """Answer items one after another."""
        outcomes = []
        for item in items:
            selection, seconds = self.memory(item)
            started = time.perf_counter()
            prompt = chat_prompt(self.model, item.question, behind_memory=True)
            tokens = self._generate(selection, prompt, max_new_tokens)
            text = str(self.model.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            seconds += time.perf_counter() - started
            outcomes.append(Outcome(text, selection.kv_bytes, seconds, selection.cut))
        return outcomes

    @torch.inference_mode()
    def score(self, context: Sequence[int], continuation: Sequence[int]) -> float:
        """Return the mean negative log likelihood of a continuation after the selected K/V of `context`."""
        selection = self.memory_to_continue(context)
        with _hiding(self.stock, selection.hidden):
            logits = self._logits(selection.fresh_cache(), continuation, selection.read)
        return mean_nll(logits[:-1], continuation[1:])

    @torch.inference_mode()
    def read(self, passages: Passages, question: str | None) -> Selection:  # noqa: ARG002  # presses do not see it
        """Read the whole text, then keep 1/R of its K/V, and those of the sink."""
        ids = [id for passage in passages for id in passage]
        kept_ids = cut_middle(ids, self.room)
        sink = len(self.model.sink_ids)
        tokens = [*(self.model.sink_ids or self.model.leading_bos), *kept_ids]
        self._set_press(len(tokens), sink + -(-(len(tokens) - sink) // self.ratio))
        cache = DynamicCache(config=self.stock.config)
        with self._pressing():
            self.stock.model(
                input_ids=torch.tensor([tokens], device=self.stock.device),
                past_key_values=cache,
                cache_position=torch.arange(len(tokens), device=self.stock.device),  # presses look for it
            )
        hidden = _take_hidden(self.stock, cache)
        slots = sum(layer.get_seq_length() for layer in _layers(cache)) / len(cache.layers)
        if hidden is not None:
            slots -= hidden.sum().item() / hidden[..., 0].numel()
        kv_bytes = round((slots - sink) * self.model.slot_bytes)
        return Selection(cache, hidden, len(tokens), kv_bytes, cut=len(kept_ids) < len(ids))

    def _set_press(self, tokens: int, kept: int) -> None:
        """Set the press to keep `kept` of a text's tokens."""
        if tokens <= 4:
            raise InputError(f"{self.name}: a text of {tokens} tokens is too short to select from")
        # Presses round the number that they keep down, and KVzip the number that it drops. With half a millionth of a
        # token more, both keep the number that is wanted.
        self.press.compression_ratio = 1 - (kept + 5e-7) / tokens if kept < tokens else 0.0
        if hasattr(self.press, "window_size"):  # SnapKV keeps the last tokens, but others must have room too
            window = type(self.press).window_size
            self.press.window_size = window if window < kept else max(1, kept // 2)

    @contextmanager
    def _pressing(self) -> Iterator[None]:
        """Apply the press to what the stock model reads."""
        config = self.stock.config
        origin = config.name_or_path
        with ExitStack() as stack:
            if self._folder is not None:
                stack.callback(setattr, config, "name_or_path", origin)
                config.name_or_path = self._folder.name
            stack.enter_context(self.press(self.stock))
            yield

    def _save_repeating_tokenizer(self) -> TemporaryDirectory[str]:
        """Save the tokenizer for KVzip to a folder, because KVzip loads it from the folder in the model's config.

        KVzip lets the model repeat the text, and takes the tokens before and after it from the chat template. Here the
        text comes after the sink and before the conversation, so the template is changed to say so.
        """
        text = "\0"
        message = [{"role": "user", "content": text}]
        tokenizer = copy.deepcopy(self.model.tokenizer)
        rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        before = "".join(tokenizer.convert_ids_to_tokens(self.model.sink_ids or self.model.leading_bos))
        after = str(rendered).rpartition(text)[2]
        tokenizer.chat_template = f"{{{{ {json.dumps(before)} + messages[0]['content'] + {json.dumps(after)} }}}}"
        folder = TemporaryDirectory()
        tokenizer.save_pretrained(folder.name)
        return folder

    def _logits(self, cache: DynamicCache, ids: Sequence[int], position: int) -> Tensor:
        """Return the logits [tokens, vocab] of tokens after a cache, which may have fewer slots than positions."""
        input_ids = torch.tensor([list(ids)], device=self.stock.device)
        positions = torch.arange(position, position + len(ids), device=self.stock.device)[None]
        with in_answers():
            logits: Tensor = self.stock(input_ids=input_ids, past_key_values=cache, position_ids=positions).logits[0]
        return logits

    @torch.inference_mode()
    def _generate(self, selection: Selection, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Decode greedily. `generate` cannot be used, because it takes the length of the cache for the position."""
        cache, position = selection.fresh_cache(), selection.read
        ends: Any = self.stock.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        tokens: list[int] = []
        fed = list(prompt)
        with _hiding(self.stock, selection.hidden):
            while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in ends):
                tokens.append(int(self._logits(cache, fed, position)[-1].argmax()))
                position, fed = position + len(fed), tokens[-1:]
        return tokens


def _layers(cache: DynamicCache) -> list[DynamicLayer]:
    return [cast(DynamicLayer, layer) for layer in cache.layers]


def _attentions(stock: PreTrainedModel) -> list[Any]:
    return [layer.self_attn for layer in stock.model.layers]


def _take_hidden(stock: PreTrainedModel, cache: DynamicCache) -> Tensor | None:
    """Return the slots that the press wants to hide, see Selection.

    A press lists them in an attribute of each attention module, for kvpress's own attention function; the attribute is
    cleared here. That function hides a slot by a fake key that no query attends to, but for many queries at once there
    need not be such a key.
    """
    keys = cast(Tensor, _layers(cache)[0].keys)
    hidden = torch.zeros(len(cache.layers), *keys.shape[1:3], dtype=torch.bool, device=keys.device)
    for layer, attention in enumerate(_attentions(stock)):
        noted = getattr(attention, "masked_key_indices", None)  # batch, kv head, slot
        if noted is not None:
            hidden[layer, noted[1].to(keys.device), noted[2].to(keys.device)] = True
            attention.masked_key_indices = None
    return hidden if hidden.any() else None


@contextmanager
def _hiding(stock: PreTrainedModel, hidden: Tensor | None) -> Iterator[None]:
    """Let each head of the stock model see only the slots that were kept for it, by a mask for each layer."""
    layers = [] if hidden is None else list(zip(_attentions(stock), hidden, strict=True))
    hooks = [
        attention.register_forward_pre_hook(partial(_mask, hidden=of_layer), with_kwargs=True)
        for attention, of_layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mask(attention: Any, args: Any, kwargs: dict[str, Any], *, hidden: Tensor) -> tuple[Any, dict[str, Any]]:
    """Replace the causal mask by one that hides slots, [1, heads, new, old + new]; hidden: [kv_heads, slots]."""
    new, old = kwargs["hidden_states"].shape[1], kwargs["past_key_values"].get_seq_length(attention.layer_idx)
    seen = torch.ones(len(hidden), old + new, dtype=torch.bool, device=hidden.device)
    seen[:, : hidden.shape[1]] = ~hidden
    by_head = seen.repeat_interleave(attention.num_key_value_groups, dim=0)[None, :, None]
    causal = torch.ones(new, old + new, dtype=torch.bool, device=hidden.device).tril(old)
    return args, {**kwargs, "attention_mask": causal & by_head}
