"""Reading tool calls in the forms in which models write them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from tiny_models import tiny_tokenizer

from beacon_memory.generation.tool_calls import certain_text, chosen_tools, read_answer, split_calls, write_call
from beacon_memory.results import ToolCall, UnreadCall

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "look", "parameters": {"properties": {"at": {"type": "string"}}}}},
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "properties": {
                    "a": {"type": "integer"},
                    "b": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                    "exact": {"type": "boolean"},
                    "note": {"type": ["string", "null"]},
                }
            },
        },
    },
]
LOOK = '{"name": "look", "arguments": {"at": "roof"}}'
ADD = '{"name": "add", "arguments": {"a": 1}}'


def told(text: str, tools: Any = TOOLS) -> list[Any]:
    """The parts of an answer: texts without blanks around them, calls without their ids."""
    parts = split_calls(text, tools)
    assert len({part.id for part in parts if isinstance(part, ToolCall)}) == sum(isinstance(p, ToolCall) for p in parts)
    parts = [part.strip() if isinstance(part, str) else part for part in parts]
    return [(part.name, part.arguments) if isinstance(part, ToolCall) else part for part in parts if part]


LOOKED, ADDED = ("look", {"at": "roof"}), ("add", {"a": 1})
FORMS = [
    (f"<tool_call>\n{LOOK}\n</tool_call>", [LOOKED]),
    (f"So: <tool_call>{LOOK}</tool_call> or <tool_call>{ADD}</tool_call> done", ["So:", LOOKED, "or", ADDED, "done"]),
    (f"<tool_call>\n{LOOK}\n{ADD}\n</tool_call>", [LOOKED, ADDED]),
    (f"<tool_call>[{LOOK}, {ADD}]</tool_call>", [LOOKED, ADDED]),
    (f"<tool_call>{LOOK}", [LOOKED]),
    (f"<tool_call>{LOOK}</tool_c", [LOOKED]),
    (f"<tool_call>{LOOK} So.", [LOOKED, "So."]),
    ('<tool_call>{"name": "unknown"}</tool_call>', [("unknown", {})]),
    ('<tool_call>{"name": "look", "arguments": {"at": "a\n</tool_call>{"}}</tool_call>',
     [("look", {"at": "a\n</tool_call>{"})]),
    ('<tool_call>{"name": "look", "arguments": "{\\"at\\": \\"roof\\"}"}</tool_call>', [LOOKED]),
    ('<tool_call>{"function": {"name": "look", "parameters": {"at": "roof"}}}</tool_call>', [LOOKED]),
    (f"<think>Or <tool_call>{ADD}</tool_call>?</think>\n<tool_call>{LOOK}</tool_call>",
     [f"<think>Or <tool_call>{ADD}</tool_call>?</think>", LOOKED]),
    (f"<think>\n{ADD}\n", [f"<think>\n{ADD}"]),
    ("<tool_call>\n<function=look>\n<parameter=at>\nroof\nor <b>\n</parameter>\n</function>\n</tool_call>",
     [("look", {"at": "roof\nor <b>"})]),
    ("<tool_call><function=add><parameter=a>7</parameter><parameter=b>null</parameter><parameter=exact>True</parameter>"
     "<parameter=note>7</parameter><parameter=other>8</parameter></function></tool_call>",
     [("add", {"a": 7, "b": None, "exact": True, "note": "7", "other": "8"})]),
    ("<tool_call><function=add><parameter=a>seven</parameter></function></tool_call>", [("add", {"a": "seven"})]),
    (f"```json\n{LOOK}\n```", [LOOKED]),
    (f"I look.\n```json\n{LOOK}\n```\nAnd then?", ["I look.", LOOKED, "And then?"]),
    (f"```json\n[{LOOK}, {ADD}]\n```\n", [LOOKED, ADDED]),
    (f"```\n{LOOK}\n{ADD}\n```", [LOOKED, ADDED]),
    (f"```json\n{LOOK}\n```\n\n```json\n{ADD}\n```", [LOOKED, ADDED]),
    (f"```json\n{LOOK}", [LOOKED]),
    (f"<tools>\n{LOOK}\n</tools>", [LOOKED]),
    (LOOK, [LOOKED]),
    (f"{LOOK}; {ADD}", [LOOKED, ADDED]),
    (f"So I look:\n\n{LOOK}\n\nThat is all.", ["So I look:", LOOKED, "That is all."]),
    (f"{{{LOOK}}}\n{{{ADD}}} So.", [LOOKED, ADDED, "So."]),
    (f"<tool_call>\n{{{LOOK}}}\n</tool_call>", [LOOKED]),
    ('{"name": "look", "parameters": {"at": "roof"}}', [LOOKED]),
    ('{"type": "function", "name": "look", "parameters": {"at": "roof"}}', [LOOKED]),
    ('[{"name": "look", "arguments": {"at": "roof"}, "id": "abcdefghi"}]', [LOOKED]),
]  # fmt: skip
TEXTS = [
    "",
    "no call",
    "The tag <tool_call> opens a call. Remember: the code is 4711.",
    f"Write `<tool_call>{LOOK}</tool_call>` or '<tool_call>{LOOK}</tool_call>' to look.",
    '{"name": "Ada Flint", "rent": 40}',
    '```json\n{"name": "Ada Flint", "arguments": {}}\n```',
    '```json\n{"name": "look", "description": "Look.", "parameters": {"type": "object"}}\n```',
    '{"name": "look"}',
    f"It says {LOOK} there.",
    "[link](url)\n[1] Flint, A.\n{ no } JSON\n[]\n{}\n[[[[",
    "```python\nprint({})\n```",
    "<b>bold</b>\n<tools>none</tools>",
]


@pytest.mark.parametrize(("text", "expected"), FORMS)
def test_forms_of_calls_that_are_read(text: str, expected: list[Any]) -> None:
    assert told(text) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_call_stays_as_it_is(text: str) -> None:
    assert "".join(map(str, split_calls(text, TOOLS))) == text


def test_json_is_a_call_only_of_tools_that_were_offered() -> None:
    for text in (LOOK, f"```json\n{LOOK}\n```", f"[{LOOK}]"):
        assert told(text, TOOLS[1:]) == told(text, []) == [text]
    assert told(f"```json\n{LOOK}\n```\n<tool_call>{LOOK}</tool_call>") == [f"```json\n{LOOK}\n```", LOOKED]


@pytest.mark.parametrize(
    "inside",
    ["", "f(1)", "[]", "7", '"f"', "null", "{}", '["f"]', '{"name": 7}', '{"name": "f", "arguments": [1]}',
     '{"name": "f", "arguments": "x"}', '{"name": "f", "arguments": {"x": 1}', '{"name": "f", ', "[" * 100_000,
     "9" * 5_000, "<function=f><parameter=x>1"],
)  # fmt: skip
def test_calls_that_cannot_be_read_are_kept_as_such(inside: str) -> None:
    before, unread, after = split_calls(f"One. <tool_call>\n{inside}\n</tool_call> Two.", TOOLS)
    assert isinstance(unread, UnreadCall)
    assert (before, after, unread.inside) == ("One. ", " Two.", inside.strip())
    assert unread.text == f"<tool_call>\n{inside}\n</tool_call>"
    assert "not a JSON object with the text 'name'" in unread.error


def test_what_is_written_is_read() -> None:
    arguments = {"at": "日本 </tool_call> \n ``` <think>", "n": [1, None, {"a": 2.5}]}
    assert told(write_call({"name": "look", "arguments": arguments})) == [("look", arguments)]


@pytest.mark.parametrize("text", [*(text for text, _ in FORMS), *TEXTS])
def test_text_that_is_certain_grows_and_holds_no_part_of_a_call(text: str) -> None:
    whole = "".join(part for part in split_calls(text, TOOLS) if isinstance(part, str))
    shown = [certain_text(tiny_tokenizer(), text[:n], TOOLS) for n in range(len(text) + 1)]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    assert all(text[:n].startswith(part) for n, part in enumerate(shown))
    assert whole.strip().startswith(shown[-1].strip())


def test_text_is_held_back_only_as_long_as_it_may_become_a_call() -> None:
    def certain(text: str) -> str:
        return certain_text(tiny_tokenizer(), text, TOOLS)

    assert certain("a < b") == "a < b"
    assert certain("a <tool") == "a "
    assert certain("a <tool_call>{") == "a "
    assert certain("See [1].\n[link](url) is") == "See [1].\n[link](url) is"
    assert certain('So:\n{"name": "Ada", "rent"') == "So:\n"
    assert certain('So:\n{"name": "Ada", "rent": 40} is') == 'So:\n{"name": "Ada", "rent": 40} is'
    assert certain("So:\n```py") == "So:\n"
    assert certain("So:\n```python\nprint(1)") == "So:\n```python\nprint(1)"
    assert certain_text(tiny_tokenizer(), "a <tool_call>{", []) == "a <tool_call>{"


TEMPLATE = {  # after that of transformers for Gemma 4: text, and calls between special tokens
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": {"open": "<|think|>", "close": "<|end|>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<\|call\|>(?P<name>\w+)",
            "close": "<|end|>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": "</s>", "content": "text"},
    },
}


def test_answers_are_read_by_the_template_that_a_model_brings() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|call|>", "<|end|>", "<|think|>"]})
    tokenizer.response_template = TEMPLATE

    def read(answer: str, prompt: str = "<|assistant|>", tools: Any = TOOLS, **options: Any) -> list[Any]:
        tokens, before = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, prompt))
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        parts = read_answer(tokenizer, text, tokens, prompt=before, tools=tools, **options)
        return [(part.name, part.arguments) if isinstance(part, ToolCall) else part for part in parts]

    assert read('I look.<|call|>look{"at": "roof"}<|end|></s>') == ["I look.", LOOKED]
    assert read('Or so.<|end|><|call|>add{"a": "1"}<|end|>', prompt="<|assistant|><|think|>") == [
        ADDED
    ]  # as its schema
    assert read("Just text.</s>") == ["Just text."]
    assert read('So STOP <|call|>look{"at": "roof"}<|end|>', stops=["STOP"]) == ["So"]
    assert read('<|call|>look{"at": <|end|></s>') == ['look{"at": ']  # cannot be read
    assert read('<|call|>look{"at": "roof"}<|end|>', tools=[]) == ['look{"at": "roof"}']
    assert certain_text(tokenizer, "I look.", TOOLS) == ""


def test_choice_decides_which_tools_are_offered() -> None:
    choice: Any
    for choice in (None, "auto"):
        assert chosen_tools(TOOLS, choice) == (TOOLS, False)
    for choice in (False, "none"):
        assert chosen_tools(TOOLS, choice) == ([], False)
    for choice in ("add", {"type": "function", "function": {"name": "add"}}):
        assert chosen_tools(TOOLS, choice) == (TOOLS[1:], True)


def test_ids_are_new_even_if_a_model_writes_the_same_one_twice() -> None:
    block = json.dumps({"name": "look", "arguments": {}, "id": "1"})
    parts = split_calls(f"<tool_call>{block}</tool_call><tool_call>{block}</tool_call>")
    ids = [part.id for part in parts if isinstance(part, ToolCall)]
    assert len({*ids, "1"}) == 3
    assert all(len(id) == 9 and id.isalnum() for id in ids)  # as templates of Mistral demand
