"""GGUF files, as llama.cpp has them: transformers reads them and dequantizes their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

__all__ = ["GGUF_DTYPE", "gguf_options", "is_gguf", "one_gguf_reader"]

GGUF_DTYPE = "bfloat16"  # in which weights are kept that were quantized
_ALONE = Lock()


def is_gguf(base: str | Path) -> bool:
    """Tell whether a base model is named by the path of a GGUF file."""
    return str(base).lower().endswith(".gguf")


def gguf_options(file: Path) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that name a GGUF file, beside the folder that it lies in."""
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


@contextmanager
def one_gguf_reader() -> Iterator[None]:
    """Read a GGUF file once: transformers does so for tokenizer, settings and weights anew, which takes longest."""
    import gguf

    with _ALONE:
        reader = gguf.GGUFReader
        try:
            setattr(gguf, "GGUFReader", cache(reader))  # noqa: B010  # mypy takes no assignment to a class's name
            yield
        finally:
            setattr(gguf, "GGUFReader", reader)  # noqa: B010
