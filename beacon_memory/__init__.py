"""Long-term memory for local LLM agents.

A document is read once, offline, and compressed to a fraction of its keys and values: those of a few beacon tokens
(Activation Beacon, arXiv 2401.03462), or those of the tokens that each head needs. At query time they are loaded in
front of the prompt, which holds only the question. Start with `BeaconMemory`; everything named in `__all__` is public
and imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors
from .errors import *  # noqa: F403  # the exceptions are public, every one

if TYPE_CHECKING:
    from .compression.compressor import BeaconCompressor as BeaconCompressor
    from .compression.methods.method import CompressionMethod as CompressionMethod
    from .compression.methods.scored import ReadWindow as ReadWindow
    from .compression.methods.scored import ScoredMethod as ScoredMethod
    from .compression.sequence import BeaconSequence as BeaconSequence
    from .compression.work import Work as Work
    from .config import BeaconConfig as BeaconConfig
    from .documents import Document as Document
    from .documents import Label as Label
    from .documents import Precision as Precision
    from .kv.memory_kv import BeaconKV as BeaconKV
    from .kv.memory_kv import MemoryKV as MemoryKV
    from .memory import BeaconMemory as BeaconMemory
    from .modeling.model import BeaconModel as BeaconModel
    from .picking import Passage as Passage
    from .picking import Pick as Pick
    from .picking import Picker as Picker
    from .picking import Query as Query
    from .question import Question as Question
    from .results import Added as Added
    from .results import Answer as Answer
    from .results import Evidence as Evidence
    from .results import ExplainedPassage as ExplainedPassage
    from .results import ExplainedWord as ExplainedWord
    from .results import Explanation as Explanation
    from .results import LoadedDocument as LoadedDocument
    from .results import Progress as Progress
    from .results import SourcePassage as SourcePassage
    from .results import ToolCall as ToolCall
    from .results import UnreadCall as UnreadCall
    from .results import Usage as Usage
    from .session import Session as Session
    from .storage.files.backend import FilesBackend as FilesBackend
    from .storage.store import MemoryStore as MemoryStore

__version__ = "0.1.0"

_LAZY = {
    "Added": "results",
    "Answer": "results",
    "BeaconCompressor": "compression.compressor",
    "BeaconConfig": "config",
    "BeaconKV": "kv.memory_kv",
    "BeaconMemory": "memory",
    "BeaconModel": "modeling.model",
    "BeaconSequence": "compression.sequence",
    "CompressionMethod": "compression.methods.method",
    "Document": "documents",
    "Evidence": "results",
    "ExplainedPassage": "results",
    "ExplainedWord": "results",
    "Explanation": "results",
    "FilesBackend": "storage.files.backend",
    "Label": "documents",
    "LoadedDocument": "results",
    "MemoryKV": "kv.memory_kv",
    "MemoryStore": "storage.store",
    "Passage": "picking",
    "Pick": "picking",
    "Picker": "picking",
    "Precision": "documents",
    "Progress": "results",
    "Query": "picking",
    "Question": "question",
    "ReadWindow": "compression.methods.scored",
    "ScoredMethod": "compression.methods.scored",
    "Session": "session",
    "SourcePassage": "results",
    "ToolCall": "results",
    "UnreadCall": "results",
    "Usage": "results",
    "Work": "compression.work",
}

__all__ = sorted([*_LAZY, *errors.__all__, "__version__"])  # noqa: PLE0605  # a list, sorted from what there is


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the package itself imports no torch."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
