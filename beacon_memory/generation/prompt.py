"""Prompts in a model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from beacon_memory.errors import InputError
from beacon_memory.modeling.model import BeaconModel

__all__ = ["chat_prompt"]

Messages = str | Sequence[Mapping[str, Any]]


def chat_prompt(
    model: BeaconModel, messages: Messages, *, behind_memory: bool, tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Token ids of a conversation, or of one question, in the model's chat template, up to where the answer begins.

    Behind a memory, the bos token that a template may set is left out: it stands in front of the memory. tools: JSON
    schemas of functions that the model may call. Raises InputError for a model whose template has no place for them.
    """
    tokenizer = model.tokenizer
    if tokenizer.chat_template is None:
        raise InputError("the model's tokenizer has no chat template: questions need a chat (instruct) model")
    conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
    if not conversation or not all(isinstance(m.get("content"), str) or m.get("tool_calls") for m in conversation):
        raise InputError(f"messages={messages!r} must be a text, or dicts with 'role' and 'content' texts")

    def render(**given: Any) -> str:
        return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False, **given))

    text = render(tools=list(tools)) if tools else render()
    if tools and text == render():
        raise InputError("the model's chat template has no place for tools: take a model that was trained to call them")
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if behind_memory and model.leading_bos and ids[:1] == model.leading_bos:
        return ids[1:]
    return ids
