"""A copy of a conversation's row as a small file, so that a lost catalog loses nothing.

A JSON object: `format`, the fields of a `Conversation`, and `sha256` of all these. The row counts, unless the file is
newer: then the catalog has lost what was committed last.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from beacon_memory.conversation import Conversation
from beacon_memory.errors import CorruptFileError, InputError

from .checked_json import read_checked, stage_checked

__all__ = ["read_conversation", "stage_conversation"]


def stage_conversation(folder: Path, conversation: Conversation) -> Path:
    """Write a conversation into a temporary file, and sync it; raises as `stage_checked`."""
    values = {field.name: getattr(conversation, field.name) for field in fields(conversation)}
    return stage_checked(folder, values, f"the conversation {conversation.id!r}")


def read_conversation(path: Path) -> Conversation:
    """Read a conversation; raises FileNotFoundError, or CorruptFileError for what `stage_conversation` never wrote."""
    try:
        return Conversation(**read_checked(path))
    except (TypeError, InputError, RecursionError) as error:
        raise CorruptFileError(f"{path} is no conversation: {error}") from error
