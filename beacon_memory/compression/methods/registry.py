"""Which compression methods there are: the built-in ones, those of other packages, and registered ones.

A package offers a method by an entry point:

    [project.entry-points."beacon_memory.compression"]
    knorm = "compression_method:KeyNorm"
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from beacon_memory.config import METHOD_NAME
from beacon_memory.errors import ConfigError

from .beacon import Beacon
from .dense_beacon import DenseBeacon
from .hybrid import Hybrid
from .method import CompressionMethod, MakeMethod, Reader
from .select import Select

__all__ = ["BUILT_IN", "GROUP", "find", "names", "package_of", "register"]

GROUP = "beacon_memory.compression"


def _beacon(reader: Reader) -> CompressionMethod:
    return DenseBeacon(reader) if reader.model.config.beacon_dense_ratio else Beacon(reader)


BUILT_IN: Mapping[str, MakeMethod] = {"beacon": _beacon, "select": Select, "hybrid": Hybrid}
_registered: dict[str, MakeMethod] = {}


def register(name: str, make: MakeMethod) -> None:
    """Add a method for this process, in place of an installed one of the name.

    make: called with the compressor (a `Reader`); a class will do. Raises ConfigError for a name that it cannot have.
    """
    if name in BUILT_IN or not METHOD_NAME.fullmatch(name):
        raise ConfigError(
            f"a compression method cannot be called {name!r}: 'auto' and built-in names are taken, and others are "
            "lower-case letters, digits, '_', '.' and '-' after a letter"
        )
    _registered[name] = make


def names() -> tuple[str, ...]:
    """Return the names of all methods: built-in ones first, then the others, sorted."""
    return (*BUILT_IN, *sorted({*_registered, *_installed()} - BUILT_IN.keys()))


def find(name: str, package: str | None = None) -> MakeMethod:
    """Return the method of a name; raises ConfigError, naming what to install or what there is, if there is none.

    package: the one that the method came with, where that is known.
    """
    if make := BUILT_IN.get(name) or _registered.get(name):
        return make
    if (entry := _installed().get(name)) is not None:
        try:
            return cast(MakeMethod, entry.load())
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"compression={name!r} cannot be loaded from {entry.value} of the package {package_of(name)!r}: {error}"
            ) from error
    if package is not None:
        raise ConfigError(f"compression={name!r} comes with a package that is missing: `pip install {package}`")
    raise ConfigError(
        f"compression={name!r} must be 'auto' or one of the methods that are installed: {', '.join(map(repr, names()))}"
    )


def package_of(name: str) -> str | None:
    """Return the package that a method was installed with; None for one that is built in or registered."""
    if name in BUILT_IN or name in _registered or (entry := _installed().get(name)) is None or entry.dist is None:
        return None
    return entry.dist.name


def _installed() -> dict[str, EntryPoint]:
    """Return the entry points by name, as they are now: a package may come or go while the process runs."""
    return {entry.name: entry for entry in entry_points(group=GROUP) if METHOD_NAME.fullmatch(entry.name)}
