"""Prompts in a model's chat template, and whether it has a place for tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from beacon_memory.errors import InputError
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.results import ToolCall

from .tool_calls import OPENING, call_of_turn, new_call_id, read_answer, results_in_order, with_calls_as_text

__all__ = ["Messages", "chat_prompt", "require_tools", "takes_tools"]

Messages = str | Sequence[Mapping[str, Any]]

_PROBE = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"of": {"type": "string", "description": "Anything."}}},
    },
}
_ADVICE = (
    "so tools cannot be used; take a model that was trained to call them, for example Qwen2.5-Instruct or Llama 3.2"
)


def chat_prompt(
    model: BeaconModel, messages: Messages, *, behind_memory: bool, tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Return the token ids of a conversation, or of one question, in the model's chat template, ready to be answered.

    Behind a memory, the bos token that a template may set is left out: it stands in front of the memory. `tool_calls`
    of a turn become part of its text where the template does not show them.
    tools: JSON schemas of functions that the model may call. Raises InputError for a model whose template has no place
    for them.
    """
    tokenizer = model.tokenizer
    if tokenizer.chat_template is None:
        raise InputError("the model's tokenizer has no chat template: questions need a chat (instruct) model")
    conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
    if not conversation or not all(isinstance(m.get("content"), str) or m.get("tool_calls") for m in conversation):
        raise InputError(f"messages={messages!r} must be a text, or dicts with 'role' and 'content' texts")
    if any(turn.get("tool_calls") for turn in conversation):
        conversation = _with_calls_shown(model, results_in_order(conversation))
    text = _rendered(model, conversation, tools)
    if tools and text == _rendered(model, conversation):
        raise InputError(f"the model's chat template has no place for tools, {_ADVICE}")
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if behind_memory and model.leading_bos and ids[:1] == model.leading_bos:
        return ids[1:]
    return ids


def takes_tools(model: BeaconModel) -> bool:
    """Tell whether the model can call tools: its chat template shows them, and calls in a form that `tool_calls` reads.

    That is seen by what the template makes of a tool and of a call, since some refuse tools, and some write calls in a
    way of their own.
    """
    if model.tokenizer.chat_template is None:
        return False
    asked = [{"role": "user", "content": "probe"}]
    try:
        shown = _rendered(model, asked, [_PROBE])
        return shown != _rendered(model, asked) and (OPENING in shown or _reads_own_calls(model, asked, shown))
    except TemplateError:  # it says itself that it has no place for tools
        return False


def require_tools(model: BeaconModel) -> None:
    """Raise InputError for a model that cannot call tools, see `takes_tools`."""
    if not takes_tools(model):
        raise InputError(
            f"the model's chat template has no place for tools, or writes calls in a form that is not read, {_ADVICE}"
        )


def _reads_own_calls(model: BeaconModel, asked: Sequence[dict[str, Any]], prompt: str) -> bool:
    """Tell whether a call as the template writes it is read as that call."""
    tokenizer: Any = model.tokenizer
    called = {"role": "assistant", "content": "", "tool_calls": [call_of_turn(new_call_id(), "probe", {"of": "this"})]}
    whole = str(tokenizer.apply_chat_template([*asked, called], tools=[_PROBE], tokenize=False))
    written = whole.removeprefix(prompt)
    tokens, before = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (written, prompt))
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    parts = read_answer(tokenizer, text, tokens, prompt=before, tools=[_PROBE])
    return [(one.name, one.arguments) for one in parts if isinstance(one, ToolCall)] == [("probe", {"of": "this"})]


def _with_calls_shown(model: BeaconModel, turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return turns whose tool calls reach the model: as they are if the template shows them, else as text."""
    whole = [{**turn, "content": turn.get("content") or ""} for turn in turns]
    bare = [{name: value for name, value in turn.items() if name != "tool_calls"} for turn in whole]
    try:
        shown = _rendered(model, whole) != _rendered(model, bare)
    except TemplateError:
        shown = False
    return whole if shown else [with_calls_as_text(turn) for turn in whole]


def _rendered(model: BeaconModel, turns: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    given: dict[str, Any] = {"tools": list(tools)} if tools else {}
    tokenizer: Any = model.tokenizer  # its types have no place for content of other kinds
    return str(tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False, **given))
