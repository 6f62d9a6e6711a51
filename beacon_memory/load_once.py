"""The model of a memory, loaded when it is first needed."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.generation.decode_loop import DecodeLoop
from beacon_memory.modeling.model import UNTRAINED, BeaconModel

from .errors import InputError
from .lookup import Lookup

if TYPE_CHECKING:
    import torch

__all__ = ["LoadOnce", "ModelSource"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Say what the model and the compressor of a memory are made from."""

    model: str | Path | BeaconModel | None
    adapter: str | Path | None
    device: str | torch.device | None
    dtype: torch.dtype | str
    reserve: int
    score: str

    def load(self) -> BeaconCompressor:
        """Load the model, and read what is the same for every document."""
        model = self.model
        if not isinstance(model, BeaconModel):
            model = BeaconModel.from_pretrained(model, self.adapter, device=self.device, dtype=self.dtype)
        compressor = BeaconCompressor(model, reserve=self.reserve, score=self.score)
        compressor.sink, model.fingerprint  # noqa: B018  # now, so that no answer waits for them
        return compressor

    def named(self) -> ModelSource:
        """Return the same with a loaded model by its name; raises InputError for one without."""
        if not isinstance(self.model, BeaconModel):
            return self
        name, adapter = str(self.model.base.config.name_or_path), self.model.adapter
        if not name:
            raise InputError(
                "the model of this memory has no name under which another process could load it; load it with "
                "BeaconModel.from_pretrained to pickle the memory"
            )
        dtype: torch.dtype | str = "auto" if self.model.kv_dtype != self.model.dtype else self.model.dtype
        return replace(self, model=name, adapter=None if adapter in (UNTRAINED, name) else adapter, dtype=dtype)


class LoadOnce:
    """Make a compressor, the loop that answers and what looks up, when it is first asked for, once for all threads.

    It is pickled by what it is made from.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._made: tuple[BeaconCompressor, DecodeLoop, Lookup] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> tuple[BeaconCompressor, DecodeLoop, Lookup]:
        """Return them, made if nobody has asked before."""
        with self._lock:
            if self._made is None:
                compressor = self._source.load()
                self._made = compressor, DecodeLoop(compressor.model), Lookup(compressor.model)
            return self._made

    @property
    def source(self) -> ModelSource:
        """The model and adapter that they are made from, by name."""
        return self._source.named()

    def __reduce__(self) -> tuple[type[LoadOnce], tuple[ModelSource]]:
        """Pickle the source by name."""
        return LoadOnce, (self.source,)
