"""What must match for stored K/V to be usable with a loaded model.

K/V are only meaningful to the very weights that made them. A fingerprint names each ingredient by a short hash, so
that a mismatch can say *which* one differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from beacon_memory.errors import CorruptFileError, FingerprintMismatchError

__all__ = ["Fingerprint", "digest_json", "digest_tensors"]

_SAMPLES = 4096  # elements of each tensor that a sampled digest reads
_HEX = 16  # characters kept of a sha256


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """One short hash for each ingredient of stored K/V."""

    base: str
    adapter: str
    tokenizer: str
    config: str
    rope: str

    @property
    def digest(self) -> str:
        """One hash over all ingredients."""
        return digest_json(asdict(self))

    def require(self, stored: Fingerprint, document: str) -> None:
        """Raise FingerprintMismatchError unless `stored`, the fingerprint of a document, equals this one."""
        different = [f.name for f in fields(self) if getattr(self, f.name) != getattr(stored, f.name)]
        if different:
            raise FingerprintMismatchError(
                f"document {document!r} was compressed with another {', '.join(different)} than the loaded model has; "
                "load the model and adapter that made it, or add the document again to recompress it"
            )

    def to_dict(self) -> dict[str, str]:
        """The ingredients by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, ingredients: Mapping[str, object]) -> Fingerprint:
        """Read what `to_dict` wrote; raises CorruptFileError if an ingredient is missing, unknown or not text."""
        names = {f.name for f in fields(cls)}
        if set(ingredients) != names or not all(isinstance(v, str) for v in ingredients.values()):
            raise CorruptFileError(f"a fingerprint must have the texts {sorted(names)}, got {dict(ingredients)!r}")
        return cls(**{name: str(ingredients[name]) for name in names})


def digest_json(value: object) -> str:
    """A short hash of any JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_HEX]


def digest_tensors(tensors: Iterable[tuple[str, Tensor]], *, sampled: bool = False) -> str:
    """A short hash of named tensors: names, shapes and elements rounded to bfloat16.

    The rounding makes the hash the same whichever dtype a checkpoint was loaded in. With `sampled`, 4,096 evenly
    spaced elements stand for each tensor: enough to tell any two trainings of a model apart, at no cost.
    """
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors):
        flat = tensor.detach().flatten()
        if sampled and flat.numel() > _SAMPLES:
            flat = flat[:: -(-flat.numel() // _SAMPLES)]
        hasher.update(f"{name}{tuple(tensor.shape)}".encode())
        hasher.update(flat.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return hasher.hexdigest()[:_HEX]
