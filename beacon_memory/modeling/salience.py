"""How informative tokens are, so that beacons can be placed after the most informative ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from beacon_memory.errors import AdapterError, ConfigError

__all__ = ["TokenSalience"]

# The tensors that each placement needs; `end` needs none.
_NEEDED = {"salient": ("token_salience",), "salient-words": ("token_salience", "token_starts_word")}


@dataclass(frozen=True, slots=True, eq=False)
class TokenSalience:
    """The salience of tokens, as `beacon_placement` uses it.

    placement:         `beacon_placement` of the settings.
    vocab:             size of the model's vocabulary.
    token_salience:    [vocab] how informative each token is.
    token_starts_word: [vocab] bool, whether a word begins with the token.

    Raises ConfigError if the placement needs a tensor that is not there, AdapterError for one of another vocabulary.
    """

    placement: str
    vocab: int
    token_salience: Tensor | None = None
    token_starts_word: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in self._by_name().items():
            if tensor is None and name in _NEEDED.get(self.placement, ()):
                raise ConfigError(
                    f"beacon_placement={self.placement!r} needs {name}, one entry for each of the vocabulary"
                )
            if tensor is not None and len(tensor) != self.vocab:
                raise AdapterError(f"{name} has {tensor.numel()} entries, the base's vocabulary {self.vocab}")

    def _by_name(self) -> dict[str, Tensor | None]:
        return {"token_salience": self.token_salience, "token_starts_word": self.token_starts_word}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that there are, by the names under which an adapter stores them."""
        return {name: tensor for name, tensor in self._by_name().items() if tensor is not None}

    def __call__(self, ids: Sequence[int]) -> list[float]:
        """Return how informative each token of a text is; with `salient-words`, how informative its word is.

        The salience of a word is the sum over its tokens, divided by the square root of their number. The sum alone
        would favour long words, and the mean would favour parts of words.
        """
        tokens = list(ids)
        scores = cast(Tensor, self.token_salience)[tokens].float()  # the constructor requires it where it is used
        if self.placement == "salient-words":
            starts = cast(Tensor, self.token_starts_word)[tokens]
            word = starts.cumsum(0)
            length = torch.bincount(word).clamp(min=1)
            scores = (torch.bincount(word, scores) / length.sqrt())[word]
        return scores.tolist()
