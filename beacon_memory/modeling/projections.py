"""Linear layers with two sets of weights: one for raw rows, one for beacon rows."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .attention import AttentionPass

__all__ = ["BeaconLinear", "beacon_parameters", "install_projections", "remove_projections"]

# How many rows are raw in the attention module that is running now. The module's own hooks set it from the keyword
# arguments of the call, so it is right in every thread, and when gradient checkpointing runs a layer a second time.
_raw_rows: ContextVar[int | None] = ContextVar("raw_rows", default=None)


class BeaconLinear(nn.Module):
    """A linear layer of a stock model (`base`), and a second one for beacon rows (`beacon`) that starts as its copy.

    In a pass with beacons, input and output are [1, rows, features], with all raw rows before all beacon rows. In any
    other call it computes what `base` computes.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.beacon = copy.deepcopy(base)

    def forward(self, rows: Tensor) -> Tensor:
        """Project raw rows with `base` and beacon rows with `beacon`."""
        raw_rows = _raw_rows.get()
        if raw_rows is None or raw_rows == rows.shape[1]:
            projected: Tensor = self.base(rows)
            return projected
        # with two axes, because a slice of a tensor with three is not dense and would use a slower kernel
        return torch.cat((self.base(rows[0, :raw_rows]), self.beacon(rows[0, raw_rows:])))[None]


def _enter(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    beacon_pass: AttentionPass | None = kwargs.get("beacon_pass")
    _raw_rows.set(beacon_pass.raw_rows if beacon_pass is not None else None)


def _leave(_module: nn.Module, _args: Any, _output: Any) -> None:
    _raw_rows.set(None)


def install_projections(attentions: Iterable[nn.Module], param: Iterable[str]) -> Iterator[RemovableHandle]:
    """Give the attention modules beacon projections for each of `param` (q, k, v, o); yield the hooks they need."""
    names = [f"{letter}_proj" for letter in param]
    for attention in attentions:
        for name in names:
            setattr(attention, name, BeaconLinear(getattr(attention, name)))
        yield attention.register_forward_pre_hook(_enter, with_kwargs=True)
        yield attention.register_forward_hook(_leave, always_call=True)


def remove_projections(attentions: Iterable[nn.Module]) -> None:
    """Put the stock linear layers of the attention modules back, where they have beacon projections."""
    for attention in attentions:
        for name, module in list(attention.named_children()):
            if isinstance(module, BeaconLinear):
                setattr(attention, name, module.base)


def beacon_parameters(attentions: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of the beacon projections, under the names of the published checkpoints."""
    for layer, attention in enumerate(attentions):
        for name, module in attention.named_children():
            if isinstance(module, BeaconLinear):
                for kind, parameter in module.beacon.named_parameters():
                    yield f"model.layers.{layer}.self_attn.beacon_{name}.{kind}", parameter
