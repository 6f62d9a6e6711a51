"""Tool calls in answers, in the forms in which models write them.

* `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen2.5, Qwen3), or with
  `<function=name><parameter=key>value</parameter></function>` inside (Qwen3-Coder).
* The same object bare at the beginning of a line, in a fenced block or in other tags, with `arguments` or `parameters`,
  or a list of such objects (Qwen2.5-Coder, Llama 3, Mistral). As this may as well be JSON that the user asked for, it
  counts only if it calls a tool that was offered, and only in an answer that has no `<tool_call>`.
* Whatever the model's tokenizer describes in its `response_template`, which transformers reads.

What a model thinks aloud (`<think>`), and a `<tool_call>` behind a backtick or a quotation mark, is text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from beacon_memory.errors import InputError
from beacon_memory.results import ToolCall, UnreadCall

__all__ = [
    "OPENING",
    "Part",
    "call_of_turn",
    "certain_text",
    "chosen_tools",
    "new_call_id",
    "read_answer",
    "results_in_order",
    "split_calls",
    "with_calls_as_text",
    "write_call",
]

Part = str | ToolCall | UnreadCall

OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_DECODER = json.JSONDecoder(strict=False)  # models write line breaks into strings as they are
_FIELDS = {"name", "arguments", "parameters", "id", "type"}
_NO_CALL = (ValueError, TypeError, LookupError, AttributeError, RecursionError)  # of what has not the form of one

_THOUGHTS = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_TAGGED = re.compile(rf"(?<![`'\"]){OPENING}\s*")
_WRAPPING = r"(?:(?P<fence>```)[\w-]*[ \t]*\r?\n\s*|<(?P<tag>tools|tool|function_call|response|json)>\s*)?"
_BARE = re.compile(rf"^[ \t]*{_WRAPPING}(?=[\[{{])", re.MULTILINE)
_MAYBE_BARE = re.compile(rf"^[ \t]*(?:{_WRAPPING}(?=[\[{{]|\Z)|[`<].*\Z)", re.MULTILINE)  # or the beginning of one
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*(?=<parameter=|\Z)", re.DOTALL)


def read_answer(
    tokenizer: Any,
    text: str,
    tokens: Sequence[int],
    *,
    prompt: Sequence[int],
    stops: Sequence[str] = (),
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[Part, ...]:
    """Return an answer as texts and calls of the offered tools, in their order.

    text: the answer without special tokens. tokens: of the answer, with which the tokenizer's own `response_template`
    is read, if it has one. prompt: tokens in front of them. stops: texts at which the answer ended.
    """
    if not tools:
        return (text,)
    if tokenizer_reads_calls(tokenizer):
        raw = str(tokenizer.decode(tokens))
        for stop in stops:
            raw = raw.partition(stop)[0]
        try:
            said = tokenizer.parse_response(raw, prefix=str(tokenizer.decode(prompt)), tools=list(tools))
            calls = [*map(_call, said.get("tool_calls") or ())]
            return (*filter(None, [str(said.get("content") or "")]), *calls)
        except _NO_CALL:  # the model did not keep to it
            pass
    return tuple(split_calls(text, tools))


def tokenizer_reads_calls(tokenizer: Any) -> bool:
    """Tell whether a tokenizer describes the answers of its model."""
    return getattr(tokenizer, "response_template", None) is not None


def split_calls(text: str, tools: Sequence[Mapping[str, Any]] = ()) -> list[Part]:
    """Split an answer into texts and tool calls, in their order.

    tools: JSON schemas of those that were offered.

    >>> split_calls('Let me see. <tool_call>{"name": "look", "arguments": {"at": "roof"}}</tool_call>')
    ['Let me see. ', ToolCall(id='...', name='look', arguments={'at': 'roof'})]
    """
    offered = _offered(tools)
    done, at = 0, _after_thoughts(text)
    tagged = _TAGGED.search(text, at) is not None
    parts: list[Part] = []
    while match := (_TAGGED if tagged else _BARE).search(text, at):
        calls, stop = _tagged_calls(text, match, offered) if tagged else _bare_calls(text, match, offered)
        if calls:
            parts += [text[done : match.start()], *calls]
            done = stop
        at = max(stop, match.start() + 1)
    return [part for part in [*parts, text[done:]] if part != ""]


def certain_text(tokenizer: Any, text: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """Return how much of an answer that is not finished is certain to be text, and no call."""
    if not tools:
        return text
    if tokenizer_reads_calls(tokenizer):
        return ""  # which of it that is, it says at the end
    at = _after_thoughts(text)
    if tag := _TAGGED.search(text, at):
        text = text[: tag.start()]
    else:
        begun = max((n for n in range(1, len(OPENING)) if text.endswith(OPENING[:n])), default=0)
        text = text[: len(text) - begun]
    offered = _offered(tools)
    while match := _MAYBE_BARE.search(text, at):
        if match.end() == len(text) or _bare_calls(text, match, offered)[0] or _unfinished(text, match.end()):
            return text[: match.start()]
        at = max(match.end(), match.start() + 1)
    return text


def write_call(fields: Mapping[str, Any]) -> str:
    """Write a tool call as a model would have written it."""
    return f"{OPENING}\n{json.dumps(fields, ensure_ascii=False)}\n{_CLOSING}"


def call_of_turn(id: str | None, name: str, arguments: Any) -> dict[str, Any]:
    """Return a tool call as chat templates have it among the `tool_calls` of a turn."""
    return {"type": "function", "id": id or "", "function": {"name": name, "arguments": arguments}}


def with_calls_as_text(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn of a conversation with its `tool_calls` as part of its text, as the model would have written it."""
    calls = [call["function"] for call in turn.get("tool_calls") or ()]
    written = [write_call({"name": call["name"], "arguments": call.get("arguments", {})}) for call in calls]
    kept = {name: value for name, value in turn.items() if name != "tool_calls"}
    return kept | {"content": "\n".join(filter(None, [turn.get("content"), *written]))}


def results_in_order(turns: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return turns with the results of tools in the order of their calls: most templates show a model no ids."""
    ordered: list[dict[str, Any]] = []
    places: dict[Any, int] = {}
    for results, group in groupby(turns, key=lambda turn: turn.get("role") == "tool"):
        run = list(group)
        if results:
            run.sort(key=lambda turn: places.get(turn.get("tool_call_id"), len(places)))
        else:
            places = {call.get("id"): n for n, call in enumerate(run[-1].get("tool_calls") or ())}
        ordered += run
    return ordered


def chosen_tools(tools: Sequence[Mapping[str, Any]], choice: Any) -> tuple[list[Mapping[str, Any]], bool]:
    """Return the tools that a `tool_choice` leaves, and whether one of them has to be called.

    choice: None or "auto" leaves it to the model, "none" or False offers no tool, "any", "required" or True demands a
    call, and a tool's name, or an OpenAI-style dict with it, a call of that one. Raises InputError for anything else.
    """
    if choice is None or choice == "auto":
        return list(tools), False
    if choice is False or choice == "none":
        return [], False
    if choice is True or choice in ("any", "required"):
        return list(tools), True
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else choice
    if chosen := [tool for tool in tools if tool["function"]["name"] == name]:
        return chosen, True
    known = ", ".join(repr(tool["function"]["name"]) for tool in tools) or "none"
    raise InputError(
        f"tool_choice={choice!r} must be 'auto', 'any', 'required', 'none' or the name of a tool; tools: {known}"
    )


def new_call_id() -> str:
    """Return an id for a call: nine letters and digits, as some templates demand."""
    return uuid.uuid4().hex[:9]


def _offered(tools: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the schemas of the arguments of tools, under the tools' names."""
    functions = [tool.get("function", tool) for tool in tools]
    return {str(function.get("name")): function.get("parameters") or {} for function in functions}


def _after_thoughts(text: str) -> int:
    thoughts = _THOUGHTS.match(text)
    return thoughts.end() if thoughts else 0


def _tagged_calls(
    text: str, match: re.Match[str], offered: Mapping[str, Mapping[str, Any]]
) -> tuple[list[ToolCall | UnreadCall], int]:
    """Return the calls behind an opening tag, and where they end; none if the tag is only spoken of."""
    at = match.end()
    calls: list[ToolCall | UnreadCall]
    try:
        if function := _FUNCTION.match(text, at):
            calls, stop = [_function_call(function, offered)], function.end()
        else:
            values, stop = _values(text, at)
            calls = [*map(_call, values)]
        if not calls:
            raise TypeError("there is none in it")
        return calls, _after(text, stop, _CLOSING)
    except _NO_CALL as error:
        broken = max(at, getattr(error, "pos", at))
        why = f"not a JSON object with the text 'name' and the object 'arguments': {error!r}"
    closing = text.find(_CLOSING, broken)
    if closing < 0 and text[at : at + 1] not in ("{", "[") and not text.startswith("<function=", at):
        return [], at
    inside = text[at : closing if closing >= 0 else len(text)]
    stop = at + len(inside) + (len(_CLOSING) if closing >= 0 else 0)
    return [UnreadCall(inside.strip(), text[match.start() : stop], why)], stop


def _bare_calls(text: str, match: re.Match[str], offered: Collection[str]) -> tuple[list[ToolCall | UnreadCall], int]:
    """Return the calls of offered tools that stand where JSON may begin, and where they end."""
    try:
        values, stop = _values(text, match.end())
        calls = [_call(value, strict=True) for value in values]
    except _NO_CALL:
        return [], match.end()
    if not {call.name for call in calls} <= {*offered}:
        return [], match.end()
    return [*calls], _after(text, stop, f"</{match['tag']}>" if match["tag"] else match["fence"] or "")


def _values(text: str, at: int) -> tuple[list[Any], int]:
    """Return the JSON values that stand there one behind another, lists as their items, and where they end."""
    values: list[Any] = []
    stop = at
    while text[at : at + 1] in ("{", "[") or not values:
        try:
            value, stop = _value(text, at)
        except _NO_CALL:
            if values:
                break
            raise
        values += value if isinstance(value, list) else [value]
        at = stop + len(text[stop:]) - len(text[stop:].lstrip(" \t\r\n,;"))
    return values, stop


def _value(text: str, at: int) -> tuple[Any, int]:
    """Return the JSON value that stands there, and where it ends.

    Its outer braces may be doubled, as the template of Qwen2.5-Coder shows them by mistake.
    """
    doubled = text.startswith("{{", at)
    value, stop = _DECODER.raw_decode(text, at + doubled)
    return value, _after(text, stop, "}") if doubled else stop


def _after(text: str, stop: int, closing: str) -> int:
    """Return where a call ends that may be closed by a tag; the tag may be missing, or cut off by the answer's end."""
    rest = text[stop:].lstrip()
    if closing.startswith(rest):
        return len(text)
    return len(text) - len(rest) + len(closing) if closing and rest.startswith(closing) else stop


def _unfinished(text: str, at: int) -> bool:
    """Tell whether the JSON that begins there is sound as far as it has come."""
    try:
        _value(text, at)
    except json.JSONDecodeError as error:
        longest = len("-Infinity")  # of what is only known to be wrong when all of it is there
        return error.pos + longest > len(text) or error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        pass
    return False


def _call(fields: Any, *, strict: bool = False) -> ToolCall:
    """Return the call that JSON tells of; raises one of _NO_CALL if it tells of none.

    strict: it must have arguments, and nothing that no call has, as a tool's schema would.
    """
    fields = fields["function"] if isinstance(fields.get("function"), dict) else fields
    name, arguments = fields["name"], fields.get("arguments", fields.get("parameters"))
    if strict and (arguments is None or not {*fields} <= _FIELDS):
        raise TypeError(f"fields {[*fields]}")
    if isinstance(arguments, str):  # some models quote them
        arguments = _DECODER.decode(arguments)
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise TypeError(f"name={name!r}, arguments={arguments!r}")
    return ToolCall(new_call_id(), name, arguments)


def _function_call(match: re.Match[str], offered: Mapping[str, Mapping[str, Any]]) -> ToolCall:
    """Return a call in tags; its arguments are texts, unless the tool's schema says otherwise."""
    name = match[1].strip()
    properties = offered.get(name, {}).get("properties") or {}
    given = _PARAMETER.findall(match[2].strip())
    return ToolCall(new_call_id(), name, {key: _argument(value, properties.get(key) or {}) for key, value in given})


def _argument(value: str, schema: Mapping[str, Any]) -> Any:
    types = " ".join(str(one.get("type", "")) for one in (schema, *schema.get("anyOf", ())))
    if types.strip() and "string" not in types:
        for form in (value, value.lower()):  # Python's True
            try:
                return _DECODER.decode(form)
            except (ValueError, RecursionError):
                pass
    return value
