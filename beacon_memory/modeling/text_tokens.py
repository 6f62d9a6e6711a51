"""Texts as tokens: what a text says of control tokens stays text.

Whoever writes a document or a question could else end a turn with it, and go on as the system or the model.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from beacon_memory.errors import InputError

__all__ = ["text_tokens"]


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the token ids of a text, none of them a control token, and where each starts and stops in characters.

    Control tokens are the tokenizer's special ones, and what else its chat template writes that is one token, such as
    `<|im_start|>`. Raises InputError for a text in which the tokenizer finds one in any case.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
    controls = _control_tokens(tokenizer)
    if controls.keys().isdisjoint(ids):
        return ids, offsets
    plain = _without_control_tokens(tokenizer, frozenset(controls.values())).encode(text, add_special_tokens=False)
    if found := controls.keys() & plain.ids:
        raise InputError(
            f"the text holds {controls[min(found)]!r}, which this tokenizer takes for a control token wherever it "
            "stands; write it in another way"
        )
    return list(plain.ids), list(plain.offsets)


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the control tokens by their ids."""
    special, template = set(tokenizer.all_special_tokens), str(tokenizer.chat_template or "")
    return {
        id: token.content
        for id, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in special or (token.content in template and not token.content.isspace())
    }


@lru_cache(maxsize=2)
def _without_control_tokens(tokenizer: Any, controls: frozenset[str]) -> Any:
    """Return a copy of a tokenizer's backend that takes control tokens for text.

    It is a copy because that is a state of the backend, which other threads use.
    """
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] or token["content"] in controls
    copy = type(backend).from_str(json.dumps(state))
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy
