"""The base of the components that LlamaIndex can write down: the memory they work on, named in their fields."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseComponent

from beacon_memory import BeaconMemory, InputError
from beacon_memory.modeling.model import UNTRAINED

__all__ = ["MemoryComponent"]


class MemoryComponent(BaseComponent):
    """A component on a `BeaconMemory`, which it opens itself or is given.

    Components that are given the same `memory` share its model. One that is made from its written form opens a memory
    of its own, unless it is given one: `from_dict(data, memory=memory)`.
    """

    store: str = Field(description="Folder of the stored documents.")
    model: str | None = Field(
        default=None, description="Folder, GGUF file or hub name of the base model; by default the embedded one."
    )
    adapter: str | None = Field(default=None, description="Folder or hub name of a beacon adapter for the model.")
    namespace: str = Field(default="", description="The part of the store to work in, which sees no other's documents.")

    _memory: BeaconMemory = PrivateAttr()
    _nameless: bool = PrivateAttr()

    def __init__(
        self, store: str | os.PathLike[str] | None = None, *, memory: BeaconMemory | None = None, **fields: Any
    ) -> None:
        if memory is None:
            if store is None:
                raise InputError(f"{self.class_name()} needs a store, the folder of the documents, or a memory")
            super().__init__(**{**fields, "store": os.fspath(store)})
            if self.model == "":
                raise InputError(f"{self.class_name()} was made with a model that has no name; give it memory=...")
            self._memory = BeaconMemory(self.store, self.model, self.adapter, namespace=self.namespace)
        else:
            if store is not None and not _same(store, memory.store.place):
                raise InputError(f"store={os.fspath(store)!r} is not the store of the memory, {memory.store.place}")
            super().__init__(**{"namespace": memory.store.namespace, **fields, "store": memory.store.place})
            self._memory = memory.within(self.namespace)
        self._nameless = memory is not None and not self.model

    @property
    def memory(self) -> BeaconMemory:
        """The memory that it works on, in its namespace."""
        return self._memory

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return its fields, from which `from_dict` makes it again."""
        return super().to_dict(**kwargs) | self._names()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["__dict__"] = state["__dict__"] | self._names()
        state["__pydantic_private__"] = None  # an open store, a model: made again from the fields
        return state

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()  # weights and store are shared, as between all components of a memory

    def _names(self) -> dict[str, Any]:
        """Return model and adapter by name, where they were given as a loaded memory."""
        if not self._nameless:
            return {}
        model = self._memory.model
        name = str(model.base.config.name_or_path)
        return {"model": name, "adapter": None if model.adapter in (UNTRAINED, name) else model.adapter}


def _same(store: str | os.PathLike[str], place: str) -> bool:
    """Tell whether a store is the one that is opened by `place`, a folder or the URL of a database."""
    return os.fspath(store) == place or Path(store).resolve() == Path(place).resolve()
