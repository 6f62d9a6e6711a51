"""The header of a safetensors file, told from the forms of its tensors alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

__all__ = ["NamedForm", "header_of", "spans_of"]

# dtype and shape of a tensor, the dtype by the name that torch has for it.
NamedForm = tuple[str, Sequence[int]]
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint8": "U8"}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
_ALIGNMENT = 8  # bytes, of the first tensor


def spans_of(forms: Mapping[str, NamedForm]) -> dict[str, tuple[int, int]]:
    """Return where each tensor starts and stops behind the header, in the order that `safetensors` writes them in."""
    spans, at = {}, 0
    for name in sorted(forms, key=lambda name: (-_BYTES[forms[name][0]], name)):
        dtype, shape = forms[name]
        spans[name] = (at, at + _BYTES[dtype] * math.prod(shape))
        at = spans[name][1]
    return spans


def header_of(forms: Mapping[str, NamedForm], metadata: Mapping[str, str]) -> bytes:
    """Return all that stands before the tensors; metadata: texts by their names."""
    tensors = {
        name: {"dtype": _NAMES[forms[name][0]], "shape": list(forms[name][1]), "data_offsets": list(span)}
        for name, span in spans_of(forms).items()
    }
    text = json.dumps({"__metadata__": dict(metadata), **tensors}, ensure_ascii=False, separators=(",", ":"))
    data = text.encode()
    data += b" " * (-len(data) % _ALIGNMENT)
    return len(data).to_bytes(8, "little") + data
