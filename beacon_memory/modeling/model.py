"""A stock transformers model that can also read with beacons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from beacon_memory.config import BeaconConfig
from beacon_memory.documents import Precision
from beacon_memory.errors import AdapterError, ConfigError, InputError, ModelError
from beacon_memory.kv.fingerprint import Fingerprint, digest_json, digest_tensors
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.kv.prefix import Prefix, Section
from beacon_memory.kv.rope import Rope

from .adapter import (
    Adapter,
    base_name,
    read_adapter,
    read_published,
    warn_of_another_base,
    with_absent_kinds,
    write_adapter,
)
from .answering import install_answering, remove_answering
from .attention import IMPLEMENTATION, AttentionPass, BeaconPass, PassEndedError, Watch
from .cache import bring_prefixes
from .default_model import default_adapter, ensure_default_model
from .layout import BeaconLayout, Cursor, Piece, Window, cut_windows
from .loading import load_base, tokenizer_digest
from .lora import lora_digest, lora_factors, merge_lora
from .probe import Probe
from .projections import beacon_parameters, install_projections, remove_projections
from .ratio_mix import mixed_ratios
from .repetition import RepeatedWindow, Repetition
from .salience import TokenSalience
from .support import attention_modules, max_positions, model_rope

__all__ = ["BeaconModel", "PassOutput", "require_made"]

UNTRAINED = "untrained"

# settings that stored K/V do not depend on: whatever they are now, any memory can be read
_READ_ANYWAY = (
    "beacon_ratio",
    "beacon_ratio_mix",
    "beacon_compression",
    "beacon_dense_ratio",
    "beacon_hybrid_factor",
)


@dataclass(frozen=True, slots=True, eq=False)
class PassOutput:
    """The result of one pass.

    hidden: [raw rows, hidden_size] last hidden state of each raw row.
    kept:   K/V of the pool entries that the caller asked to keep.
    """

    hidden: Tensor
    kept: BeaconKV


def _make_dense(_module: nn.Module, args: tuple[Tensor]) -> Tensor:
    """Copy the input of the head, so that it is dense: on a slice, as in `generate`, torch's CPU kernel is much slower.

    This is a pre-hook of the output embeddings.
    """
    return args[0].clone(memory_format=torch.contiguous_format)


def _leading_bos(tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return the bos token if a tokenizer puts it before every text, else an empty list."""
    bos = None if tokenizer is None else tokenizer.bos_token_id
    return [bos] if tokenizer is not None and bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


class BeaconModel(nn.Module):
    """A stock causal language model with beacon projections and a beacon embedding.

    `base` can still be used as the stock model that it is, to generate text for example. Only the methods here treat
    some rows as beacons. `detach` removes everything again. Use `from_pretrained` to load a model; call the constructor
    if you have loaded the base already.

    Untrained beacon projections are copies of the base's. An untrained beacon embedding is that of the token before the
    beacon (`last-token`), or that of the eos or bos token (`learned`).

    adapter:  folder or hub name of the trained beacons, or `untrained`.
    lora:     folder of the LoRA that was merged into the base, if any.
    answers:  folder of the LoRA that is used for what follows a memory, if any.
    probe:    what tells in one reading which tokens heads will need, if the adapter has it.
    lookup_heads: layer and query head of those that look answers up, if the adapter knows them; see `lookup`.
    kv_shape: (layers, kv_heads, head_dim) of its K/V.
    leading_bos: the bos token if the tokenizer puts it before every text, else nothing.
    salience: how informative tokens are, see TokenSalience.

    Raises UnsupportedModelError for a base model that cannot carry beacons. If the constructor fails, the base is left
    as it was.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: BeaconConfig,
        *,
        token_salience: Tensor | None = None,
        token_starts_word: Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        lora: Path | None = None,
        answers: Path | None = None,
        probe: Probe | None = None,
        lookup_heads: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        self._attentions = attention_modules(base)
        model_rope(base)  # refuses what cannot be supported
        vocab = base.config.vocab_size
        self.salience = TokenSalience(config.beacon_placement, vocab, token_salience, token_starts_word)
        self._base_digest = digest_tensors(base.named_parameters(), sampled=True)
        self._base_attention: str = base.config._attn_implementation
        self._base_trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
        self.base = base
        self.config = config
        self.max_positions = max_positions(base.config)
        attention: Any = self._attentions[0]
        heads = base.config.num_attention_heads // attention.num_key_value_groups
        self.kv_shape = (len(self._attentions), heads, int(attention.head_dim))
        if probe is not None:
            probe.require_fits(*self.kv_shape)
        query_heads = base.config.num_attention_heads
        if not all(0 <= layer < len(self._attentions) and 0 <= head < query_heads for layer, head in lookup_heads):
            raise AdapterError(
                f"lookup_heads={[*lookup_heads]} must be layers and heads of the base model, which has "
                f"{len(self._attentions)} layers of {query_heads} heads"
            )
        self.adapter = UNTRAINED
        self.lora = lora
        self.answers = answers
        self.probe = probe
        self.lookup_heads = tuple(lookup_heads)
        self._tokenizer = tokenizer
        self.leading_bos = _leading_bos(tokenizer)
        self._hooks: list[RemovableHandle] = []
        try:
            factors = lora_factors(base, answers) if answers is not None else None
            if lora is not None:
                self.base = merge_lora(base, lora)
            self._install()
            if factors is not None:
                self.install_answering(*factors)
        except BaseException:
            self._uninstall()
            raise

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | None = None,
        adapter: str | Path | None = None,
        *,
        config: BeaconConfig | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = "auto",
    ) -> BeaconModel:
        """Load a base model, from a folder, a GGUF file or the hub, and its beacons.

        base:    without one, the embedded default model and its adapter are loaded. Remote code is never executed.
        adapter: folder or hub name of the beacons. Without one, they come from the base checkpoint if it has the
                 published layout, else they are untrained and have the settings of `config`.
        device:  by default an accelerator, if there is one.
        dtype:   by default that of the checkpoint, or float32 on a processor that is slower with 16 bits, if there is
                 room.

        Raises ModelError, AdapterError, UnsupportedModelError or ConfigError.
        """
        if base is None:
            base, adapter = ensure_default_model(), adapter or default_adapter()
        model, tokenizer = load_base(base, device, dtype)
        source = read_adapter(adapter) if adapter is not None else read_published(base, model.config)
        if source is not None and config is not None:
            raise ConfigError("config is for beacons that start untrained, but these come with settings of their own")
        source = source or Adapter(config or BeaconConfig())
        if tokenizer is not None and source.chat_template is not None:
            tokenizer.chat_template = source.chat_template
        beacons = cls(
            model,
            source.config,
            token_salience=source.token_salience,
            token_starts_word=source.token_starts_word,
            tokenizer=tokenizer,
            lora=source.lora,
            answers=source.answers,
            probe=source.probe,
            lookup_heads=source.lookup_heads,
        )
        warn_of_another_base(source, beacons._base_digest, beacons.dtype)
        if source.tensors:
            own = dict(beacons.named_beacon_parameters())
            beacons.set_beacon_parameters(
                source.tensors if adapter is not None else with_absent_kinds(source.tensors, own)
            )
            beacons.adapter = str(adapter or base)
        return beacons.eval()

    def save_adapter(
        self,
        folder: str | Path,
        lora: Path | None = None,
        answers: Path | None = None,
        probe: Probe | None = None,
        *,
        lookup_heads: Sequence[tuple[int, int]] = (),
        trained: bool = True,
    ) -> None:
        """Write the beacons, in the model's dtype, the LoRAs and what was found out of the model to an adapter folder.

        lora, answers: folders of LoRAs that were trained with them; None takes those that were loaded with them.
        probe, lookup_heads: of this model; without, those that were loaded are taken, if `lora` is not another.
        trained:       whether the beacons are; those that are not are left out.
        """
        folder = Path(folder)
        tensors = {name: parameter.to(self.dtype) for name, parameter in self.named_beacon_parameters()}
        adapter = Adapter(
            config=self.config,
            tensors=tensors if trained else {},
            token_salience=self.salience.token_salience,
            token_starts_word=self.salience.token_starts_word,
            chat_template=self._tokenizer.chat_template if self._tokenizer is not None else None,
            base={"name": base_name(str(self.base.config.name_or_path)), "digest": self._base_digest},
            lora=lora or self.lora,
            answers=answers or self.answers,
            probe=probe or (self.probe if lora is None else None),
            lookup_heads=tuple(lookup_heads or (self.lookup_heads if lora is None else ())),
        )
        write_adapter(folder, adapter)

    def load_adapter(self, source: str | Path) -> None:
        """Load the beacons of another adapter, which must have the same settings and LoRAs as this model.

        Raises AdapterError if it has not. `from_pretrained` loads any adapter.
        """
        adapter = read_adapter(source)
        pairs = ((adapter.lora, self.lora), (adapter.answers, self.answers))
        if adapter.config != self.config or any(lora_digest(one) != lora_digest(own) for one, own in pairs):
            raise AdapterError(
                f"the adapter in {source} has other settings or another LoRA than the loaded model; "
                "load it with BeaconModel.from_pretrained(base, adapter=...)"
            )
        salience = replace(
            self.salience, token_salience=adapter.token_salience, token_starts_word=adapter.token_starts_word
        )
        if adapter.probe is not None:
            adapter.probe.require_fits(*self.kv_shape)
        self.set_beacon_parameters(adapter.tensors)
        self.salience = salience
        self.probe = adapter.probe
        self.adapter = str(source)
        self.__dict__.pop("fingerprint", None)

    @torch.no_grad()
    def set_beacon_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the values of all `named_beacon_parameters`; raises AdapterError if names or shapes differ."""
        own = dict(self.named_beacon_parameters())
        # the published checkpoints store the one learned vector as a table with one row
        given = {
            name: t[0] if name == "model.beacon_embed_tokens.weight" and t.ndim == 2 else t
            for name, t in tensors.items()
        }
        if set(given) != set(own):
            different = sorted(set(given) ^ set(own))
            raise AdapterError(
                f"the adapter lacks or has in excess {len(different)} parameters, for example {different[0]!r}; it "
                "does not fit its settings or this base model"
            )
        for name, parameter in own.items():
            if given[name].shape != parameter.shape:
                raise AdapterError(
                    f"{name} has shape {tuple(given[name].shape)}, the base model needs {tuple(parameter.shape)}"
                )
        for name, parameter in own.items():
            parameter.copy_(given[name])

    def _install(self) -> None:
        self.base.requires_grad_(False)
        self.base.set_attn_implementation(IMPLEMENTATION)
        self._hooks.append(self.base.get_output_embeddings().register_forward_pre_hook(_make_dense))
        for hook in install_projections(self._attentions, self.config.beacon_param):
            self._hooks.append(hook)  # one by one, so that after an error it is known which there are
        for attention in self._attentions:
            self._hooks.append(attention.register_forward_pre_hook(bring_prefixes, with_kwargs=True))
        embeddings = cast(Tensor, self.base.get_input_embeddings().weight)
        if self.config.beacon_embed == "last-token":
            self.beacon_embed = nn.Parameter(torch.zeros_like(embeddings[0]))
        else:
            token = getattr(self.base.config, f"{self.config.beacon_embed_init}_token_id")
            token = token[0] if isinstance(token, list) else token
            self.beacon_embed = nn.Parameter(embeddings[token or 0].detach().clone())
        for _, parameter in self.named_beacon_parameters():
            parameter.requires_grad_(True)

    def install_answering(self, factors: Mapping[str, tuple[Tensor, Tensor]], scaling: float) -> None:
        """Put a LoRA of answers into the base; see `answering.install_answering`."""
        for hook in install_answering(self.base, factors, scaling):
            self._hooks.append(hook)

    def _uninstall(self) -> None:
        """Undo what was installed, even if that failed half-way."""
        while self._hooks:
            self._hooks.pop().remove()
        remove_answering(self.base)
        remove_projections(self._attentions)
        self.base.set_attn_implementation(self._base_attention)
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_(name in self._base_trained)

    def detach(self) -> PreTrainedModel:
        """Take the beacons off the base and return it: a stock model, with its own modules, hooks and attention.

        A LoRA stays merged into its weights; that of answers is taken off. Afterwards this BeaconModel raises
        ModelError when it is to read, to load a memory, or to save its beacons.
        """
        self._uninstall()
        self.__dict__.pop("fingerprint", None)
        return self.base

    def _require_attached(self) -> None:
        if not self._hooks:
            raise ModelError(
                "this BeaconModel was detached from its base, which is a stock model again; load it anew with "
                "BeaconModel.from_pretrained to read with beacons or to answer from a memory"
            )

    def named_beacon_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that are trained, under the published names; the embedding is [hidden_size]."""
        self._require_attached()
        learned = self.config.beacon_embed == "learned"
        yield "model.beacon_embed_tokens.weight" if learned else "beacon_embed_offset", self.beacon_embed
        yield from beacon_parameters(self._attentions)

    @property
    def rope(self) -> Rope:
        """Return the base's RoPE. It is read anew each time, because a cast of the model casts its frequencies too."""
        return model_rope(self.base)

    @property
    def device(self) -> torch.device:
        """Return the device that the model is on."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that the model computes in."""
        return self.base.dtype

    @property
    def kv_dtype(self) -> torch.dtype:
        """Return the dtype that K/V are kept in unless another is asked for: the checkpoint's, if that takes less."""
        saved: torch.dtype | None = getattr(self.base.config, "dtype", None)
        return saved if saved is not None and saved.itemsize < self.dtype.itemsize else self.dtype

    @property
    def compression(self) -> str:
        """Return the compression for texts that are added without one, see `BeaconConfig.beacon_compression`."""
        if self.config.beacon_compression != "auto":
            return self.config.beacon_compression
        return "select" if self.adapter == UNTRAINED else "beacon"

    @property
    def slot_bytes(self) -> int:
        """Return the bytes of the K/V of one slot at all layers."""
        return 2 * math.prod(self.kv_shape) * self.kv_dtype.itemsize

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the base's tokenizer; raises InputError if the model was made without one."""
        if self._tokenizer is None:
            raise InputError("this BeaconModel was made without a tokenizer, which reading text needs")
        return self._tokenizer

    @property
    def sink_ids(self) -> list[int]:
        """Return the token ids of the sink, whose K/V come before all documents; ConfigError if there are several."""
        if self.config.beacon_sink_size == 0:
            return []
        if self.config.beacon_sink_size > 1:
            raise ConfigError(
                f"beacon_sink_size={self.config.beacon_sink_size}: documents can share a sink of 0 or 1 tokens only; "
                "a longer one holds text of one document"
            )
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self.base.config, name)
            if token is not None:
                return [token[0] if isinstance(token, list) else token]
        raise ConfigError("beacon_sink_size=1 needs a bos or eos token, and the base model's config names neither")

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint that stored K/V must have to be usable with this model.

        It is computed once, at the first use, so train the model before.
        """
        trained = [*self.named_beacon_parameters(), *self.salience.tensors.items()]
        settings = self.config.to_dict()
        settings = {key: settings[key] for key in settings if key not in _READ_ANYWAY}
        return Fingerprint(
            base=self._base_digest,
            adapter=digest_json([digest_tensors(trained), lora_digest(self.lora)]),
            tokenizer=tokenizer_digest(self._tokenizer),
            config=digest_json(settings),
            rope=digest_json([dict(self.base.config.rope_parameters), self.kv_shape[-1], self.max_positions]),
        )

    def cut(self, cursor: Cursor, ids: Sequence[int], ratios: Iterator[int], **how: Any) -> list[Window]:
        """Cut tokens into windows with this model's settings, see `layout.cut_windows`."""
        return cut_windows(cursor, ids, self.config, ratios, salience=self.salience, **how)

    def prefix(self, *memories: MemoryKV | Section) -> Prefix:
        """Return memories, one behind another, as a prefix of what is read, on the model's device.

        Those that are sections already are not copied.
        """
        self._require_attached()
        rope = self.rope
        sections = [
            Section.of(memory.to(self.device, self.dtype), rope) if isinstance(memory, MemoryKV) else memory
            for memory in memories
        ]
        return Prefix(sections, rope)

    def empty_kv(self) -> BeaconKV:
        """Return K/V with no slots, on the model's device."""
        return BeaconKV.empty(*self.kv_shape, dtype=self.dtype, device=self.device)

    def run(
        self,
        layout: BeaconLayout,
        past: BeaconKV,
        keep: list[int],
        *,
        prefixes: Sequence[Prefix | None] = (),
        watch: Watch | None = None,
        answers: bool = False,
    ) -> PassOutput:
        """Run one forward pass through the base's decoder, without its language-model head.

        past:     K/V of the past entries of the layout.
        keep:     numbers of the pool entries whose K/V are returned, in this order.
        prefixes: for each sequence a memory that it follows, or None; empty if no sequence has one.
        watch:    a function that observes the attention of every window, see Watch.
        answers:  whether its rows are what follows a memory, for which the LoRA of answers is used.
        """
        hidden = self.config.beacon_attn == "hidden"
        beacon_pass = BeaconPass(
            layout, self.rope, past, keep, hidden=hidden, prefixes=prefixes, watch=watch, answers=answers
        )
        last = self._decode(layout.raw_ids, beacon_pass, anchor_ids=layout.anchor_ids)
        return PassOutput(last[0, : len(layout.raw_ids)], beacon_pass.collected)

    def read(
        self,
        layout: BeaconLayout,
        past: BeaconKV,
        keep: list[int],
        *,
        prefixes: Sequence[Prefix | None] = (),
        watch: Watch | None = None,
    ) -> BeaconKV:
        """Do the same as `run` for the K/V alone: the pass ends when those of the last layer are known."""
        hidden = self.config.beacon_attn == "hidden"
        beacon_pass = BeaconPass(
            layout, self.rope, past, keep, hidden=hidden, prefixes=prefixes, watch=watch, ends=True
        )
        with suppress(PassEndedError):
            self._decode(layout.raw_ids, beacon_pass, anchor_ids=layout.anchor_ids)
        return beacon_pass.collected

    def repeat(self, windows: Sequence[RepeatedWindow]) -> list[Tensor]:
        """Repeat windows behind themselves in one pass, in pieces of PIECE tokens.

        Returns for each window the squares of the attention weights that its tokens receive, added up over queries,
        [layers, kv_heads, tokens] float32.
        """
        repetition = Repetition(windows, self.rope)
        with suppress(PassEndedError):
            self._decode([token for window in windows for token in window.ids], repetition)
        return repetition.received

    def _decode(self, raw_ids: list[int], attention: AttentionPass, *, anchor_ids: Sequence[int] = ()) -> Tensor:
        """Run the base's decoder on raw rows and beacons after these tokens; returns the last hidden states."""
        self._require_attached()
        embed = self.base.get_input_embeddings()
        ids = torch.tensor([[*raw_ids, *anchor_ids]], device=self.device)
        rows = embed(ids)
        raw = len(raw_ids)
        beacons = self.beacon_embed.to(rows.dtype).expand(1, len(anchor_ids), -1)
        if self.config.beacon_embed == "last-token":
            beacons = beacons + rows[:, raw:]
        output = self.base.model(
            inputs_embeds=torch.cat((rows[:, :raw], beacons), dim=1),
            position_ids=torch.zeros_like(ids),  # RoPE is the identity there: the attention function rotates
            attention_mask=torch.empty(1, 1, 0, 0, device=self.device),  # four axes: taken as it is, no mask is built
            use_cache=False,
            beacon_pass=attention,
        )
        last: Tensor = output.last_hidden_state
        return last

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., vocab] of last hidden states [..., hidden_size]."""
        logits: Tensor = self.base.get_output_embeddings()(hidden)
        return logits

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, ratios: Sequence[Iterator[int]] | None = None
    ) -> CausalLMOutput:
        """Predict each token from the beacons of earlier windows and the tokens of its own, as in training.

        input_ids: [batch, tokens], no padding. The last window of each row is read raw.
        labels:    [batch, tokens], aligned with input_ids (they are shifted here), -100 for none.
        ratios:    for each row the ratios of its windows; by default those of `beacon_ratio_mix`.

        Returns logits [batch, tokens, vocab] and the mean loss over all labels.
        """
        batch, tokens = input_ids.shape
        chosen = ratios or [mixed_ratios(self.config, tokens, self.max_positions) for _ in range(batch)]
        start = Cursor(sink_pending=self.config.beacon_sink_size)
        pieces = [
            Piece(start, self.cut(start, row, ratio, tail="raw"))
            for row, ratio in zip(input_ids.tolist(), chosen, strict=True)
        ]
        output = self.run(BeaconLayout.build(pieces, self.config), self.empty_kv(), keep=[])
        logits = self.head(output.hidden).unflatten(0, (batch, tokens))
        loss = None
        if labels is not None:
            shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
            loss = cross_entropy(logits.float().flatten(0, 1), shifted.flatten().to(logits.device))
        return CausalLMOutput(loss=cast(Any, loss), logits=cast(Any, logits))


def require_made(model: BeaconModel, stored: Fingerprint, document: str, precision: str | None) -> None:
    """Raise FingerprintMismatchError unless the K/V of a document were made by this model.

    stored, precision: their fingerprint, and in which number format they are kept.
    """
    rounded = (model.dtype == torch.float16) != (precision == Precision.FLOAT16)
    model.fingerprint.require(stored, document, rounded=rounded)
