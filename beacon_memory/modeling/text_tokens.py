"""Texts as tokens: what a text says of control tokens stays text.

Whoever writes a document or a question could else end a turn with it, and go on as the system or the model.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from beacon_memory.errors import InputError

__all__ = ["control_tokens", "text_tokens"]

_PIECE = 1 << 18  # characters that are tokenized at a time: it takes some hundred times as many bytes
_SEAM = 1 << 12  # characters that two pieces have in common
_SAME = 16  # tokens in a row that are the same in both where one goes on for the other

_Tokens = tuple[list[int], list[tuple[int, int]]]


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> _Tokens:
    """Return the token ids of a text, none of them a control token, and where each starts and stops in characters.

    Control tokens are the tokenizer's special ones, and what else its chat template writes that is one token, such as
    `<|im_start|>`. Raises InputError for a text in which the tokenizer finds one in any case.

    A long text is tokenized piece by piece, and as a whole only if two pieces differ all over what they have in common.
    """
    ids, offsets = _tokens(tokenizer, text[:_PIECE])
    for start in range(_PIECE - _SEAM, len(text) - _SEAM, _PIECE - _SEAM):
        more, places = _tokens(tokenizer, text[start : start + _PIECE])
        places = [(start + one, start + other) for one, other in places]
        joint = _joint(offsets, places, ids, more, start + _SEAM // 2)
        if joint is None:
            return _tokens(tokenizer, text)
        here, there = joint
        ids[here:], offsets[here:] = more[there:], places[there:]
    return ids, offsets


def _joint(
    offsets: list[tuple[int, int]], places: list[tuple[int, int]], ids: list[int], more: list[int], middle: int
) -> tuple[int, int] | None:
    """Return at which token of one piece, and of the next one, the next may go on for it; None if at none.

    `_SAME` tokens around it are the same in both; from the middle of what both have in common on, the first is taken.
    """
    here, there = bisect_left(offsets, (middle, 0)), bisect_left(places, (middle, 0))
    numbers = {place: number for number, place in enumerate(places[there : there + _SEAM], there)}
    for one in range(here, len(offsets) - _SAME):
        other = numbers.get(offsets[one])
        if other is None:
            continue
        ours, theirs = slice(one, one + _SAME), slice(other, other + _SAME)
        if offsets[ours] == places[theirs] and ids[ours] == more[theirs] and offsets[one][0] >= offsets[one - 1][1]:
            return one + _SAME // 2, other + _SAME // 2
    return None


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> _Tokens:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
    controls = control_tokens(tokenizer)
    if controls.keys().isdisjoint(ids):
        return ids, offsets
    plain = _without_control_tokens(tokenizer, frozenset(controls.values())).encode(text, add_special_tokens=False)
    if found := controls.keys() & plain.ids:
        raise InputError(
            f"the text holds {controls[min(found)]!r}, which this tokenizer takes for a control token wherever it "
            "stands; write it in another way"
        )
    return list(plain.ids), list(plain.offsets)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
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
