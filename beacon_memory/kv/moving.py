"""Tensors that move between a device and RAM."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["on_device"]


def on_device(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """Return a tensor on another device; None leaves it where it is.

    What comes from a CUDA device into RAM lies in pinned memory, so that it goes back without a copy in between, and
    while others are on their way. PyTorch's allocator takes up to twice the bytes for it.
    """
    if device is None:
        return tensor
    if tensor.device.type == "cuda" and torch.device(device).type == "cpu":
        return torch.empty_like(tensor, device=device, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=tensor.is_pinned())
