"""Tiny random models of every supported family, a tokenizer made in code, and the method written out naively."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from beacon_memory.config import BeaconConfig
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.probe import Probe

keeps_control_tokens_text = pytest.mark.skipif(
    "sanitize_control_tokens" not in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    reason="transformers can keep control tokens in a conversation as text from 5.23 on",
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
BOS, EOS = 1, 2
VOCAB = len(SPECIAL) + 256  # every byte is a token

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "attention_factor": 1.3,
}
# Every family, and a rotation that scales: family and settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama with yarn": ("llama", {"rope_parameters": YARN}),
}

_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
_OF_FAMILY: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 16}}
_CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_base(family: str, *, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """A stock model with weights large enough that attention is far from uniform, biases and norms included."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,  # with two, what raw rows see in their window would not reach any beacon's K/V
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": None,
    }
    config = _CONFIGS[family](**(settings | _OF_FAMILY.get(family, {}) | config_overrides))
    base: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * drawn if "norm" in name else 0.25 * drawn)
    base.eval()
    return base


def tiny_checkpoint(folder: Path, base: PreTrainedModel) -> Path:
    """A folder that a model and its tokenizer load from."""
    base.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_model(
    family: str,
    beacon_config: BeaconConfig,
    *,
    trained: bool = True,
    tokenizer: PreTrainedTokenizerFast | None = None,
    seed: int = 0,
    **config_overrides: Any,
) -> BeaconModel:
    """A `tiny_base` with beacons; `trained` moves their parameters away from those of the base."""
    base = tiny_base(family, seed=seed, **config_overrides)
    vocab, placement = base.config.vocab_size, beacon_config.beacon_placement
    of_tokens = {
        "token_salience": some_salience(vocab) if placement != "end" else None,
        "token_starts_word": some_word_starts(vocab) if placement == "salient-words" else None,
    }
    model = BeaconModel(base, beacon_config, **of_tokens, tokenizer=tokenizer).eval()
    return train(model, seed=seed) if trained else model


@torch.no_grad()
def train(model: BeaconModel, *, seed: int = 0) -> BeaconModel:
    """Move the beacon parameters as a training would, by random steps."""
    generator = torch.Generator().manual_seed(seed + 1)
    for _, parameter in model.named_beacon_parameters():
        parameter.add_(0.25 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def some_salience(vocab: int = VOCAB) -> Tensor:
    """A number for each token, few different ones so that ties occur."""
    return torch.randint(0, 6, (vocab,), generator=torch.Generator().manual_seed(5)).float()


def some_word_starts(vocab: int = VOCAB) -> Tensor:
    """Return which tokens begin a word: every second one, so that words have one token or several."""
    return torch.arange(vocab) % 2 == 0


def some_probe(model: BeaconModel, *, seed: int = 0) -> Probe:
    """A probe that fits a model, of random maps."""
    layers, heads, head_dim = model.kv_shape
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, heads * (2 * head_dim + 3), heads)
    return Probe(torch.randn(shape, generator=generator), torch.randn(layers, heads, generator=generator))


def some_ids(count: int, *, seed: int = 0) -> list[int]:
    """Random ordinary tokens."""
    drawn: list[int] = torch.randint(
        len(SPECIAL), VOCAB, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return drawn


def tiny_tokenizer(*, leading_bos: bool = True) -> PreTrainedTokenizerFast:
    """A fast tokenizer with one token for each byte, a chat template and, if asked for, bos in front of every text."""
    vocab = {token: id for id, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if leading_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


@dataclass(frozen=True, slots=True)
class Row:
    """A raw token, or the beacon that stands after it."""

    token: int
    beacon: bool
    position: int


@dataclass(frozen=True, slots=True)
class ReferenceRead:
    """The K/V and hidden states that `reference_read` computes of a document.

    keys, values: [layers, kv_heads, slots, head_dim] of its beacons, keys before RoPE; hidden: [tokens, hidden_size].
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor


@torch.no_grad()
def reference_read(model: BeaconModel, ids: Sequence[int], ratios: Sequence[int]) -> ReferenceRead:
    """Read a document window by window, row by row, head by head, as the method says; float32 and eager.

    Of `model` only its weights and settings are used, not its code.
    """
    size = model.config.beacon_window
    layers = model.base.config.num_hidden_layers
    empty = torch.zeros(0, model.base.config.num_key_value_heads, _head_dim(model))
    memory = [(empty, empty)] * layers
    if model.config.beacon_sink_size:
        memory, _ = _read_rows(model, [Row(BOS, False, 0)], memory)
    sink = len(memory[0][0])
    hidden = []
    for number, ratio in enumerate(ratios):
        rows = _rows(model, ids[number * size : (number + 1) * size], ratio, len(memory[0][0]))
        read, states = _read_rows(model, rows, memory)
        kept = torch.tensor([row.beacon or ratio == 0 for row in rows])
        memory = [
            (torch.cat([old_keys, keys[kept]]), torch.cat([old_values, values[kept]]))
            for (old_keys, old_values), (keys, values) in zip(memory, read, strict=True)
        ]
        hidden.append(states[torch.tensor([not row.beacon for row in rows])])
    keys, values = (torch.stack([layer[i][sink:].transpose(0, 1) for layer in memory]) for i in (0, 1))
    return ReferenceRead(keys, values, torch.cat(hidden))


def _rows(model: BeaconModel, window: Sequence[int], ratio: int, memory: int) -> list[Row]:
    """The rows of a window in the order in which they stand."""
    config = model.config
    anchors = _anchors(model, window, ratio) if ratio else set()
    rows: list[Row] = []
    for i, token in enumerate(window):
        for beacon in (False, True) if i in anchors else (False,):
            index = i if config.beacon_attn == "hidden" else len(rows)
            rows.append(Row(token, beacon, memory + index))
    return rows


def _anchors(model: BeaconModel, window: Sequence[int], ratio: int) -> set[int]:
    """The raw tokens of a window after which a beacon stands."""
    vocab, placement = model.base.config.vocab_size, model.config.beacon_placement
    informative = [float(some_salience(vocab)[token]) for token in window]
    if placement == "salient-words":
        words: list[list[int]] = []
        for i, token in enumerate(window):
            if i == 0 or some_word_starts(vocab)[token]:
                words.append([])
            words[-1].append(i)
        of_word = [sum(informative[i] for i in word) / math.sqrt(len(word)) for word in words]
        ranked = sorted((score, i) for score, word in zip(of_word, words, strict=True) for i in word)
        return {i for _, i in ranked[-math.ceil(len(window) / ratio) :]}
    units = [range(start, min(start + ratio, len(window))) for start in range(0, len(window), ratio)]
    if placement == "end":
        return {unit[-1] for unit in units}
    return {max((informative[i], i) for i in unit)[1] for unit in units}


def _read_rows(
    model: BeaconModel, rows: Sequence[Row], memory: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The keys (before RoPE) and values of all rows at each layer [rows, kv_heads, head_dim], and their last states."""
    weights, config = _published_weights(model), model.base.config
    dim, groups = _head_dim(model), config.num_attention_heads // config.num_key_value_heads
    positions = [row.position for row in rows]
    states = torch.stack([_embedding(model, weights, row) for row in rows])
    read = []
    for layer, (memory_keys, memory_values) in enumerate(memory):
        name = f"model.layers.{layer}"
        normed = _norm(model, states, weights[f"{name}.input_layernorm.weight"])
        queries, keys, values = (
            torch.stack([_project(weights, f"{name}.self_attn", which, row.beacon, x) for row, x in pairs]).unflatten(
                1, (-1, dim)
            )
            for which, pairs in ((letter, list(zip(rows, normed, strict=True))) for letter in "qkv")
        )
        if f"{name}.self_attn.q_norm.weight" in weights:
            queries = _norm(model, queries, weights[f"{name}.self_attn.q_norm.weight"])
            keys = _norm(model, keys, weights[f"{name}.self_attn.k_norm.weight"])
        read.append((keys, values))
        turned = _rotated(model, keys, positions)
        slots = _rotated(model, memory_keys, list(range(len(memory_keys))))
        asked = _rotated(model, queries, positions)
        attended = []
        for a, row in enumerate(rows):
            hidden_from = model.config.beacon_attn == "hidden" and not row.beacon
            seen = [b for b in range(a + 1) if not (hidden_from and rows[b].beacon)]
            heads = []
            for head in range(config.num_attention_heads):
                group = head // groups
                among = torch.cat([slots[:, group], turned[seen, group]])
                weight = torch.softmax(among @ asked[a, head] / math.sqrt(dim), dim=0)
                heads.append(weight @ torch.cat([memory_values[:, group], values[seen, group]]))
            attended.append(_project(weights, f"{name}.self_attn", "o", row.beacon, torch.cat(heads)))
        states = states + torch.stack(attended)
        normed = _norm(model, states, weights[f"{name}.post_attention_layernorm.weight"])
        gate, up, down = (weights[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        states = states + (torch.nn.functional.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    return read, _norm(model, states, weights["model.norm.weight"])


def _published_weights(model: BeaconModel) -> dict[str, Tensor]:
    stock = {name.replace("_proj.base.", "_proj."): tensor for name, tensor in model.base.state_dict().items()}
    return stock | dict(model.named_beacon_parameters())


def _head_dim(model: BeaconModel) -> int:
    config = model.base.config
    dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return dim


def _embedding(model: BeaconModel, weights: dict[str, Tensor], row: Row) -> Tensor:
    token = weights["model.embed_tokens.weight"][row.token]
    if not row.beacon:
        return token
    if model.config.beacon_embed == "learned":
        return weights["model.beacon_embed_tokens.weight"].flatten()
    return token + weights["beacon_embed_offset"]


def _project(weights: dict[str, Tensor], attention: str, letter: str, beacon: bool, x: Tensor) -> Tensor:
    name = f"{attention}.beacon_{letter}_proj"
    if not beacon or f"{name}.weight" not in weights:
        name = f"{attention}.{letter}_proj"
    projected = weights[f"{name}.weight"] @ x
    return projected + weights[f"{name}.bias"] if f"{name}.bias" in weights else projected


def _norm(model: BeaconModel, x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + model.base.config.rms_norm_eps) * weight


def _rotated(model: BeaconModel, x: Tensor, positions: Sequence[int]) -> Tensor:
    """Each row of x [rows, heads, head_dim] turned by its position, dimension i together with i + head_dim / 2."""
    half = x.shape[-1] // 2
    frequencies = model.base.config.rope_parameters["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.empty_like(x)
    for row, position in enumerate(positions):
        cos, sin = (position * frequencies).cos().float(), (position * frequencies).sin().float()
        turned[row, :, :half] = x[row, :, :half] * cos - x[row, :, half:] * sin
        turned[row, :, half:] = x[row, :, half:] * cos + x[row, :, :half] * sin
    return turned
