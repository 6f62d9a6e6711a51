"""A LoRA of answers: it changes how the tokens behind a memory are read, and never how documents are.

So a model can learn to answer from what is left of a text while the K/V that were stored keep their meaning: the
fingerprint knows nothing of this LoRA. Switching one on for some tokens alone is due to Greenewald et al., "Activated
LoRA" (arXiv 2504.12397).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .cache import MemoryCache
from .packed_cache import PackedCache
from .projections import BeaconLinear

__all__ = ["AnsweringLinear", "answering_layers", "in_answers", "install_answering", "remove_answering"]

# Whether the decoder layer that is running reads what follows a memory. The layer's own hooks set it from the keyword
# arguments of the call, so it is right in every thread, and when gradient checkpointing runs a layer a second time.
_answering: ContextVar[bool] = ContextVar("answering", default=False)
_in_answers: ContextVar[bool] = ContextVar("in_answers", default=False)  # see `in_answers`


# Bytes of a layer's weights up to which they are held a second time, with the change added: beside so small a product
# two more would take a good part of the time. Of a larger layer the change is worked out apart.
_SMALL = 2**23


class AnsweringLinear(nn.Module):
    """A linear layer of a stock model (`base`), and a change of low rank for tokens that follow a memory.

    down: [rank, in_features]; up: [out_features, rank].
    """

    changed: Tensor | None

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(down.to(base.weight), requires_grad=False)
        self.up = nn.Parameter(up.to(base.weight), requires_grad=False)
        self.scaling = scaling
        self.register_buffer("changed", None, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Project rows, [..., in_features]."""
        if not _answering.get():
            projected: Tensor = self.base(rows)
            return projected
        if self.base.weight.nbytes <= _SMALL and not self.up.requires_grad:
            return linear(rows, self._changed(), self.base.bias)
        projected = self.base(rows)
        reduced = linear(rows, self.down).flatten(0, -2)
        return torch.addmm(projected.flatten(0, -2), reduced, self.up.T, alpha=self.scaling).view_as(projected)

    def _changed(self) -> Tensor:
        """Return the weights with the change added, made when they are first needed."""
        if self.changed is None:
            with torch.inference_mode(mode=False), torch.no_grad():
                change = (self.up.float() @ self.down.float()) * self.scaling
                self.changed = (self.base.weight + change).to(self.base.weight.dtype)
        return self.changed


def _enter(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    cache, attention = kwargs.get("past_key_values"), kwargs.get("beacon_pass")
    ours = isinstance(cache, MemoryCache | PackedCache) or getattr(attention, "answers", False)
    _answering.set(ours or _in_answers.get())


def _leave(_module: nn.Module, _args: Any, _output: Any) -> None:
    _answering.set(False)


@contextmanager
def in_answers() -> Iterator[None]:
    """Let every pass in this block be one of what follows a memory, whatever carries the memory."""
    before = _in_answers.set(True)
    try:
        yield
    finally:
        _in_answers.reset(before)


def install_answering(
    base: PreTrainedModel, factors: Mapping[str, tuple[Tensor, Tensor]], scaling: float
) -> Iterator[RemovableHandle]:
    """Give layers of the base a change of low rank; yield the hooks that it needs.

    factors: by the name of a linear layer of the stock model, `down` and `up`. Where beacons have a projection of their
             own, only that of the raw rows is changed.
    """
    for name, (down, up) in factors.items():
        layer = base.get_submodule(name)
        if isinstance(layer, BeaconLinear):
            layer.base = AnsweringLinear(cast(nn.Linear, layer.base), down, up, scaling)
        else:
            base.set_submodule(name, AnsweringLinear(cast(nn.Linear, layer), down, up, scaling))
    for layer in base.model.layers:
        yield layer.register_forward_pre_hook(_enter, with_kwargs=True)
        yield layer.register_forward_hook(_leave, always_call=True)


def answering_layers(base: PreTrainedModel) -> Iterator[tuple[str, AnsweringLinear]]:
    """Yield the layers with a change of low rank, each with its name in the stock model."""
    for name, layer in base.named_modules():
        if isinstance(layer, AnsweringLinear):
            yield name.removesuffix(".base"), layer


def remove_answering(base: PreTrainedModel) -> None:
    """Put the stock linear layers back where there is a change of low rank."""
    for name, layer in [*base.named_modules()]:
        if isinstance(layer, AnsweringLinear):
            base.set_submodule(name, layer.base)
