"""A stock model, eager, that reads behind a memory: what memories in front, scores and choices are held against.

Nothing of the product's own attention takes part. Every slot is an entry of an ordinary cache, rotated by the stock
rotary embedding, and a mask of each head of each layer hides the slots that the head does not have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from tiny_models import MODELS, tiny_base
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.modeling.repetition import PIECE


@dataclass(frozen=True, slots=True)
class Reading:
    """The output of a stock model for the tokens that it has read.

    logits:  [tokens, vocab]
    kv:      of the tokens, keys before RoPE.
    queries: [layers, heads, tokens, head_dim], before RoPE.
    weights: [layers, heads, tokens, width + tokens] of attention, where width is the most slots that a head has.
    """

    logits: Tensor
    kv: BeaconKV
    queries: Tensor
    weights: Tensor

    def of_slots(self, memory: MemoryKV, layer: int, head: int) -> Tensor:
        """[groups, tokens, entries] the weights that the slots of one kv head receive, by position."""
        groups = self.weights.shape[1] // memory.counts.shape[1]
        return self.weights[layer, head * groups : (head + 1) * groups, :, : int(memory.counts[layer, head])]


def eager(name: str, **overrides: Any) -> PreTrainedModel:
    """The stock model of that name in `MODELS`, with explicit softmax."""
    family, settings = MODELS[name]
    base = tiny_base(family, **settings, **overrides)
    base.set_attn_implementation("eager")
    return base


@torch.no_grad()
def stock_reading(
    stock: PreTrainedModel, ids: Sequence[int], memory: MemoryKV | None = None, *, unseen: Tensor | None = None
) -> Reading:
    """Read tokens at the positions behind a memory's span, its slots at their positions.

    unseen: [layers, kv_heads, tokens, tokens] bool, what a head does not see among the tokens themselves.
    """
    layers, heads = stock.config.num_hidden_layers, stock.config.num_attention_heads
    kv_heads, tokens = stock.config.num_key_value_heads, len(ids)
    width = 0 if memory is None else int(memory.counts.max())
    cache = DynamicCache()
    mask = torch.zeros(layers, kv_heads, tokens, width + tokens)
    mask[..., width:] = torch.full((tokens, tokens), -math.inf).triu(1)
    for layer in range(layers if memory is not None and width else 0):
        keys, values = (torch.zeros(1, kv_heads, width, stock.model.layers[0].self_attn.head_dim) for _ in "kv")
        for head, (its_keys, its_values, positions) in enumerate(memory.layer(layer)):
            count = len(positions)
            cos, sin = (part[0] for part in stock.model.rotary_emb(its_keys, positions[None].float()))
            keys[0, head, :count] = its_keys * cos + rotate_half(its_keys) * sin
            values[0, head, :count] = its_values
            mask[layer, head, :, count:width] = -math.inf
        cache.update(keys, values, layer)
    if unseen is not None:
        mask[..., width:].masked_fill_(unseen, -math.inf)
    wide = mask.repeat_interleave(heads // kv_heads, dim=1)
    seen: dict[str, list[Tensor]] = {letter: [] for letter in "qkv"}
    with ExitStack() as hooks:
        for layer, block in enumerate(stock.model.layers):
            attention = block.self_attn

            def with_mask(_: Any, args: Any, kwargs: dict[str, Any], layer: int = layer) -> Any:
                return args, kwargs | {"attention_mask": wide[layer][None]}

            hooks.enter_context(_removed(attention.register_forward_pre_hook(with_mask, with_kwargs=True)))
            for letter, states in seen.items():
                part = getattr(attention, f"{letter}_norm", None) or getattr(attention, f"{letter}_proj")
                dim = attention.head_dim

                def note(_: Any, __: Any, out: Tensor, states: list[Tensor] = states, dim: int = dim) -> None:
                    states.append(out.reshape(tokens, -1, dim).transpose(0, 1))

                hooks.enter_context(_removed(part.register_forward_hook(note)))
        output: Any = stock(
            torch.tensor([list(ids)]),
            position_ids=torch.arange(tokens)[None] + (0 if memory is None else memory.span),
            past_key_values=cache,
            output_attentions=True,
        )
    queries, keys, values = (torch.stack(states) for states in seen.values())
    return Reading(output.logits[0], BeaconKV(keys, values), queries, torch.stack(output.attentions)[:, 0])


def _removed(handle: Any) -> ExitStack:
    stack = ExitStack()
    stack.callback(handle.remove)
    return stack


def some_kept(shape: tuple[int, int], tokens: int, *, seed: int = 0, share: float = 0.4) -> Tensor:
    """Tokens chosen by chance for each head, [layers, kv_heads, tokens] bool: none in one head, all in another."""
    kept = torch.rand(*shape, tokens, generator=torch.Generator().manual_seed(seed)) < share
    kept[0, 0], kept[-1, -1] = False, True
    kept[1] = False  # a layer in which no head has any
    return kept


def slow_repeated(stock: PreTrainedModel, prefix: MemoryKV, window: BeaconKV, ids: list[int]) -> Tensor:
    """Read piece after piece behind [prefix | window]; add up the squares of weight times value, as long as that is."""
    memory = MemoryKV.concat([prefix, MemoryKV.of(window)])
    scores = torch.zeros(*memory.counts.shape, window.slots)
    for start in range(0, len(ids), PIECE):
        reading = stock_reading(stock, ids[start : start + PIECE], memory)
        for layer, head in product(range(scores.shape[0]), range(scores.shape[1])):
            weights = reading.of_slots(memory, layer, head)[..., -window.slots :]
            parts = weights[..., None] * window.values[layer, head]  # [groups, rows, slots, head_dim]
            scores[layer, head] += parts.norm(dim=-1).square().sum((0, 1))
    return scores


def best(scores: Tensor, slots: int) -> Tensor:
    """The highest of all scores, `slots` for each head in the mean, [layers, kv_heads, tokens] bool."""
    ranked = sorted(range(scores.numel()), key=scores.flatten().tolist().__getitem__, reverse=True)
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[ranked[: slots * scores[..., 0].numel()]] = True
    return kept.view_as(scores)
