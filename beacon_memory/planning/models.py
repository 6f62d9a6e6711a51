"""The numbers of a model that decide what reading with it takes, without its weights."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from beacon_memory.config import BeaconConfig
from beacon_memory.errors import ConfigError, ModelError
from beacon_memory.modeling.default_model import DEFAULT_MODEL, default_adapter, default_model_folder

__all__ = ["ModelShape", "PlannedModel", "planned_model"]

_SETTINGS, _PROBE = "beacon.json", "probe.safetensors"  # of an adapter, see `modeling.adapter`


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Hold the sizes of a Llama-like decoder; raises ConfigError for one that is no whole number above 0.

    hidden, intermediate: width of the residual stream, and of the gated MLP.
    tied:      whether embedding and head share one matrix.
    positions: how many it can tell apart.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    positions: int = 32768

    def __post_init__(self) -> None:
        for name in (one.name for one in fields(self) if one.name != "tied"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r} of the model must be a whole number of at least 1")

    @property
    def kv_width(self) -> int:
        """The heads whose keys and values are kept, of all layers."""
        return self.layers * self.kv_heads

    @property
    def attention_weights(self) -> int:
        """The weights of the projections to queries, keys and values of one layer."""
        return self.hidden * self.head_dim * (self.heads + 2 * self.kv_heads)

    @property
    def layer_weights(self) -> int:
        """The weights of one layer that each token is multiplied with."""
        output, mlp = self.heads * self.head_dim * self.hidden, 3 * self.hidden * self.intermediate
        return self.attention_weights + output + mlp

    @property
    def head_weights(self) -> int:
        """The weights of the language-model head."""
        return self.vocabulary * self.hidden

    @property
    def step_weights(self) -> int:
        """The weights that a step of decoding reads: all layers and the head."""
        return self.layers * self.layer_weights + self.head_weights

    @property
    def weights(self) -> int:
        """All weights; norms and biases, less than a thousandth of them, are left out."""
        return self.step_weights + (0 if self.tied else self.head_weights)


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """Name a model, its numbers, the settings it is read with, and where its tokenizer lies, if anywhere here.

    adapted, probed: whether it has beacons, and a probe that tells which tokens to keep.
    """

    name: str
    shape: ModelShape
    config: BeaconConfig
    adapted: bool
    tokenizer: Path | None = None
    probed: bool = False

    @property
    def compression(self) -> str:
        """The method that `auto` stands for, as `BeaconModel.compression` has it."""
        if self.config.beacon_compression != "auto":
            return self.config.beacon_compression
        return "beacon" if self.adapted else "select"

    @property
    def score(self) -> str:
        """The score that `auto` stands for, as `BeaconCompressor` has it."""
        return "expected" if self.probed else "repeat"


def planned_model(name: str | None, adapter: str | None = None, shape: Mapping[str, int] | None = None) -> PlannedModel:
    """Find the numbers of a model; no weights are read.

    name:    that of the embedded model (None, too), a folder with a config.json, a name that `models.toml` has, or a
             name on the hub, whose config.json is fetched.
    adapter: folder or hub name of beacons with settings of their own.
    shape:   the fields of a ModelShape themselves, in place of a name; beside one they replace those of that model.

    Raises ModelError for a model that is not found, ConfigError for numbers that are none.
    """
    if name is None and shape:
        found = PlannedModel("given by its numbers", _shape(shape), BeaconConfig(), adapted=False)
    else:
        found = _named(name)
        if shape:
            found = replace(found, shape=_shape({**_numbers(found.shape), **shape}))
    if adapter is None:
        return found
    settings = json.loads(_file(adapter, _SETTINGS).read_text(encoding="utf-8"))
    return replace(found, config=BeaconConfig.from_dict(settings), adapted=True, probed=_has(adapter, _PROBE))


def _named(name: str | None) -> PlannedModel:
    if name is None or name == DEFAULT_MODEL:
        adapter = default_adapter()
        settings = json.loads((adapter / _SETTINGS).read_text(encoding="utf-8"))
        tokenizer = default_model_folder() / "tokenizer.json"
        known = tokenizer if tokenizer.is_file() else None
        probed = _has(str(adapter), _PROBE)
        return PlannedModel(
            DEFAULT_MODEL, _shape(_known()[DEFAULT_MODEL]), BeaconConfig.from_dict(settings), True, known, probed
        )
    if not Path(name).exists():
        of_names = {one.lower(): one for one in _known()}
        short = {one.rpartition("/")[2]: title for one, title in of_names.items()}
        if title := of_names.get(name.lower()) or short.get(name.lower()):
            return PlannedModel(title, _shape(_known()[title]), BeaconConfig(), adapted=False)
    path = _file(name, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        shape = _of_config(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not the config.json of a model that can be planned for: {error!r}") from error
    published = any(key.startswith("beacon_") for key in config)
    settings = BeaconConfig.from_dict(config) if published else BeaconConfig()
    tokenizer = path.with_name("tokenizer.json")
    return PlannedModel(name, shape, settings, published, tokenizer if tokenizer.is_file() else None)


def _of_config(config: Mapping[str, Any]) -> ModelShape:
    """Read the numbers of a model from its config.json, under the names that Llama, Mistral and Qwen share."""
    heads = config["num_attention_heads"]
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        positions=config.get("max_position_embeddings", 32768),
    )


def _file(source: str, name: str) -> Path:
    """Return a small file of a model or an adapter, from its folder or from the hub."""
    if Path(source).exists():
        if (path := Path(source) / name).is_file():
            return path
        raise ModelError(f"{source!r} has no {name}; name the folder of a model, or give its numbers with --shape")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
    except (OSError, ValueError) as error:  # the hub's errors are of these, that of a bad name included
        raise ModelError(
            f"{source!r} is no folder, none of the models that are known ({', '.join(_known())}), and the hub does not "
            f"give its {name}: {error}; give the model's numbers with --shape"
        ) from error


def _has(source: str, name: str) -> bool:
    try:
        return bool(_file(source, name))
    except ModelError:
        return False


def _known() -> dict[str, dict[str, Any]]:
    return tomllib.loads((files("beacon_memory.planning") / "models.toml").read_text(encoding="utf-8"))


def _shape(numbers: Mapping[str, Any]) -> ModelShape:
    try:
        return ModelShape(**numbers)
    except TypeError as error:
        names = ", ".join(one.name for one in fields(ModelShape))
        raise ConfigError(f"the numbers of a model are {names}; got {', '.join(numbers)}: {error}") from error


def _numbers(shape: ModelShape) -> dict[str, Any]:
    return {one.name: getattr(shape, one.name) for one in fields(shape)}
