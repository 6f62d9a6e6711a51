"""The stored document that a node belongs to."""

from __future__ import annotations

from llama_index.core.schema import BaseNode

from beacon_memory import BeaconMemory

__all__ = ["KEY", "document_id", "marked"]

KEY = "beacon_document_id"


def marked(node: BaseNode, id: str) -> BaseNode:
    """Return a copy of a node whose metadata say which document holds its memory; nodes cut from it inherit that.

    Neither the embedding nor the prompt of a model sees it.
    """
    noted = {
        "metadata": {**node.metadata, KEY: id},
        "excluded_embed_metadata_keys": list(dict.fromkeys([*node.excluded_embed_metadata_keys, KEY])),
        "excluded_llm_metadata_keys": list(dict.fromkeys([*node.excluded_llm_metadata_keys, KEY])),
    }
    return node.model_copy(update=noted)


def document_id(memory: BeaconMemory, node: BaseNode) -> str | None:
    """Return the document with the memory of a node: the one noted in it, one with its id, or with its source's.

    Only documents of the memory's namespace are looked at; None if there is none.
    """
    for id in (node.metadata.get(KEY), node.node_id, node.ref_doc_id):
        if isinstance(id, str) and id in memory.store:
            return id
    return None
