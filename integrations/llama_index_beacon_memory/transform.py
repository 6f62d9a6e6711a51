"""BeaconCompressionTransform: compress what passes through an ingestion pipeline into the store."""

from __future__ import annotations

import asyncio
import json
import logging
import os
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

    Nodes that are cut from it later (put this in front of a splitter) inherit the note and answer from the memory of
    the whole document; behind a splitter, each piece has a memory of its own. A text that is stored already costs
    nothing.
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
        """Return its fields, and all else that decides what a text becomes: an ingestion cache goes by it."""
        compressor = self._memory.compressor
        compression = compressor.compression(self.compression)
        method = {"compression": compression, "reserve": compressor.reserve, **compressor.parameters(compression)}
        written = super().to_dict(**kwargs) | {"metadata_mode": self.metadata_mode.value}
        return written | {"fingerprint": compressor.model.fingerprint.digest, "method": method}

    def __call__(
        self,
        nodes: Sequence[BaseNode],
        **kwargs: Any,  # noqa: ARG002  # the framework passes it
    ) -> Sequence[BaseNode]:
        """Compress the nodes that have text, together; returns all but those that cannot be compressed.

        One that is too long, or no text that can be stored, is left out with a warning in the log, and the others go
        on: what is returned has a memory to answer from.
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
        for node in nodes:
            if texts[node.node_id].strip() and node.node_id not in refused:
                of_nodes.mark(node, node.node_id)
        return [node for node in nodes if node.node_id not in refused]

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Compress the nodes in a thread."""
        return await asyncio.to_thread(self, nodes, **kwargs)


def _plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a node as JSON can hold it."""
    own = {name: value for name, value in metadata.items() if name != of_nodes.KEY}
    plain: dict[str, Any] = json.loads(json.dumps(own, default=str))
    return plain
