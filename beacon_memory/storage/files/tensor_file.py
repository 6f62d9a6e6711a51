"""A safetensors file that is written piece by piece: the package `safetensors` wants all of it in RAM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from .tensor_header import header_of, spans_of

__all__ = ["Form", "TensorFile", "tensor_bytes"]

# dtype and shape of a tensor.
Form = tuple[torch.dtype, Sequence[int]]
_CHUNK = 1 << 20  # bytes that are read at a time


class TensorFile:
    """Write tensors of known forms row by row, in any order; byte for byte what `safetensors` makes of them.

        with TensorFile(path, {"keys": (torch.uint8, (3, 2))}, {"format": "."}) as file:
            file.append("keys", torch.zeros(1, 2, dtype=torch.uint8))
            file.append("keys", torch.ones(2, 2, dtype=torch.uint8))
            file.describe({"format": "5"})

    metadata: texts by their names; others of the same length may take their place later, see `describe`.
    """

    def __init__(self, path: Path, forms: Mapping[str, Form], metadata: Mapping[str, str]) -> None:
        self._ends: dict[str, int] = {}
        self._forms = {name: (str(dtype).removeprefix("torch."), shape) for name, (dtype, shape) in forms.items()}
        self._spans = spans_of(self._forms)
        header = header_of(self._forms, metadata)
        self._start = len(header)
        self._file = path.open("r+b")
        self._file.truncate(self._start + max((stop for _, stop in self._spans.values()), default=0))
        self._file.write(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, name: str, rows: Tensor | bytes) -> None:
        """Write the next rows of a tensor: on the CPU, or as bytes."""
        data = tensor_bytes(rows) if isinstance(rows, Tensor) else rows
        at = self._ends.get(name, self._spans[name][0])
        self._file.seek(self._start + at)
        self._file.write(data)
        self._ends[name] = at + len(data)

    def read(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a tensor as they are in the file."""
        at, end = self._spans[name]
        while at < end:
            self._file.seek(self._start + at)
            chunk = self._file.read(min(_CHUNK, end - at))
            at += len(chunk)
            yield chunk

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata by others of the same length."""
        header = header_of(self._forms, metadata)
        if len(header) != self._start:
            raise ValueError(f"metadata of {len(header)} bytes cannot take the place of {self._start}")
        self._file.seek(0)
        self._file.write(header)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, without a copy if it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
