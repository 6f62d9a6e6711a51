"""Reading and writing adapters, and reading published checkpoints that hold base and beacons in one folder.

An adapter is a folder with these files:

    beacon.json         the `beacon_*` settings, the base that it was made for, a chat template if it was trained with
                        one of its own, and `lookup_heads` if they are known, see `lookup`
    beacon.safetensors  the beacon parameters, and the tensors that a salient placement needs
    reader/             if it has one, a LoRA of the base in PEFT's own form
    answers/            if it has one, another that is used for what follows a memory alone, see `answering`
    probe.safetensors   if it has one, what tells in one reading which tokens heads will need, see `probe`
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils.hub import cached_file

from beacon_memory.config import BeaconConfig
from beacon_memory.errors import AdapterError, ConfigError

from .probe import Probe

__all__ = ["Adapter", "base_name", "read_adapter", "read_published", "write_adapter"]

SETTINGS, WEIGHTS, PROBE = "beacon.json", "beacon.safetensors", "probe.safetensors"
LORA, ANSWERS = "reader", "answers"


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """The content of an adapter folder.

    tensors: the beacon parameters under their published names; none if the beacons are untrained.
    base:    `name` and `digest` (see Fingerprint.base) of the base that it was made for, as far as known.
    lora:    folder of a PEFT LoRA that has to be merged into the base.
    answers: folder of a PEFT LoRA that is used for what follows a memory.
    probe:   what `--score expected` chooses tokens by.
    lookup_heads: layer and query head of those that look answers up; empty if nobody has found out.
    """

    config: BeaconConfig
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    token_salience: Tensor | None = None
    token_starts_word: Tensor | None = None
    chat_template: str | None = None
    base: Mapping[str, str] = field(default_factory=dict)
    lora: Path | None = None
    answers: Path | None = None
    probe: Probe | None = None
    lookup_heads: tuple[tuple[int, int], ...] = ()


def read_adapter(source: str | Path) -> Adapter:
    """Read an adapter from a folder, or from the hub by its name. Raises AdapterError if that is not possible."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source))
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        config = BeaconConfig.from_dict(settings)
        tensors = load_file(folder / WEIGHTS)
        probe = Probe(**load_file(folder / PROBE)) if (folder / PROBE).exists() else None
        heads = tuple((int(layer), int(head)) for layer, head in settings.get("lookup_heads", ()))
    except FileNotFoundError as error:
        raise AdapterError(f"{folder} is no adapter: it lacks {Path(error.filename or WEIGHTS).name}") from error
    except (ValueError, AttributeError, TypeError, SafetensorError, ConfigError) as error:
        raise AdapterError(f"the adapter in {folder} cannot be read: {error}") from error
    lora, answers = folder / LORA, folder / ANSWERS
    base = settings.get("base") or {}
    return Adapter(
        config=config,
        token_salience=tensors.pop("token_salience", None),
        token_starts_word=tensors.pop("token_starts_word", None),
        tensors=tensors,
        chat_template=settings.get("chat_template"),
        base=base if isinstance(base, dict) else {"name": str(base)},
        lora=lora if lora.is_dir() else None,
        answers=answers if answers.is_dir() else None,
        probe=probe,
        lookup_heads=heads,
    )


def base_name(base: str | Path) -> str:
    """Return the name of a base model that can be shown to others: of a folder or file its last part, not its path."""
    return Path(base).name if Path(base).exists() else str(base)


def write_adapter(folder: str | Path, adapter: Adapter) -> None:
    """Write an adapter folder, with copies of its LoRAs; what an earlier adapter left there goes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors.items()}
    for name in ("token_salience", "token_starts_word"):
        if (per_token := getattr(adapter, name)) is not None:
            tensors[name] = per_token.cpu()
    settings: dict[str, Any] = {"base": dict(adapter.base), **adapter.config.to_dict()}
    if adapter.chat_template is not None:
        settings["chat_template"] = adapter.chat_template
    if adapter.lookup_heads:
        settings["lookup_heads"] = adapter.lookup_heads
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    if adapter.probe is None:
        (folder / PROBE).unlink(missing_ok=True)  # left by an earlier adapter, as a LoRA below
    else:
        parts = {"weights": adapter.probe.weights, "bias": adapter.probe.bias}
        save_file({name: part.cpu().contiguous() for name, part in parts.items()}, folder / PROBE)
    for source, target in ((adapter.lora, folder / LORA), (adapter.answers, folder / ANSWERS)):
        if source is None:
            shutil.rmtree(target, ignore_errors=True)
        elif source.resolve() != target.resolve():
            shutil.copytree(source, target, dirs_exist_ok=True)


def read_published(base: str | Path, config: PretrainedConfig) -> Adapter | None:
    """Read the beacon parameters of a base checkpoint in the published layout; None if its config has no beacon keys.

    A checkpoint may have the settings but lack some kind of parameters, for example `beacon_q_proj` in every layer.
    Then these are still to be trained, and start as copies of the base's, see `with_absent_kinds`.
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
    """Fill up `tensors`: each kind of parameters (q, k, v, o, embedding) that it lacks is taken from `own`.

    If a kind is there for some layers only, nothing is filled in: the checkpoint is damaged and will be refused.
    """

    def kind(name: str) -> str:
        return name.rpartition("beacon_")[2].partition(".")[0]

    given = {kind(name) for name in tensors}
    return {**{name: tensor for name, tensor in own.items() if kind(name) not in given}, **tensors}


def _weight_files(base: str | Path) -> list[str]:
    """Return the safetensors files of a checkpoint that hold beacon parameters."""
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
    patterns = [SETTINGS, WEIGHTS, PROBE, f"{LORA}/*", f"{ANSWERS}/*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(
            f"adapter {name!r} is neither a folder nor a model that the hub can give: {error}"
        ) from error


def warn_of_another_base(adapter: Adapter, digest: str, dtype: torch.dtype) -> None:
    """Warn if the adapter was trained on a base whose weights differ from the loaded one's, which has this dtype."""
    if adapter.base.get("digest", digest) != digest:
        rounded = "; float16, which it was loaded in, is reason enough" if dtype == torch.float16 else ""
        warnings.warn(
            f"the adapter was trained on {adapter.base.get('name')!r}, whose weights differ from those of the loaded "
            f"base model; answers may be worse{rounded}",
            stacklevel=3,
        )
