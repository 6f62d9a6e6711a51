"""Loading the stock parts: base model, tokenizer and reader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .errors import AdapterError, ModelError
from .fingerprint import digest_json, digest_tensors

__all__ = ["load_base", "merge_reader", "reader_digest", "tokenizer_digest"]


def load_base(
    base: str | Path, device: str | torch.device | None, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A stock causal language model and its tokenizer (None if the checkpoint has none), from a folder or the hub.

    Remote code is never executed. Raises ModelError if the model cannot be loaded whole.
    """
    try:
        with _without_load_report():
            model, report = AutoModelForCausalLM.from_pretrained(
                base, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, HFValidationError, HfHubHTTPError) as error:
        raise ModelError(f"the base model {str(base)!r} cannot be loaded: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"the checkpoint {str(base)!r} lacks {len(missing)} parameters, for example {missing[0]!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError):
        tokenizer = None
    return model.to(device or default_device()), tokenizer


def default_device() -> torch.device:
    """The accelerator if this machine has one, else the CPU."""
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return accelerator
    return torch.device("cpu")


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence the report of unused keys: in a published checkpoint all beacon parameters are such."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def merge_reader(base: PreTrainedModel, reader: Path) -> PreTrainedModel:
    """The base with a PEFT LoRA merged into its weights: a stock model again. Raises AdapterError if it does not fit."""
    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(base, str(reader)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(f"the reader in {reader} does not fit the base model: {error}") from error
    return merged


def reader_digest(reader: Path | None) -> str:
    """A short hash of a reader's weights."""
    return digest_tensors(load_file(reader / "adapter_model.safetensors").items() if reader is not None else [])


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A short hash of how a tokenizer cuts text, whatever padding or truncation it was last used with."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest_json(None if tokenizer is None else sorted(tokenizer.get_vocab().items()))
    state = json.loads(backend.to_str())
    return digest_json({key: value for key, value in state.items() if key not in ("padding", "truncation")})
