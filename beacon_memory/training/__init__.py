"""Training of beacon adapters: recipes, data, loss, and a transformers Trainer. Needs the extra `train`.

A recipe, one TOML file, decides everything about a run. `train` carries it out and writes an adapter, which
`BeaconModel.from_pretrained` loads. The names in `__all__` are public. They are imported when they are first used, so
that reading a recipe imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from beacon_memory.errors import MissingDependencyError

if TYPE_CHECKING:
    from .recipe import DataSource as DataSource
    from .recipe import LoraRecipe as LoraRecipe
    from .recipe import Recipe as Recipe
    from .recipe import SalienceRecipe as SalienceRecipe
    from .recipe import Stage as Stage
    from .recipe import read_recipe as read_recipe
    from .recipe import shipped_recipes as shipped_recipes
    from .trainer import train as train

_LAZY = {
    "DataSource": "recipe",
    "LoraRecipe": "recipe",
    "Recipe": "recipe",
    "SalienceRecipe": "recipe",
    "Stage": "recipe",
    "read_recipe": "recipe",
    "shipped_recipes": "recipe",
    "train": "trainer",
}
_EXTRA = ("accelerate", "bm25s", "datasets", "tensorboard")

__all__ = sorted(_LAZY)  # noqa: PLE0605  # a list of the names above


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used. Raises MissingDependencyError if a package for it is missing."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _LAZY[name] == "trainer":
        missing = [package for package in _EXTRA if find_spec(package) is None]
        if missing:
            raise MissingDependencyError(
                f"training needs {', '.join(missing)}; run: pip install 'beacon-memory[train]'"
            )
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
