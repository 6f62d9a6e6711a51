"""Beyond one machine, with Ray: documents compressed on a cluster. Needs the extra `ray`.

    from beacon_memory.distributed import compress

    compress(ray.data.read_parquet("s3://bucket/notes/"), BeaconMemory("postgresql://db.example.com/memories"))

Ray reads, schedules, watches over workers and begins anew what was lost; what a document goes through is that of
`BeaconMemory.add_many`. The names in `__all__` are public, and imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from beacon_memory.errors import MissingDependencyError

if TYPE_CHECKING:
    from .compressing import ClusterProgress as ClusterProgress
    from .compressing import Outcome as Outcome
    from .compressing import compress as compress

_LAZY = {
    "ClusterProgress": "compressing",
    "Outcome": "compressing",
    "compress": "compressing",
}

__all__ = sorted(_LAZY)  # noqa: PLE0605  # a list of the names above


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used. Raises MissingDependencyError if Ray is not installed."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_ray()
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def require_ray() -> None:
    """Raise MissingDependencyError if Ray is not installed."""
    if find_spec("ray") is None:
        raise MissingDependencyError(
            "work on a cluster needs ray, which is not installed: pip install 'beacon-memory[ray]'"
        )
