"""Reading and writing what is trained: adapters, and published checkpoints that carry base and beacons in one folder.

An adapter is a folder: `beacon.json` (the `beacon_*` settings, the base it was made for, a chat template if it was
trained with one of its own), `beacon.safetensors` (the beacon parameters, and `token_salience` and
`token_starts_word` where the placement needs them) and, if the base needs
one, `reader/` (a LoRA of the base in PEFT's own form).
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils.hub import cached_file

from beacon_memory.config import BeaconConfig
from beacon_memory.errors import AdapterError, ConfigError

__all__ = ["Adapter", "base_name", "read_adapter", "read_published", "write_adapter"]

SETTINGS, WEIGHTS, LORA = "beacon.json", "beacon.safetensors", "reader"


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter as it lies on disk.

    tensors: the beacon parameters under their published names; empty for a base without any.
    base:    what is known of the base it was made for: `name`, `digest` (see Fingerprint.base).
    lora:  folder of a PEFT LoRA to be merged into the base.
    """

    config: BeaconConfig
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    token_salience: Tensor | None = None
    token_starts_word: Tensor | None = None
    chat_template: str | None = None
    base: Mapping[str, str] = field(default_factory=dict)
    lora: Path | None = None


def read_adapter(source: str | Path) -> Adapter:
    """Read an adapter from a folder, or from the hub by name. Raises AdapterError if it cannot be."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source))
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        config = BeaconConfig.from_dict(settings)
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise AdapterError(f"{folder} is no adapter: it lacks {Path(error.filename or WEIGHTS).name}") from error
    except (ValueError, AttributeError, SafetensorError, ConfigError) as error:
        raise AdapterError(f"the adapter in {folder} cannot be read: {error}") from error
    lora = folder / LORA
    base = settings.get("base") or {}
    return Adapter(
        config=config,
        token_salience=tensors.pop("token_salience", None),
        token_starts_word=tensors.pop("token_starts_word", None),
        tensors=tensors,
        chat_template=settings.get("chat_template"),
        base=base if isinstance(base, dict) else {"name": str(base)},
        lora=lora if lora.is_dir() else None,
    )


def base_name(base: str | Path) -> str:
    """What to call a base model in what others read: a folder by its last part, not by where it lay on this disk."""
    return Path(base).name if Path(base).is_dir() else str(base)


def write_adapter(folder: str | Path, adapter: Adapter) -> None:
    """Write `beacon.json` and `beacon.safetensors`, and a copy of the LoRA."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors.items()}
    for name in ("token_salience", "token_starts_word"):
        if (of_tokens := getattr(adapter, name)) is not None:
            tensors[name] = of_tokens.cpu()
    settings: dict[str, Any] = {"base": dict(adapter.base), **adapter.config.to_dict()}
    if adapter.chat_template is not None:
        settings["chat_template"] = adapter.chat_template
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    lora = folder / LORA
    if adapter.lora is None:
        shutil.rmtree(lora, ignore_errors=True)  # of an earlier adapter
    elif adapter.lora.resolve() != lora.resolve():
        shutil.copytree(adapter.lora, lora, dirs_exist_ok=True)


def read_published(base: str | Path, config: PretrainedConfig) -> Adapter | None:
    """The beacon parameters inside a base checkpoint of the published layout; None if its config has no beacon keys.

    A checkpoint with the settings but without parameters of some kind is one to be trained: they start from the base.
    """
    settings = {key: value for key, value in config.to_dict().items() if key.startswith("beacon_")}
    if not settings:
        return None
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(base):
        with safe_open(path, framework="pt") as weights:
            tensors |= {name: weights.get_tensor(name) for name in weights.keys() if "beacon" in name}  # noqa: SIM118
    return Adapter(config=BeaconConfig.from_dict(settings), tensors=tensors)


def with_absent_kinds(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, and from `own` the parameters of each kind (q, k, v, o, embedding) that they have none of.

    A kind of which only some layers are there is left as it is: the checkpoint is damaged, and will be refused.
    """

    def kind(name: str) -> str:
        return name.rpartition("beacon_")[2].partition(".")[0]

    given = {kind(name) for name in tensors}
    return {**{name: tensor for name, tensor in own.items() if kind(name) not in given}, **tensors}


def _weight_files(base: str | Path) -> list[str]:
    """The safetensors files of a checkpoint that hold beacon parameters."""
    index = cached_file(base, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        names = {"model.safetensors"}
    else:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = {file for name, file in weight_map.items() if "beacon" in name}
    paths = [cached_file(base, name, _raise_exceptions_for_missing_entries=False) for name in sorted(names)]
    found = [path for path in paths if path is not None]
    if len(found) < len(paths):
        raise AdapterError(f"{base} has beacon settings but no safetensors weights; convert the checkpoint first")
    return found


def _download(name: str) -> Path:
    patterns = [SETTINGS, WEIGHTS, f"{LORA}/*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(
            f"adapter {name!r} is neither a folder nor a model that the hub can give: {error}"
        ) from error


def warn_of_another_base(adapter: Adapter, digest: str) -> None:
    """Warn if the adapter was trained on a base whose weights differ from the loaded one's."""
    if adapter.base.get("digest", digest) != digest:
        warnings.warn(
            f"the adapter was trained on {adapter.base.get('name')!r}, whose weights differ from those of the loaded "
            "base model; answers may be worse",
            stacklevel=3,
        )
