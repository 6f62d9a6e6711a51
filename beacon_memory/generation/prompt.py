"""Prompts in a model's chat template, and whether it has a place for tools.

Control tokens come from the template alone: what a message says of them stays text.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import transformers

from beacon_memory.conversation import Messages, checked_tools, turns_of
from beacon_memory.documents import check_utf8
from beacon_memory.errors import InputError
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.text_tokens import control_tokens
from beacon_memory.results import ToolCall

from .tool_calls import OPENING, call_of_turn, new_call_id, read_answer, results_in_order, with_calls_as_text

__all__ = ["chat_prompt", "require_tools", "said_before", "takes_tools"]

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
    model: BeaconModel,
    messages: Messages,
    *,
    behind_memory: bool,
    tools: Sequence[Mapping[str, Any]] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
    answered: bool = True,
) -> list[int]:
    """Return the token ids of a conversation, or of one question, in the model's chat template.

    Behind a memory, the bos token that a template may set is left out: it stands in front of the memory. Where the
    template does not show them, `tool_calls` of a turn become part of its text, and a first turn of the system part of
    the user's turn behind it.
    tools: JSON schemas of functions that the model may call. Raises InputError for a model whose template has no place
    for them, and for a conversation that the template refuses.
    chat_template_kwargs: what else the template knows, such as enable_thinking=False; InputError for other names.
    answered: whether the answer of the model comes next, which the template may open.
    """
    if model.tokenizer.chat_template is None:
        raise InputError("the model's tokenizer has no chat template: questions need a chat (instruct) model")
    turns = [turn | {"content": turn.get("content") or ""} for turn in turns_of(messages)]
    given = _checked_arguments(model, {} if chat_template_kwargs is None else chat_template_kwargs)
    turns = _with_system_shown(model, turns, given)
    if any(turn.get("tool_calls") for turn in turns):
        turns = _with_calls_shown(model, results_in_order(turns), given)
    if offered := checked_tools(tools):
        without = _rendered(model, turns, given)
        given["tools"] = offered
        if _rendered(model, turns, given) == without:
            raise InputError(f"the model's chat template has no place for tools, {_ADVICE}")
    ids: list[int] = _applied(model, turns, given, add_generation_prompt=answered, **_as_text(model, turns, given))
    if behind_memory and model.leading_bos and ids[:1] == model.leading_bos:
        return ids[1:]
    return ids


def said_before(model: BeaconModel, messages: Messages, prompt: Sequence[int], **how: Any) -> int:
    """Return how many tokens of a prompt, the first ones, were said before the last turn of the user.

    prompt: what `chat_prompt` made of the messages; how: what it was told beside.

    It is 0 for a question that begins a conversation, whatever the system says in front of it, and where the template
    writes earlier turns otherwise when more follow.
    """
    turns = turns_of(messages)
    last = max((number for number, turn in enumerate(turns) if turn["role"] == "user"), default=0)
    if all(turn["role"] == "system" for turn in turns[:last]):
        return 0
    try:
        before = chat_prompt(model, turns[:last], answered=False, **how)
    except InputError:  # the template wants a conversation to end otherwise
        return 0
    return len(before) if [*prompt[: len(before)]] == before else 0


def takes_tools(model: BeaconModel) -> bool:
    """Tell whether the model can call tools: its chat template shows them, and calls in a form that `tool_calls` reads.

    That is seen by what the template makes of a tool and of a call, since some refuse tools, and some write calls in a
    way of their own.
    """
    if model.tokenizer.chat_template is None:
        return False
    asked = [{"role": "user", "content": "probe"}]
    try:
        shown = _rendered(model, asked, {"tools": [_PROBE]})
        return shown != _rendered(model, asked, {}) and (OPENING in shown or _reads_own_calls(model, asked, shown))
    except InputError:  # it says itself that it has no place for tools
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
    whole = _rendered(model, [*asked, called], {"tools": [_PROBE]}, add_generation_prompt=False)
    written = whole.removeprefix(prompt)
    tokens, before = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (written, prompt))
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    parts = read_answer(tokenizer, text, tokens, prompt=before, tools=[_PROBE])
    return [(one.name, one.arguments) for one in parts if isinstance(one, ToolCall)] == [("probe", {"of": "this"})]


def _checked_arguments(model: BeaconModel, given: object) -> dict[str, Any]:
    """Return arguments of the chat template; raises InputError for those that it does not know, or must not be given.

    Jinja ignores what a template does not use, so a name that is misspelt would go unnoticed.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"chat_template_kwargs={given!r} must be a dict of what the chat template knows")
    check_utf8(given, "chat_template_kwargs")
    template = str(model.tokenizer.chat_template)
    taken = {"messages", *inspect.signature(model.tokenizer.apply_chat_template).parameters}
    for name, value in given.items():
        if name in taken or not re.search(rf"\b{re.escape(str(name))}\b", template):
            why = "is set already" if name in taken else "is not known to the model's chat template"
            raise InputError(f"chat_template_kwargs: {name}={value!r} {why}; leave it out")
    return dict(given)


def _with_calls_shown(
    model: BeaconModel, turns: list[dict[str, Any]], given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return turns whose tool calls reach the model: as they are if the template shows them, else as text."""
    bare = [{name: value for name, value in turn.items() if name != "tool_calls"} for turn in turns]
    try:
        shown = _rendered(model, turns, given) != _rendered(model, bare, given)
    except InputError:
        shown = False
    return turns if shown else [with_calls_as_text(turn) for turn in turns]


def _with_system_shown(
    model: BeaconModel, turns: list[dict[str, Any]], given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return turns whose first one, if the system's, reaches the model: as it is, or in front of the user's text.

    Some templates refuse a turn of the system, and some leave it out.
    """
    if [turn["role"] for turn in turns[:2]] != ["system", "user"]:
        return turns
    system, user = (str(turn["content"]) for turn in turns[:2])
    try:
        shown = system.strip() in _rendered(model, turns[:2], given)
    except InputError:
        shown = False
    return turns if shown else [turns[1] | {"content": f"{system}\n\n{user}".lstrip()}, *turns[2:]]


def _as_text(model: BeaconModel, turns: Sequence[dict[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what lets control tokens in a conversation stay text; from 5.23 on transformers can do it.

    Before, it raises InputError for a conversation that holds one.
    """
    if "sanitize_control_tokens" in inspect.signature(model.tokenizer.apply_chat_template).parameters:
        return {"sanitize_control_tokens": True}
    said = [*_texts([turns, given])]
    for token in control_tokens(model.tokenizer).values():
        if any(token in text for text in said):
            raise InputError(
                f"the conversation holds {token!r}, which transformers {transformers.__version__} would take for a "
                "control token; install transformers 5.23 or newer, which keeps it text, or leave it out"
            )
    return {}


def _texts(value: object) -> Iterator[str]:
    """Yield all texts in a value of dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_texts, value.values()))
    elif isinstance(value, Sequence):
        yield from chain.from_iterable(map(_texts, value))


def _rendered(model: BeaconModel, turns: Sequence[dict[str, Any]], given: Mapping[str, Any], **how: Any) -> str:
    return str(_applied(model, turns, given, tokenize=False, **how))


def _applied(model: BeaconModel, turns: Sequence[dict[str, Any]], given: Mapping[str, Any], **how: Any) -> Any:
    """Apply the chat template; raises InputError with what it says if it refuses the conversation."""
    tokenizer: Any = model.tokenizer  # its types have no place for content of other kinds
    how = {"add_generation_prompt": True, "return_dict": False, **how}
    try:
        return tokenizer.apply_chat_template(list(turns), **how, **given)
    except Exception as error:  # a template is a program of its own
        raise InputError(f"the model's chat template refuses this conversation: {error}") from error
