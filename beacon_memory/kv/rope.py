"""Rotary position embedding (RoPE), applied and undone in float32.

    rotate([a, b], p) = [a cos(p f) - b sin(p f), b cos(p f) + a sin(p f)],   f: inverse frequencies

(Su et al., arXiv 2104.09864, in the half-split form of Llama.) Keys that are kept
before RoPE can be given any position later.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rope", "apply_rotation"]


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """The rotary embedding of one model.

    inv_freq: [head_dim / 2] float32, radians per position.
    scaling:  factor by which the model multiplies cos and sin; 1.0 except for yarn.
    """

    inv_freq: Tensor
    scaling: float = 1.0

    @property
    def key(self) -> tuple[float, ...]:
        """Return what tells this rotation from another."""
        return (self.scaling, *self.inv_freq.tolist())

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin for `positions` [...]: two float32 tensors [..., head_dim / 2]."""
        cos, sin = self.turn(positions)
        return cos * self.scaling, sin * self.scaling

    def turn(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        """Return the table that moves what is rotated, and scaled, already by `distances` [...] positions."""
        angles = distances[..., None].float() * self.inv_freq.to(distances.device)
        return angles.cos(), angles.sin()

    def remove_scaling(self, x: Tensor) -> Tensor:
        """Divide `x`, at position 0, by the scaling that a stock model has applied, which was rounded to x's dtype."""
        if self.scaling == 1.0:
            return x
        return (x.float() / torch.tensor(self.scaling, dtype=x.dtype).item()).to(x.dtype)


def apply_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [..., rows, head_dim] by a `Rope.table` [rows, head_dim / 2], in float32; returns x's dtype."""
    first, second = (half.float() for half in x.chunk(2, dim=-1))
    rotated = torch.cat(((first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)), dim=-1)
    return rotated.to(x.dtype)
