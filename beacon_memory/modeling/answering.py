"""A LoRA of answers: it changes how the tokens behind a memory are read, and never how documents are.

So a model can learn to answer from what is left of a text while the K/V that were stored keep their meaning: the
fingerprint knows nothing of this LoRA. Switching one on for some tokens alone is due to Greenewald et al., "Activated
LoRA" (arXiv 2504.12397).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .cache import MemoryCache
from .packed_cache import PackedCache
from .projections import BeaconLinear

__all__ = ["AnsweringLinear", "answering_layers", "install_answering", "remove_answering"]

# Whether the decoder layer that is running reads what follows a memory. The layer's own hooks set it from the keyword
# arguments of the call, so it is right in every thread, and when gradient checkpointing runs a layer a second time.
_answering: ContextVar[bool] = ContextVar("answering", default=False)


class AnsweringLinear(nn.Module):
    """A linear layer of a stock model (`base`), and a change of low rank for tokens that follow a memory.

    down: [rank, in_features]; up: [out_features, rank].
    """

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.scaling = scaling

    def forward(self, rows: Tensor) -> Tensor:
        """Project rows, [..., in_features]."""
        projected: Tensor = self.base(rows)
        if not _answering.get():
            return projected
        reduced = linear(rows, self.down).flatten(0, -2)
        return torch.addmm(projected.flatten(0, -2), reduced, self.up.T, alpha=self.scaling).view_as(projected)


def _enter(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    cache, attention = kwargs.get("past_key_values"), kwargs.get("beacon_pass")
    _answering.set(isinstance(cache, MemoryCache | PackedCache) or getattr(attention, "answers", False))


def _leave(_module: nn.Module, _args: Any, _output: Any) -> None:
    _answering.set(False)


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
            layer.base = AnsweringLinear(layer.base, down, up, scaling)
        else:
            base.set_submodule(name, AnsweringLinear(layer, down, up, scaling))
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
