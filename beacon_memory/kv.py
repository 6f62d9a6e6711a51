"""Position-free keys and values: what is kept of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["BeaconKV"]


@dataclass(frozen=True, slots=True, eq=False)
class BeaconKV:
    """Keys and values of some memory slots at every layer.

    keys:   [layers, kv_heads, slots, head_dim], **before** RoPE, so a slot has no position until it is loaded.
    values: [layers, kv_heads, slots, head_dim]
    """

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.keys.ndim != 4 or self.keys.shape != self.values.shape:
            raise InputError(
                "keys and values must both be [layers, kv_heads, slots, head_dim], "
                f"got {tuple(self.keys.shape)} and {tuple(self.values.shape)}"
            )

    @classmethod
    def empty(
        cls,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> BeaconKV:
        """K/V of no slots at all."""
        shape = (layers, kv_heads, 0, head_dim)
        return cls(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))

    @property
    def slots(self) -> int:
        """How many memory slots, that is positions of the model, this takes."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values together."""
        return self.keys.nbytes + self.values.nbytes

    def __getitem__(self, slots: slice | Tensor) -> BeaconKV:
        """The K/V of some slots: a slice, or a tensor of slot numbers."""
        return BeaconKV(self.keys[:, :, slots], self.values[:, :, slots])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BeaconKV:
        """The same K/V on another device or in another dtype."""
        return BeaconKV(self.keys.to(device=device, dtype=dtype), self.values.to(device=device, dtype=dtype))

    @staticmethod
    def concat(parts: Sequence[BeaconKV]) -> BeaconKV:
        """The slots of all parts, one after another; a part that is alone is not copied. Raises InputError for none."""
        if not parts:
            raise InputError("BeaconKV.concat needs at least one part")
        parts = [part for part in parts if part.slots] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        return BeaconKV(
            torch.cat([part.keys for part in parts], dim=2), torch.cat([part.values for part in parts], dim=2)
        )
