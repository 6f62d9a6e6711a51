"""Whether a model's chat template supports tools, and conversations that call them."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory.config import BeaconConfig
from beacon_memory.errors import InputError
from beacon_memory.generation.prompt import chat_prompt, require_tools, takes_tools
from beacon_memory.generation.tool_calls import call_of_turn
from beacon_memory.modeling.model import BeaconModel

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CALLS = "{% for m in messages %}{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}\n{% endfor %}"
HERMES = "{% if tools %}{{ tools | tojson }} as <tool_call>{...}</tool_call>{% endif %}" + CALLS
REFUSING = "{% if tools %}{{ raise_exception('no tools, please') }}{% endif %}" + TURNS
LLAMA = (
    "{% if tools %}{{ tools | tojson }} as name and parameters{% endif %}{% for m in messages %}<|{{ m.role }}|>\n\n"
    '{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", '
    '"parameters": {{ c.function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
MISTRAL = (
    "{% if tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}{% for m in messages %}{% if m.tool_calls %}[CALLS]["
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('no id of nine letters') }}{% endif %}"
    """{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}"""
    "{% endfor %}]</s>{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
UNREAD = MISTRAL.replace("[CALLS][", "[CALLS]call:").replace('"name"', "name")
OTHER = "{% if tools %}{{ tools | tojson }} as [TOOL_CALLS]{% endif %}" + CALLS
MENTIONING = "{# <tool_call> #}" + TURNS


def with_template(template: str | None) -> BeaconModel:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tiny_model("llama", BeaconConfig(beacon_window=32), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("template", "takes"),
    [
        (HERMES, True),
        (LLAMA, True),
        (MISTRAL, True),
        (UNREAD, False),
        (TURNS, False),
        (REFUSING, False),
        (OTHER, False),
        (MENTIONING, False),
        (None, False),
    ],
)
def test_template_takes_tools_if_it_shows_them_and_calls_that_can_be_read(template: str | None, takes: bool) -> None:
    model = with_template(template)
    model.tokenizer.add_special_tokens({"extra_special_tokens": ["[CALLS]"]})
    assert takes_tools(model) == takes
    if takes:
        require_tools(model)
        return
    with pytest.raises(InputError, match="tools cannot be used; take a model that"):
        require_tools(model)


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (HERMES, "Hm.look\n"),
        (OTHER, "Hm.look\n"),
        (TURNS, 'assistant: Hm.\n<tool_call>\n{"name": "look", "arguments": {"at": "roof"}}\n</tool_call>\n'),
    ],
)
def test_calls_in_a_conversation_reach_the_model_whatever_the_template_knows(template: str, shown: str) -> None:
    model = with_template(template)
    turn: dict[str, Any] = {
        "role": "assistant",
        "content": "Hm.",
        "tool_calls": [call_of_turn("1", "look", {"at": "roof"})],
    }
    assert model.tokenizer.decode(chat_prompt(model, [turn], behind_memory=False)) == shown


def test_results_of_tools_reach_the_model_in_the_order_of_their_calls() -> None:
    model = with_template("{% for m in messages %}{{ m.content }} {{ m.tool_calls | length }}\n{% endfor %}")
    calls = [call_of_turn(id, "look", {}) for id in ("1", "2", "3")]
    asked = {"role": "assistant", "content": "Look.", "tool_calls": calls}
    results = [{"role": "tool", "content": f"of {id}", "tool_call_id": id} for id in ("3", "9", "1", "2")]
    then = [{"role": "assistant", "content": "So."}, {"role": "tool", "content": "b"}, {"role": "tool", "content": "a"}]
    shown = model.tokenizer.decode(chat_prompt(model, [asked, *results, *then], behind_memory=False))
    assert [line[:-2] for line in shown.splitlines()] == ["Look.", "of 1", "of 2", "of 3", "of 9", "So.", "b", "a"]
