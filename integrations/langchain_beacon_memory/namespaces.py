"""Which namespace a call is about: only ever one that the program names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from beacon_memory import BeaconMemory

__all__ = ["in_namespace", "name_of"]


def name_of(memory: BeaconMemory, namespace: str | None) -> str:
    """The namespace, by default the memory's own."""
    return memory.store.namespace if namespace is None else namespace


@contextmanager
def in_namespace(memory: BeaconMemory, namespace: str | None) -> Iterator[BeaconMemory]:
    """The memory in a namespace, by default its own; what it opens there is closed behind it."""
    if name_of(memory, namespace) == memory.store.namespace:
        yield memory
        return
    with memory.within(name_of(memory, namespace)) as other:
        yield other
