"""The folder of a model for vLLM: a checkpoint with all LoRAs merged, and what has to be known of it beside.

    config.json, model.safetensors, tokenizer.json, ...   the checkpoint
    beacon_memory/model.safetensors                       K/V of the sink, RoPE, and whose memories can be used

In vLLM every request is an answer, so the LoRA of answers is merged into the weights, too. K/V of documents are made
without it, in this library; the fingerprint that they must have is in the folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from beacon_memory.errors import ConfigError, CorruptFileError, InputError
from beacon_memory.kv.fingerprint import Fingerprint, digest_tensors
from beacon_memory.kv.memory_kv import BeaconKV
from beacon_memory.kv.rope import Rope

__all__ = ["ModelFolder", "write_model_folder"]

_FILE = Path("beacon_memory", "model.safetensors")  # in a folder of its own, for vLLM takes all others for weights
_ENTRY, _FORMAT = "beacon_memory", 1


@dataclass(frozen=True, slots=True, eq=False)
class ModelFolder:
    """Tell what a folder says of its model.

    fingerprint: that K/V must have to be used with it.
    sink:        K/V that stand in front of every memory, [layers, kv_heads, 0 or 1 slots, head_dim], before RoPE.
    rope:        how keys are rotated.
    vocab_size:  ids of tokens that the tokenizer knows are below it.
    leading_bos: the bos token if the tokenizer puts it before every text, else nothing.
    """

    path: Path
    fingerprint: Fingerprint
    sink: BeaconKV
    rope: Rope
    vocab_size: int
    leading_bos: tuple[int, ...]

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what a folder says of its model.

        Raises ConfigError for a folder that `write_model_folder` has not written, or whose weights are others by now,
        and CorruptFileError for a damaged one.
        """
        path = Path(path)
        if not (path / _FILE).is_file():
            raise ConfigError(
                f"{path} has no {_FILE}: it is no folder of a model for vLLM; write one with "
                "`python -m vllm_beacon_memory FOLDER`"
            )
        try:
            with safe_open(path / _FILE, framework="pt") as file:
                said: dict[str, Any] = json.loads((file.metadata() or {})[_ENTRY])
                tensors = {name: file.get_tensor(name) for name in ("sink_keys", "sink_values", "inv_freq")}
            if said["format"] != _FORMAT:
                raise ConfigError(f"{path} is of format {said['format']}, not {_FORMAT}; write it anew")
            folder = cls(
                path,
                Fingerprint.from_dict(said["fingerprint"]),
                BeaconKV(tensors["sink_keys"], tensors["sink_values"]),
                Rope(tensors["inv_freq"], said["rope_scaling"]),
                said["vocab_size"],
                tuple(said["leading_bos"]),
            )
        except (SafetensorError, KeyError, TypeError, ValueError, InputError) as error:
            if isinstance(error, ConfigError):
                raise
            raise CorruptFileError(f"{path / _FILE} cannot be read: {error}; write the folder anew") from error
        if said["weights"] != _weights_digest(path):
            raise ConfigError(f"the weights in {path} are not those that were written with {_FILE}; write it anew")
        return folder

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Return layers, kv_heads and head_dim."""
        layers, heads, _, head_dim = self.sink.keys.shape
        return layers, heads, head_dim


def write_model_folder(
    folder: str | Path,
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    dtype: torch.dtype | str = "auto",
) -> None:
    """Write a model as a folder that vLLM loads, with the LoRAs of its adapter merged into its weights.

    folder: must not be there, or be empty; it appears whole.
    model, adapter, dtype: as `BeaconMemory` takes them; by default the embedded model with its adapter. The weights are
                           written in the dtype.
    Raises InputError for a folder that holds something, and what `BeaconModel.from_pretrained` raises.
    """
    from beacon_memory.compression.compressor import BeaconCompressor
    from beacon_memory.modeling.lora import merge_lora
    from beacon_memory.modeling.model import BeaconModel

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"folder={str(folder)!r} is there already; name one that is not, or an empty one")
    loaded = BeaconModel.from_pretrained(model, adapter, device="cpu", dtype=dtype)
    sink, rope, tokenizer = BeaconCompressor(loaded).sink, loaded.rope, loaded.tokenizer
    said: dict[str, Any] = {
        "format": _FORMAT,
        "fingerprint": loaded.fingerprint.to_dict(),
        "rope_scaling": rope.scaling,
        "vocab_size": min(loaded.base.config.vocab_size, len(tokenizer)),
        "leading_bos": loaded.leading_bos,
    }
    tensors = {"sink_keys": sink.keys, "sink_values": sink.values, "inv_freq": rope.inv_freq.float()}
    stock = loaded.detach()
    if loaded.answers is not None:
        stock = merge_lora(stock, loaded.answers)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        stock.save_pretrained(made)
        tokenizer.save_pretrained(made)
        said["weights"] = _weights_digest(made)
        (made / _FILE.parent).mkdir()
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, made / _FILE, metadata={_ENTRY: json.dumps(said)})
        made.replace(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _weights_digest(folder: Path) -> str:
    """Return a short hash of samples of all weights of a checkpoint."""

    def weights() -> Any:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names: list[str] = [*file.keys()]
                yield from ((name, file.get_tensor(name)) for name in names)

    found: list[tuple[str, Tensor]] = [*weights()]
    return digest_tensors(found, sampled=True)
