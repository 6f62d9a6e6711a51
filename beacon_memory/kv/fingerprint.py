"""Fingerprints: whether stored K/V can be used with the model that is loaded.

K/V have a meaning only for the weights that computed them. A fingerprint holds a short hash of each thing that
decides them (base model, adapter, tokenizer, settings, RoPE), so that an error can say *which* one differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from beacon_memory.errors import CorruptFileError, FingerprintMismatchError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fingerprint", "digest_json", "digest_tensors"]

_SAMPLES = 4096  # elements of each tensor that a sampled digest reads
_HEX = 16  # characters kept of a sha256


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A short hash of each thing that decides what K/V a text has."""

    base: str
    adapter: str
    tokenizer: str
    config: str
    rope: str

    @property
    def digest(self) -> str:
        """Return one hash over all parts of the fingerprint."""
        return digest_json(asdict(self))

    def require(self, stored: Fingerprint, document: str, *, rounded: bool = False) -> None:
        """Raise FingerprintMismatchError unless `stored`, the fingerprint of a document, equals this one.

        rounded: whether just one of the two models computes in float16, which the message says then: it rounds small
        numbers of the other dtypes, and that alone gives weights another hash.
        """
        different = [f.name for f in fields(self) if getattr(self, f.name) != getattr(stored, f.name)]
        if not different:
            return
        same = ""
        if rounded and {"base", "adapter"}.issuperset(different):
            same = (
                ", or with the same in another dtype: one of the two was loaded in float16, which rounds small numbers "
                "of bfloat16 and float32, so load the model in the dtype that it had then"
            )
        raise FingerprintMismatchError(
            f"document {document!r} was compressed with another {', '.join(different)} than the loaded model has"
            f"{same}; load the model and adapter that made it, or add the document again to recompress it"
        )

    def to_dict(self) -> dict[str, str]:
        """Return the hashes by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, hashes: Mapping[str, object]) -> Fingerprint:
        """Read the result of `to_dict`; raises CorruptFileError if a hash is missing, unknown or not text."""
        names = {f.name for f in fields(cls)}
        if set(hashes) != names or not all(isinstance(value, str) for value in hashes.values()):
            raise CorruptFileError(f"a fingerprint must have the texts {sorted(names)}, got {dict(hashes)!r}")
        return cls(**{name: str(hashes[name]) for name in names})


def digest_json(value: object) -> str:
    """Return a short hash of any value that can be written as JSON; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_HEX]


def digest_tensors(tensors: Iterable[tuple[str, Tensor]], *, sampled: bool = False) -> str:
    """Return a short hash of named tensors: of their names, shapes, and elements rounded to bfloat16.

    Because of the rounding, the hash does not depend on the dtype in which a checkpoint was loaded. With `sampled`,
    only 4,096 evenly spaced elements of each tensor are read. That takes almost no time, and still tells any two
    trainings of a model apart.
    """
    import torch  # here, so that files are described without it

    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors):
        flat = tensor.detach().flatten()
        if sampled and flat.numel() > _SAMPLES:
            flat = flat[:: -(-flat.numel() // _SAMPLES)]
        hasher.update(f"{name}{tuple(tensor.shape)}".encode())
        hasher.update(flat.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return hasher.hexdigest()[:_HEX]
