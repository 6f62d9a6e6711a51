"""Tool calls as Hermes and Qwen models write them: <tool_call>{"name": ..., "arguments": ...}</tool_call>."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

__all__ = ["CALL", "OPENING", "new_call_id", "read_call", "text_before_calls", "write_call"]

OPENING, _CLOSING = "<tool_call>", "</tool_call>"
CALL = re.compile(rf"{OPENING}(.*?)(?:{_CLOSING}|\Z)", re.DOTALL)  # the last one may have been cut off


def read_call(block: str) -> dict[str, Any]:
    """What a model wrote between the tags: `name`, a text, `arguments`, a dict, and `id` if it is there.

    Raises ValueError for anything else.
    """
    try:
        fields = json.loads(block)
        name, arguments = fields["name"], fields.get("arguments", {})
        if isinstance(arguments, str):  # some models quote them
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise TypeError(f"name={name!r}, arguments={arguments!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not a JSON object with the text 'name' and the object 'arguments': {error!r}") from error
    return {**fields, "name": name, "arguments": arguments}


def write_call(fields: Mapping[str, Any]) -> str:
    """A tool call as a model would have written it."""
    return f"{OPENING}\n{json.dumps(fields, ensure_ascii=False)}\n{_CLOSING}"


def text_before_calls(text: str) -> str:
    """What is certain to come before any tool call, of an answer that is not finished."""
    if (at := text.find(OPENING)) >= 0:
        return text[:at]
    begun = max((n for n in range(1, len(OPENING)) if text.endswith(OPENING[:n])), default=0)
    return text[: len(text) - begun]


def new_call_id() -> str:
    """An id for a call that has none."""
    return f"call_{uuid.uuid4().hex}"
