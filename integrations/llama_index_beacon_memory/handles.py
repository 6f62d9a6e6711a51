"""Handles: how a memory block tells the model which memory to load, since messages cannot carry tensors.

A handle is the id of a document with a signature over it, its store and its namespace. The signature is made with a
secret that this process drew at its start and never gives out, so nobody else can make one, and one for another
document, store or namespace does not fit. It stands beside the text of a system message, in `additional_kwargs`, never
in a text.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole

from beacon_memory import InputError, MemoryStore

__all__ = ["KEY", "issue", "redeem_all"]

KEY = "beacon_memory"

_SECRET = secrets.token_bytes(32)
_logger = logging.getLogger(__name__)


def issue(store: MemoryStore, id: str) -> ChatMessage:
    """Return a message without text that has the model load a document of this store and namespace."""
    handle = {"id": id, "signature": _sign(store, store.namespace, id)}
    return ChatMessage(role=MessageRole.SYSTEM, blocks=[], additional_kwargs={KEY: handle})


def redeem_all(store: MemoryStore, namespace: str, messages: Sequence[ChatMessage]) -> list[str]:
    """Return the ids that the handles in system messages name; what looks like one in another message is ignored.

    Raises InputError for a handle that was not issued by this process for this store and this namespace of it.
    """
    ids: dict[str, None] = {}
    for message in messages:
        if KEY not in message.additional_kwargs:
            continue
        if message.role != MessageRole.SYSTEM:
            _logger.warning("a memory handle in a message of the role %s was ignored", message.role.value)
            continue
        ids[_redeem(store, namespace, message.additional_kwargs[KEY])] = None
    return list(ids)


def _redeem(store: MemoryStore, namespace: str, handle: Any) -> str:
    id, signature = (handle.get("id"), handle.get("signature")) if isinstance(handle, dict) else (None, None)
    if not (isinstance(id, str) and isinstance(signature, str)):
        raise InputError(f"additional_kwargs[{KEY!r}] of a system message is no memory handle; leave it out")
    if not hmac.compare_digest(signature.encode("utf-8", "replace"), _sign(store, namespace, id).encode()):
        raise InputError(
            "a memory handle in a system message was not issued by this process for this store and namespace; get the "
            "messages anew from the Memory whose block issued it, and ask a model in the block's namespace"
        )
    return id


def _sign(store: MemoryStore, namespace: str, id: str) -> str:
    signed = json.dumps([store.place if "://" in store.place else str(store.root.resolve()), namespace, id])
    return hmac.new(_SECRET, signed.encode(), hashlib.sha256).hexdigest()[:32]
