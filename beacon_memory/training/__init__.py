"""Training beacon adapters: recipes, data, loss, and a transformers Trainer. Needs the extra `train`.

A recipe, one TOML file, decides a run: `train` carries it out and leaves an adapter that `BeaconModel.from_pretrained`
loads. Everything named in `__all__` is public and imported when it is first used; reading recipes imports no torch.
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
_EXTRA = ("accelerate", "datasets", "tensorboard")

__all__ = sorted(_LAZY)  # noqa: PLE0605  # a list, sorted from what there is


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used. Raises MissingDependencyError if it needs what is not installed."""
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
