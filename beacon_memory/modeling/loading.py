"""Loading of the stock parts: base model and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.hub import cached_file

from beacon_memory.errors import ConfigError, ModelError
from beacon_memory.kv.fingerprint import digest_json

from .gguf_file import GGUF_DTYPE, gguf_options, is_gguf, one_gguf_reader
from .support import require_supported

__all__ = ["load_base", "tokenizer_digest"]


def load_base(
    base: str | Path, device: str | torch.device | None, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a stock causal language model and its tokenizer (None if there is none) from a folder or the hub.

    base:  also the path of a GGUF file, whose weights are dequantized.
    dtype: `auto` for that of the checkpoint, or float32 on a processor that is slower with 16 bits, if there is room.

    Remote code is never executed. Raises ModelError if the model cannot be loaded whole, UnsupportedModelError, before
    its weights are read, if it cannot carry beacons, and ConfigError for a dtype that no model computes in.
    """
    chosen, asked = _usable_device(device), _usable_dtype(dtype)
    gguf = is_gguf(base)
    named = gguf_options(Path(base)) if gguf else {"pretrained_model_name_or_path": base}
    how: dict[str, Any] = {"dtype": GGUF_DTYPE if gguf and asked == "auto" else asked, "attn_implementation": "sdpa"}
    if gguf:
        how["quantization_config"] = GgufConfig(dequantize=True)
    try:
        with one_gguf_reader() if gguf else nullcontext(), _without_load_report():
            config = AutoConfig.from_pretrained(**named, trust_remote_code=False)
            require_supported(config)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **named,
                **how,
                config=config,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            tokenizer = _load_tokenizer(base, named)
    except ModelError:
        raise
    except Exception as error:  # whatever is missing or damaged, in the words of whoever noticed
        raise ModelError(f"the base model {str(base)!r} cannot be loaded: {error}") from error
    model, report = loaded
    model.config.name_or_path = str(base)
    for problem, found in {"lacks": "missing_keys", "has a wrong shape for": "mismatched_keys"}.items():
        if report[found]:
            first = min(map(str, report[found]))
            raise ModelError(f"the checkpoint {str(base)!r} {problem} {len(report[found])} parameters, such as {first}")
    if asked == "auto" and chosen.type == "cpu" and _is_faster_in_float32(model):
        return model.float(), tokenizer
    try:
        return model.to(chosen), tokenizer
    except RuntimeError as error:  # there is no room for it
        raise ModelError(f"device {str(chosen)!r} cannot be used: {error}") from error


def _usable_device(device: str | torch.device | None) -> torch.device:
    """Return the device to compute on; raises ModelError for one that is not there, or holds no numbers."""
    chosen = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        usable = torch.device(chosen)
        torch.ones(1, device=usable).item()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # torch raises one or another
        raise ModelError(f"device {str(chosen)!r} cannot be used: {error}") from error
    return usable


def _usable_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """Return `auto` or the dtype of a name; raises ConfigError for one that no model computes in."""
    name = str(dtype).removeprefix("torch.")
    if name not in ("auto", "bfloat16", "float16", "float32", "float64"):
        raise ConfigError(f"dtype={dtype!r} must be auto, bfloat16, float16, float32 or float64")
    usable: torch.dtype | str = name if name == "auto" else getattr(torch, name)
    return usable


def _is_faster_in_float32(model: PreTrainedModel) -> bool:
    """Return whether the processor is slow in the model's 16-bit dtype, and there is memory enough for float32.

    Without instructions for it (with AVX2 alone, for example) a matrix product in bfloat16 takes several times as long.
    """
    if model.dtype not in (torch.bfloat16, torch.float16) or _multiplies_in(model.dtype):
        return False
    return bool(4 * model.num_parameters() < psutil.virtual_memory().available / 2)


def _multiplies_in(dtype: torch.dtype) -> bool:
    """Return whether oneDNN, which torch computes with on processors, has kernels of a 16-bit dtype for this one."""
    if not torch.backends.mkldnn.is_available():
        return True  # then nothing is known, and the checkpoint's dtype is as good as another
    ops: Any = torch.ops.mkldnn
    supported = ops._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported
    return bool(supported())


def _load_tokenizer(base: str | Path, named: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    names = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
    if "gguf_file" not in named and not any(
        cached_file(base, name, _raise_exceptions_for_missing_entries=False) for name in names
    ):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**named, trust_remote_code=False)
    except Exception as error:  # a damaged file raises one error or another, depending on the damaged place
        raise ModelError(f"the tokenizer of {str(base)!r} cannot be loaded: {error!r}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {str(base)!r} is a {type(tokenizer).__name__}, which does not say where in a text its "
            "tokens stand; take a checkpoint with a tokenizer.json"
        )
    return tokenizer


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence the report of unused keys: all beacon parameters of a published checkpoint would be in it."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return a short hash of how a tokenizer cuts text. Its current padding and truncation do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest_json(None if tokenizer is None else sorted(tokenizer.get_vocab().items()))
    state = json.loads(backend.to_str())
    return digest_json({key: value for key, value in state.items() if key not in ("padding", "truncation")})
