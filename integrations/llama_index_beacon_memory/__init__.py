"""beacon_memory for LlamaIndex: answers from stored memories instead of pasted text.

`BeaconMemoryLLM` is the language model. `BeaconMemoryBlock` folds the old messages of a `Memory` into a document that
the model then answers behind. `BeaconCompressionTransform` compresses what passes through an ingestion pipeline,
`BeaconRetriever` finds documents, `BeaconSynthesizer` answers from their memories; `BeaconQueryEngine` joins the two.
"""

from .llm import BeaconMemoryLLM
from .memory_block import BeaconMemoryBlock
from .query_engine import BeaconQueryEngine
from .retriever import BeaconRetriever
from .synthesizer import BeaconSynthesizer
from .transform import BeaconCompressionTransform

__all__ = [
    "BeaconCompressionTransform",
    "BeaconMemoryBlock",
    "BeaconMemoryLLM",
    "BeaconQueryEngine",
    "BeaconRetriever",
    "BeaconSynthesizer",
]
