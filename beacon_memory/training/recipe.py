"""Recipes: TOML files that hold all settings of a training run."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from beacon_memory.config import BeaconConfig
from beacon_memory.errors import ConfigError

__all__ = ["DataSource", "LoraRecipe", "Recipe", "SalienceRecipe", "Stage", "read_recipe", "shipped_recipes"]

ADAPTER = "adapter"  # name of the finished adapter's folder, beside those of the stages


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """A source of training samples.

    path:   a file of JSON lines, plain or gzipped, relative to the data folder; or the name of a data set of the hub.
    kind:   `text` (rows with `text`) or `qa` (rows with `context`, and either `question` and `answers` or a list `qa`
            of such pairs; rows with the same `title` can form one document).
    weight: how often samples are drawn from it, relative to the other sources of the stage.
    where:  take only rows whose fields have these values.
    split:  split of a data set of the hub.
    """

    path: str
    kind: str
    weight: float = 1.0
    where: Mapping[str, Any] = field(default_factory=dict)
    split: str = "train"

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.kind in ("text", "qa"), "kind", self.kind, "'text' or 'qa'")
        _require(0 < self.weight < math.inf, "weight", self.weight, "above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRecipe:
    """A LoRA of the base that is trained too. It has no effect on beacon rows where beacons have their own projections.

    rank, alpha: rank and alpha of the LoRA.
    targets:     names of the linear layers that get one.
    """

    rank: int = 32
    alpha: int = 32
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        _check_types(self)
        object.__setattr__(self, "targets", tuple(self.targets))
        _require(self.rank > 0, "rank", self.rank, "above 0")
        _require(self.alpha > 0, "alpha", self.alpha, "above 0")
        _require(bool(self.targets), "targets", self.targets, "at least one linear layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class SalienceRecipe:
    """The salience of tokens for salient placement, counted in data instead of taken from the adapter.

    data:          sources whose tokens are counted; those of kind `qa` also tell which tokens are part of answers.
    answer_weight: weight of the log odds that a token is part of an answer; it is added to its information content.
    """

    data: tuple[DataSource, ...]
    answer_weight: float = 0.0

    def __post_init__(self) -> None:
        _check_types(self)
        object.__setattr__(self, "data", tuple(self.data))
        _require(bool(self.data), "data", self.data, "at least one source, as [[salience.data]]")
        _require(0 <= self.answer_weight < math.inf, "answer_weight", self.answer_weight, "at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of training.

    name:            name of its folder, also shown in TensorBoard.
    steps:           number of optimizer steps.
    data:            sources of samples.
    tokens:          least and most raw tokens of a document; its length is drawn evenly between them.
    parts:           into how many parts a document is split: one of these numbers at random. Parts are compressed
                     independently of each other.
    ratios:          ratios that windows choose from at random; 0 reads a window uncompressed. Default: the adapter's.
    ratio_per:       `window`: a ratio for each window, as in the paper; `document`: the same for all its windows.
    compression:     `beacon`; or `hybrid`: predictions see chosen tokens and beacons, see `beacon_hybrid_factor`. For
                     `hybrid`, `tokens` must fit a window, `parts` must be [1], and no ratio may be 0. Or `select`:
                     predictions see selected entries; for a recipe with `[answers]`, and for no other.
    zoomed:          with `select`, the share of questions that see the passages that match them; the others see what
                     selection keeps of the whole text at one of two ratios.
    branches:        most questions about one document, which is compressed once for all of them.
    continuation:    how many tokens after a text are predicted from its memory; may be 0 with `label_text`.
    label_text:      also predict the raw tokens of the text itself, each window from the memory of those before it.
    label_weight:    weight of the cross-entropy of the labels.
    distill_weight:  weight of KL(full || compressed), where `full` is the same model when it reads the full text.
    learning_rate:   peak of the learning rate. It is reached after the share `warmup` of all steps, and then falls
                     along a cosine to a tenth.
    weight_decay:    weight decay of AdamW.
    batch_size:      documents in one pass, on each device.
    accumulate:      passes for one step.
    max_grad_norm:   norm that gradients are clipped to; 0 for no clipping.
    gradient_checkpointing: compute each layer twice instead of keeping its activations.
    """

    name: str
    steps: int
    data: tuple[DataSource, ...]
    tokens: tuple[int, int] = (512, 1024)
    parts: tuple[int, ...] = (1,)
    ratios: tuple[int, ...] = ()
    ratio_per: str = "window"
    compression: str = "beacon"
    zoomed: float = 0.0
    branches: int = 12
    continuation: int = 256
    label_text: bool = False
    label_weight: float = 1.0
    distill_weight: float = 0.0
    learning_rate: float = 5e-5
    warmup: float = 0.03
    weight_decay: float = 0.0
    batch_size: int = 1
    accumulate: int = 1
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("data", "tokens", "parts", "ratios"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _require(self.name.replace("-", "").isalnum(), "name", self.name, "letters, digits and -")
        _require(self.name != ADAPTER, "name", self.name, "another one, since the finished adapter gets that folder")
        for name in ("steps", "branches", "batch_size", "accumulate"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(bool(self.data), "data", self.data, "at least one source, as [[stage.data]]")
        _require(2 <= self.tokens[0] <= self.tokens[1], "tokens", self.tokens, "[least, most], of at least 2")
        _require(bool(self.parts) and min(self.parts) >= 1, "parts", self.parts, "whole numbers of at least 1")
        _require(min(self.ratios, default=0) >= 0, "ratios", self.ratios, "whole numbers of at least 0")
        _require(self.ratio_per in ("window", "document"), "ratio_per", self.ratio_per, "'window' or 'document'")
        kinds = ("beacon", "hybrid", "select")
        _require(self.compression in kinds, "compression", self.compression, "'beacon', 'hybrid' or 'select'")
        _require(0 <= self.zoomed <= 1, "zoomed", self.zoomed, "a share from 0 to 1")
        if self.compression == "select":
            _require(not self.label_text, "label_text", self.label_text, "false with compression = 'select'")
            weak = not self.ratios or max(self.ratios) > 2
            _require(weak or not self.zoomed, "ratios", self.ratios, "some above 2 with zoomed, which loads less")
        else:
            _require(not self.zoomed, "zoomed", self.zoomed, "0 without compression = 'select'")
        if self.compression == "hybrid":
            _require(0 not in self.ratios, "ratios", self.ratios, "above 0 with compression = 'hybrid'")
            _require(set(self.parts) == {1}, "parts", self.parts, "[1] with compression = 'hybrid'")
        least = 0 if self.label_text else 2
        _require(self.continuation >= least, "continuation", self.continuation, f"at least {least}")
        for name in ("label_weight", "distill_weight", "weight_decay", "max_grad_norm"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "at least 0")
        _require(self.label_weight + self.distill_weight > 0, "label_weight", self.label_weight, "above 0, or distill")
        _require(
            not (self.label_text and self.distill_weight) or set(self.parts) == {1},
            "parts",
            self.parts,
            "[1] with both label_text and distill_weight: read in full, later parts would see the ones before",
        )
        _require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "above 0")
        _require(0 <= self.warmup < 1, "warmup", self.warmup, "a share of the steps from 0 to below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The settings of a training run.

    stages:  stages of training, one after another.
    adapter: adapter to start from, relative to the recipe's folder; `default` for the shipped one. None starts with
             untrained beacons.
    beacon:  settings of BeaconConfig that differ from the adapter's, or from the defaults.
    salience: salience of tokens for salient placement. None takes the adapter's, or counts in the data of the stages.
    lora:    a LoRA of the base to train too. If `adapter` has one, its training goes on, and it must have this shape.
    answers: a LoRA for what follows a memory, to train alone: the weights that read documents stay as they are, and so
             do stored memories. All stages must have `compression = "select"`. If `adapter` has one, its training goes
             on.
    base:    base model, a folder or a hub name. None is the embedded default model.
    chat_template: chat template of questions and answers. None takes the adapter's, or the tokenizer's.
    dtype:   dtype that the frozen base computes in; trained parameters are kept in float32.
    seed:    seed of all random choices.
    save_steps, log_steps: after how many steps a checkpoint is saved, and losses are logged.
    """

    stages: tuple[Stage, ...]
    adapter: str | None = None
    beacon: Mapping[str, Any] = field(default_factory=dict)
    salience: SalienceRecipe | None = None
    lora: LoraRecipe | None = None
    answers: LoraRecipe | None = None
    base: str | None = None
    chat_template: str | None = None
    dtype: str = "bfloat16"
    seed: int = 0
    save_steps: int = 100
    log_steps: int = 10

    def __post_init__(self) -> None:
        _check_types(self)
        object.__setattr__(self, "stages", tuple(self.stages))
        names = [stage.name for stage in self.stages]
        _require(bool(names) and len(set(names)) == len(names), "stages", names, "at least one, each with its own name")
        _require(self.dtype in ("bfloat16", "float16", "float32"), "dtype", self.dtype, "bfloat16, float16 or float32")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to below 2**32")
        for name in ("save_steps", "log_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        alone = self.answers is not None
        _require(not (alone and self.lora), "lora", self.lora, "left out with [answers], which is trained alone")
        for stage in self.stages:
            _require(
                (stage.compression == "select") == alone,
                f"compression of stage {stage.name!r}",
                stage.compression,
                "'select' with [answers], and another without",
            )
        self.beacon_config(BeaconConfig())

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as values that can be written as JSON."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]  # tuples become lists

    def beacon_config(self, start: BeaconConfig) -> BeaconConfig:
        """Return the settings to train with: those of the adapter to start from, or the defaults, with changes."""
        unknown = sorted(set(self.beacon) - {f.name for f in fields(BeaconConfig)})
        if unknown:
            raise ConfigError(f"beacon: unknown key {unknown[0]!r}")
        return replace(start, **self.beacon)


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.name.removesuffix(".toml") for path in _shipped().iterdir() if path.name.endswith(".toml"))


def read_recipe(source: str | Path) -> tuple[Recipe, Path]:
    """Read a recipe from a TOML file, or a shipped one by its name; returns it with the path of its file.

    Raises ConfigError, which names the file and the key, for unknown keys and values that are not allowed.
    """
    path = Path(source)
    if str(source) in shipped_recipes():
        path = Path(str(_shipped() / f"{source}.toml"))
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        shipped = ", ".join(shipped_recipes())
        raise ConfigError(f"the recipe {str(source)!r} cannot be read: {error}; shipped recipes: {shipped}") from error
    except ValueError as error:
        raise ConfigError(f"the recipe {path} is not TOML: {error}") from error
    try:
        return _recipe(settings), path
    except ConfigError as error:
        raise ConfigError(f"the recipe {path} cannot be used: {error}") from error


def _shipped() -> Any:
    return files("beacon_memory") / "training" / "recipes"


def _recipe(settings: Mapping[str, Any]) -> Recipe:
    given = dict(settings)
    if "stages" in given:
        raise ConfigError("recipe: unknown key 'stages'; write each stage as [[stage]]")
    for name in ("lora", "answers"):
        if name in given:
            given[name] = _build(LoraRecipe, given[name], name)
    if "salience" in given:
        given["salience"] = _with_sources(SalienceRecipe, given["salience"], "salience")
    given["stages"] = [
        _with_sources(Stage, stage, f"stage {number}")
        for number, stage in enumerate(_tables(given.pop("stage", []), "stage"), 1)
    ]
    recipe: Recipe = _build(Recipe, given, "recipe")
    return recipe


def _with_sources(kind: Any, given: Any, where: str) -> Any:
    """Build a part of a recipe that holds data sources."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}={given!r} must be a table")
    sources = _tables(given.get("data", []), f"{where}: data")
    data = [_build(DataSource, source, f"{where}, data {number}") for number, source in enumerate(sources, 1)]
    return _build(kind, {**given, "data": data}, where)


def _tables(given: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
        raise ConfigError(f"{where} must be written as tables, each under [[...]]")
    return given


def _build(kind: Any, given: Any, where: str) -> Any:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}={given!r} must be a table")
    known = {f.name: f for f in fields(kind)}
    unknown = sorted(set(given) - set(known))
    if unknown:
        keys = ", ".join("stage" if name == "stages" else name for name in known)
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known are {keys}")
    lacking = [name for name, f in known.items() if name not in given and f.default is f.default_factory is MISSING]
    if lacking:
        raise ConfigError(f"{where}: {lacking[0]!r} is missing")
    try:
        return kind(**given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _require(holds: bool, name: str, value: object, must: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r} must be {must}")


def _check_types(settings: Any) -> None:
    """Raise ConfigError for the first field whose value does not have the declared type."""
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        _require(_fits(value, hint), name, value, _in_words(hint))


def _fits(value: object, hint: Any) -> bool:
    origin, among = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, one) for one in among)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (Ellipsis not in among and len(value) != len(among)):
            return False
        return all(_fits(one, among[0]) for one in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _in_words(hint: Any) -> str:
    origin, among = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return _in_words(among[0])
    if origin is tuple:
        return f"a list of {'' if Ellipsis in among else f'{len(among)} '}{_in_words(among[0]).partition(' ')[2]}s"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return words.get(hint, "a table")
