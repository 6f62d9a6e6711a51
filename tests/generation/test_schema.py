"""Answers that are JSON of a schema: whatever a model would say, and however it is sampled."""

from __future__ import annotations

import json
from typing import Any

import pytest
from behind_memory import greedy, make_model, no_memory
from tiny_models import EOS, some_ids

from beacon_memory.errors import InputError
from beacon_memory.generation.decode_loop import DecodeLoop
from beacon_memory.generation.generate import Request

RENT = {
    "type": "object",
    "properties": {"payer": {"enum": ["Ada", "Bo"]}, "year": {"type": "integer", "minimum": 2000, "maximum": 2040}},
    "required": ["payer", "year"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 0.9, "top_p": 0.1},
        {"repetition_penalty": 1.5, "min_p": 0.5},
    ],
    ids=str,
)
def test_answers_meet_their_schemas_and_leave_those_beside_them_alone(options: dict[str, Any]) -> None:
    model = make_model()
    loop = DecodeLoop(model)
    config = greedy(model, **{"max_new_tokens": 60, "eos_token_id": EOS, **options})

    def request(n: int) -> Request:
        return Request(no_memory(model), some_ids(3 + n, seed=n))

    alone = loop.submit(request(0), config, seed=1).result()
    free, *held = [
        loop.submit(request(n), config, seed=n + 1, schema=schema)
        for n, schema in enumerate([None, RENT, RENT, {"enum": [7, None]}, {"const": "a ü"}])
    ]
    assert free.result().tokens == alone.tokens
    *rents, number, const = [json.loads(ticket.result().text) for ticket in held]
    for rent in rents:
        assert list(rent) == ["payer", "year"]
        assert rent["payer"] in ("Ada", "Bo")
        assert 2000 <= rent["year"] <= 2040
    assert number in (7, None)
    assert const == "a ü"
    assert all(ticket.result().ended for ticket in held)


def test_an_answer_that_is_cut_off_is_the_beginning_of_one() -> None:
    model = make_model()
    config = greedy(model, max_new_tokens=9, eos_token_id=EOS)
    text = DecodeLoop(model).submit(Request(no_memory(model), some_ids(4)), config, schema=RENT).result()
    assert text.text == '{"payer":'
    assert not text.ended


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strange"}, "schema={'type': 'strange'} cannot be met: .*strange"),
        ({"properties": []}, "cannot be met"),
        ({"not": {"type": "string"}}, "cannot be met: .*not"),
        ({"const": float("nan")}, "cannot be met|is no JSON"),
        ({"const": {1, 2}}, "is no JSON: .*set"),
        ({"$ref": "https://example.com/schema.json"}, "cannot be met"),
        ({"type": "string", "pattern": "("}, "cannot be met"),
    ],
    ids=str,
)
def test_what_is_no_schema_is_refused(schema: dict[str, Any], said: str) -> None:
    model = make_model()
    config = greedy(model, eos_token_id=EOS)
    with pytest.raises(InputError, match=said):
        DecodeLoop(model).submit(Request(no_memory(model), some_ids(4)), config, schema=schema)


def test_options_that_forbid_what_the_schema_demands_are_an_error() -> None:
    model = make_model()
    config = greedy(model, max_new_tokens=20, min_new_tokens=20, eos_token_id=EOS)
    ticket = DecodeLoop(model).submit(Request(no_memory(model), some_ids(4)), config, schema={"const": 5})
    with pytest.raises(InputError, match="leave no token"):
        ticket.result()
