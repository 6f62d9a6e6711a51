"""A probe: from one reading of a text it predicts what repeating the text would find, by a linear map in each layer.

What a head will look up shows in the keys and values themselves, as KVzap (arXiv 2601.07891) and Fast KVzip (arXiv
2601.17668) have found of hidden states. A linear map needs no training but a regression.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from beacon_memory.errors import AdapterError
from beacon_memory.kv.fingerprint import digest_tensors
from beacon_memory.kv.memory_kv import BeaconKV

__all__ = ["Probe", "features"]

_LEAST = 1e-12  # of what a logarithm is taken


def features(kv: BeaconKV, expected: Tensor, layer: int) -> Tensor:
    """Return what a probe knows of each token of a window in a layer, [tokens, kv_heads * (2 * head_dim + 3)] float32.

    These are the keys before RoPE and the values of all heads, and the logarithms of their squared norms and of the
    expected attention, as a multiple of its mean.

    kv: K/V of all tokens; expected: [layers, kv_heads, tokens] the attention that they may expect, 1 in all.
    """
    keys, values = (part[layer].float() for part in (kv.keys, kv.values))
    norms = [part.square().sum(-1) for part in (keys, values)]
    numbers = torch.cat((*norms, expected[layer] * expected.shape[-1])).clamp(min=_LEAST).log()
    return torch.cat((*keys, *values, numbers.T), dim=1)


@dataclass(frozen=True, eq=False)
class Probe:
    """Linear maps from `features` to the logarithm of the score of each head.

    weights: [layers, features, kv_heads] float32
    bias:    [layers, kv_heads] float32
    """

    weights: Tensor
    bias: Tensor

    def __call__(self, kv: BeaconKV, expected: Tensor) -> Tensor:
        """Return the scores of all entries of a window, [layers, kv_heads, tokens] float32; see `features`."""
        weights, bias = self.weights.to(kv.keys.device), self.bias.to(kv.keys.device)
        scores = [
            torch.addmm(bias[layer], features(kv, expected, layer), weights[layer]).T for layer in range(len(weights))
        ]
        return torch.stack(scores)

    @cached_property
    def digest(self) -> str:
        """Return a short hash of the maps."""
        return digest_tensors([("weights", self.weights), ("bias", self.bias)])

    def require_fits(self, layers: int, kv_heads: int, head_dim: int) -> None:
        """Raise AdapterError unless the probe is for K/V of this shape."""
        shape = [layers, kv_heads * (2 * head_dim + 3), kv_heads]
        if list(self.weights.shape) != shape or list(self.bias.shape) != [layers, kv_heads]:
            raise AdapterError(
                f"the probe has weights of shape {list(self.weights.shape)}, the base model needs {shape}: layers, "
                "features, kv_heads"
            )
