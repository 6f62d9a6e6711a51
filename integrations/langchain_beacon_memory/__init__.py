"""LangChain on top of beacon_memory: models that answer from stored memories instead of pasted text.

`ChatBeaconMemory` and `BeaconMemoryLLM` are language models, `BeaconMemoryRetriever` finds the documents of a question,
`create_memory_chain` joins the two, `BeaconMemoryMiddleware` does so in an agent. `BeaconChatMessageHistory` keeps a
conversation in bounded size, for `RunnableWithMessageHistory` (with `behind_history`) and for agents (with
`BeaconHistoryMiddleware`).
"""

from .chain import create_memory_chain
from .chat_history import BeaconChatMessageHistory, behind_history
from .chat_model import ChatBeaconMemory
from .llm import BeaconMemoryLLM
from .middleware import BeaconHistoryMiddleware, BeaconMemoryMiddleware
from .retriever import BeaconMemoryRetriever

__all__ = [
    "BeaconChatMessageHistory",
    "BeaconHistoryMiddleware",
    "BeaconMemoryLLM",
    "BeaconMemoryMiddleware",
    "BeaconMemoryRetriever",
    "ChatBeaconMemory",
    "behind_history",
    "create_memory_chain",
]
