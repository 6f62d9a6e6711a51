"""The stored document that a node belongs to."""

from __future__ import annotations

from llama_index.core.schema import BaseNode

from beacon_memory import BeaconMemory

__all__ = ["KEY", "document_id", "mark"]

KEY = "beacon_document_id"


def mark(node: BaseNode, id: str) -> None:
    """Note in a node's metadata which document holds its memory; nodes that are cut from it inherit that.

    Neither the embedding nor the prompt of a model sees it.
    """
    node.metadata[KEY] = id
    for keys in (node.excluded_embed_metadata_keys, node.excluded_llm_metadata_keys):
        if KEY not in keys:
            keys.append(KEY)


def document_id(memory: BeaconMemory, node: BaseNode) -> str | None:
    """Return the document with the memory of a node: the one noted in it, one with its id, or with its source's.

    Only documents of the memory's namespace are looked at; None if there is none.
    """
    for id in (node.metadata.get(KEY), node.node_id, node.ref_doc_id):
        if isinstance(id, str) and id in memory.store:
            return id
    return None
