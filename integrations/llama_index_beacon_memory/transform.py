"""BeaconCompressionTransform: compress what passes through an ingestion pipeline into the store."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent

from beacon_memory import BeaconMemory, BeaconMemoryError, CapacityError, Document, InputError

from . import nodes as of_nodes
from .component import MemoryComponent

__all__ = ["BeaconCompressionTransform"]

_logger = logging.getLogger(__name__)


class BeaconCompressionTransform(MemoryComponent, TransformComponent):
    """Compress each node, or document, into the store, under its `node_id`, and note that id in the node.

    The nodes that are given stay as they are; the note is in copies. Nodes that are cut from these later (put this in
    front of a splitter) inherit it and answer from the memory of the whole document; behind a splitter, each piece has
    a memory of its own. A text that is stored already costs nothing.

    An `IngestionCache` never stands in for it, since what it returned once says nothing of what the store holds now:
    to a cache, no two runs of it are equal.
    """

    ratio: int | str | list[int] = Field(
        default="auto", description="Raw tokens per memory slot, see BeaconMemory.add."
    )
    compression: str = Field(default="auto", description="Name of a method, such as 'select'; 'auto': the model's own.")
    precision: str = Field(default="auto", description="What to keep keys and values in; 'auto': what the store says.")
    metadata_mode: MetadataMode = Field(
        default=MetadataMode.NONE, description="Which metadata becomes part of the compressed text."
    )

    def __init__(
        self, store: str | os.PathLike[str] | None = None, *, memory: BeaconMemory | None = None, **fields: Any
    ) -> None:
        super().__init__(store, memory=memory, **fields)

    @classmethod
    def class_name(cls) -> str:
        """Return its name in written form."""
        return "BeaconCompressionTransform"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return its fields, from which `from_dict` makes it again, and a mark that no cache has seen."""
        written = super().to_dict(**kwargs) | {"metadata_mode": self.metadata_mode.value}
        return written | {"run": uuid.uuid4().hex}  # a cache's key holds this, and the texts, but neither ids nor store

    def __call__(
        self,
        nodes: Sequence[BaseNode],
        **kwargs: Any,  # noqa: ARG002  # the framework passes it
    ) -> Sequence[BaseNode]:
        """Compress the nodes that have text, together; returns these as copies with a note, and all others.

        One that is too long, or no text that can be stored, is left out with a warning in the log, and the others go
        on: what has text and is returned has a memory to answer from.
        """
        texts = {node.node_id: node.get_content(self.metadata_mode) for node in nodes}
        documents = [
            Document(node.node_id, texts[node.node_id], _plain(node.metadata))
            for node in nodes
            if texts[node.node_id].strip()
        ]
        refused: set[str] = set()

        def refuse(document: Document, error: BeaconMemoryError) -> None:
            if not isinstance(error, CapacityError | InputError):  # no fault of this document
                raise error
            refused.add(document.id)
            _logger.warning("the node %r is left out: %s", document.id, error)

        how = (self.ratio, self.compression, self.precision)
        self._memory.add_many(documents, *how, on_error=refuse)
        return [
            of_nodes.marked(node, node.node_id) if texts[node.node_id].strip() else node
            for node in nodes
            if node.node_id not in refused
        ]

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Compress the nodes in a thread."""
        return await asyncio.to_thread(self, nodes, **kwargs)


def _plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a node as JSON can hold it."""
    own = {name: value for name, value in metadata.items() if name != of_nodes.KEY}
    plain: dict[str, Any] = json.loads(json.dumps(own, default=str))
    return plain
