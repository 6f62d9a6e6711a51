"""The facts of `generate` behind a memory that generation.py relies on, each pinned against the stock model."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from behind_memory import compressed, greedy, make_model, no_memory, printable_part
from stock_behind import eager, stock_reading
from tiny_models import MODELS, VOCAB, some_ids, tiny_base, tiny_checkpoint, tiny_model, tiny_tokenizer
from transformers import GenerationConfig, PreTrainedModel

from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import CapacityError, InputError
from beacon_memory.generation.decode_loop import DecodeLoop
from beacon_memory.generation.generate import Generation, Request, generate
from beacon_memory.generation.options import DEFAULT_MAX_NEW_TOKENS, generation_config
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.model import BeaconModel

every_compression = pytest.mark.parametrize("compression", list(BUILT_IN))


def looped(model: BeaconModel, request: Request, config: GenerationConfig, seed: int | None = None) -> Generation:
    """The same by a `DecodeLoop`."""
    return DecodeLoop(model).submit(request, config, seed=seed).result()


def greedy_by_hand(stock: PreTrainedModel, prefix: MemoryKV, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens from full attention over [prefix | everything so far], all of it read anew for each."""
    made: list[int] = []
    while len(made) < count:
        made.append(int(stock_reading(stock, [*prompt, *made], prefix).logits[-1].argmax()))
    return made


@pytest.mark.parametrize("name", MODELS)
@every_compression
def test_tokens_follow_the_prefix_at_consecutive_positions(name: str, compression: str) -> None:
    model = make_model(name)
    prefix, prompt = compressed(model, some_ids(40), 4, compression), some_ids(5, seed=1)
    ((one,),) = generate(model, [Request(prefix, prompt)], greedy(model))
    assert list(one.tokens) == greedy_by_hand(eager(name), prefix, prompt, 12)


@pytest.mark.parametrize("name", MODELS)
@every_compression
def test_uncompressed_memory_answers_like_the_full_text(name: str, compression: str) -> None:
    ids, prompt, model = some_ids(30), some_ids(6, seed=1), make_model(name)
    prefix = compressed(model, ids, 0, compression)
    ((behind,),) = generate(model, [Request(prefix, prompt)], greedy(model))
    ((read,),) = generate(model, [Request(no_memory(model), [1, *ids, *prompt])], greedy(model))
    assert behind.tokens == read.tokens
    stock = eager(name).generate(torch.tensor([[1, *ids, *prompt]]), max_new_tokens=12, eos_token_id=None)
    assert list(behind.tokens) == stock[0, 37:].tolist()


@every_compression
def test_prompt_longer_than_the_prefix_sees_all_of_the_prefix(compression: str) -> None:
    model = make_model()
    prefix, prompt = compressed(model, some_ids(8), 4, compression), some_ids(30, seed=1)
    assert len(prompt) > prefix.span
    ((one,),) = generate(model, [Request(prefix, prompt)], greedy(model))
    assert list(one.tokens) == greedy_by_hand(eager("llama"), prefix, prompt, 12)


def test_a_interpolated_prefix_leaves_the_prompt_right_behind_it() -> None:
    model = make_model()
    prefix, prompt = compressed(model, some_ids(40), 4), some_ids(5, seed=1)
    tokens = []
    for span in (prefix.span, 20):
        ((one,),) = generate(model, [Request(prefix.interpolated(span), prompt)], greedy(model))
        assert list(one.tokens) == greedy_by_hand(eager("llama"), prefix.interpolated(span), prompt, 12)
        tokens.append(one.tokens)
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize("name", MODELS)
def test_batch_of_different_prefixes_and_prompts_equals_one_at_a_time(name: str) -> None:
    model = make_model(name)
    requests = [
        Request(
            compressed(model, some_ids(50, seed=seed), 2 + seed, compression), some_ids(4 + 3 * seed, seed=9 + seed)
        )
        for seed, compression in enumerate(BUILT_IN)
    ]
    requests.append(Request(no_memory(model), some_ids(7)))
    together = generate(model, requests, greedy(model))
    alone = [generate(model, [request], greedy(model))[0] for request in requests]
    assert [one.tokens for (one,) in together] == [one.tokens for (one,) in alone]


def test_requests_may_share_a_memory() -> None:
    model = make_model()
    prefix = compressed(model, some_ids(50), 4)
    requests = [Request(prefix, some_ids(4 + seed, seed=seed)) for seed in range(3)]
    requests.insert(1, Request(compressed(model, some_ids(20, seed=5), 2), some_ids(9)))
    together = generate(model, requests, greedy(model))
    alone = [generate(model, [request], greedy(model))[0] for request in requests]
    assert [one.tokens for (one,) in together] == [one.tokens for (one,) in alone]


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_behind_a_prefix_equal_beams_over_the_full_text(beams: int) -> None:
    model = make_model()
    ids, prompt = some_ids(20), some_ids(5, seed=1)
    config = greedy(model, num_beams=beams)
    ((behind,),) = generate(model, [Request(compressed(model, ids, 0), prompt)], config)
    stock = model.base.generate(
        input_ids=torch.tensor([[1, *ids, *prompt]]),
        num_beams=beams,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    assert list(behind.tokens) == stock[0, 26:].tolist()


def test_several_sequences_for_each_prompt_of_a_batch() -> None:
    model = make_model()
    requests = [Request(compressed(model, some_ids(30 + n), 2), some_ids(4 + n)) for n in range(2)]
    config = greedy(model, num_beams=3, num_return_sequences=2)
    together = generate(model, requests, config)
    assert [len(texts) for texts in together] == [2, 2]
    assert [[t.tokens for t in texts] for texts in together] == [
        [t.tokens for t in generate(model, [request], config)[0]] for request in requests
    ]


def test_generating_leaves_the_stored_tensors_alone() -> None:
    model = make_model()
    prefix = compressed(model, some_ids(40), 4)
    before = [part.clone() for part in (prefix.keys, prefix.values, prefix.positions)]
    first = generate(model, [Request(prefix, some_ids(5))], greedy(model))
    again = generate(model, [Request(prefix, some_ids(5))], greedy(model))
    assert all(torch.equal(*pair) for pair in zip((prefix.keys, prefix.values, prefix.positions), before, strict=True))
    assert first[0][0].tokens == again[0][0].tokens


def test_too_many_positions_are_refused_before_any_work_with_the_numbers() -> None:
    model = make_model(max_position_embeddings=64)
    prefix = compressed(model, some_ids(60), 2, "beacon")

    def fail(*_: Any) -> None:
        raise AssertionError("the model ran")

    model.base.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(CapacityError, match=r"31 positions of memory, 30 prompt tokens and 12 .* need 73 .* has 64"):
        generate(model, [Request(prefix, some_ids(30))], greedy(model))


def test_what_counts_is_the_positions_that_a_memory_takes_not_its_entries() -> None:
    model = make_model(max_position_embeddings=64)
    prefix = compressed(model, some_ids(60), 8)
    assert prefix.slots < 10
    with pytest.raises(CapacityError, match=r"61 positions of memory, 5 prompt tokens"):
        generate(model, [Request(prefix, some_ids(5))], greedy(model))
    assert generate(model, [Request(prefix.interpolated(47), some_ids(5))], greedy(model))


def test_stop_string_ends_the_text_and_is_not_part_of_it() -> None:
    model = make_model()
    request = Request(compressed(model, some_ids(40), 4), some_ids(5))
    whole = generate(model, [request], greedy(model, max_new_tokens=40))[0][0]
    stop = printable_part(model, whole.tokens)
    ((ended,),) = generate(model, [request], greedy(model, stop=stop, max_new_tokens=40))
    assert stop not in ended.text
    assert len(ended.tokens) < len(whole.tokens)
    assert ended.text == whole.text[: whole.text.index(stop)].strip()


def test_a_stop_string_is_a_text_that_is_not_empty() -> None:
    model = make_model()
    for stop in ("", [""], ["a", ""], 5, [5], b"a"):
        for given in ({"stop": stop}, {"stop_strings": stop}):
            with pytest.raises(InputError, match=r"stop=.* none of them empty"):
                greedy(model, **given)
    assert greedy(model, stop=[]).stop_strings is None
    assert greedy(model, stop="a").stop_strings == greedy(model, stop_strings="a").stop_strings == ["a"]


def test_a_stop_string_of_the_checkpoint_ends_the_text() -> None:
    model = make_model()
    request = Request(compressed(model, some_ids(40), 4), some_ids(5))
    whole = generate(model, [request], greedy(model, max_new_tokens=40))[0][0]
    stop = "".join(printable_part(model, whole.tokens))
    model.base.generation_config.stop_strings = stop * 2  # a text, as its file may have it, and never generated
    ((same,),) = generate(model, [request], greedy(model, max_new_tokens=40))
    assert same.text == whole.text


def test_tokens_end_with_the_end_of_sequence() -> None:
    model = make_model()
    request = Request(compressed(model, some_ids(40), 4), some_ids(5))
    whole = generate(model, [request], greedy(model))[0][0]
    ((ended,),) = generate(model, [request], greedy(model, eos_token_id=whole.tokens[3], pad_token_id=0))
    assert ended.tokens == whole.tokens[: whole.tokens.index(whole.tokens[3]) + 1]


def test_a_seed_repeats_a_sample_and_leaves_the_random_state_alone() -> None:
    model = make_model()
    request = Request(compressed(model, some_ids(40), 4), some_ids(5))
    config = greedy(model, temperature=1.5)
    state = torch.get_rng_state()
    samples = [generate(model, [request], config, seed=seed)[0][0].tokens for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_tokens": 5}, "max_tokens=5"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": True}, "num_beams=True"),
        ({"min_p": 2}, "min_p=2 must be a number from 0 to 1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"do_sample": "no"}, "do_sample='no' must be True or False"),
        ({"eos_token_id": [2, "</s>"]}, "eos_token_id=.* must be the number of a token"),
        ({"validate": 5}, "validate=5"),
        ({"use_cache": False}, "unknown generation options: use_cache=False; known are"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True"),
        ({"assistant_early_exit": 1, "top_p": 0.5}, "options: assistant_early_exit=1;"),
        ({"watermarking_config": 5}, "cannot be used: .*"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generation_config(make_model(), None, options)


NONSENSE = ("nonsense", -1, 0.5, True, [3], [[3]], {"a": 1}, object())


@pytest.mark.parametrize("name", sorted(GenerationConfig().to_dict()))
def test_an_option_is_refused_or_answered_with_whatever_its_value(name: str) -> None:
    model = make_model()
    request = Request(compressed(model, some_ids(20), 4), some_ids(5))
    expected = generate(model, [request], greedy(model))
    for value in NONSENSE:
        with contextlib.suppress(InputError):
            config = greedy(model, **{"max_new_tokens": 4, name: value})
            alone = generate(model, [request], config, seed=0)
            if (config.num_beams or 1) == (config.num_return_sequences or 1) == 1:
                assert looped(model, request, config, seed=0).tokens == alone[0][0].tokens
    assert generate(model, [request], greedy(model)) == [[replace(expected[0][0], first_token_at=ANY)]]


@pytest.mark.parametrize("option", [{"bad_words_ids": "no"}, {"repetition_penalty": "no"}, {"suppress_tokens": ["no"]}])
def test_what_transformers_refuses_late_is_an_error_of_ours(option: dict[str, Any]) -> None:
    model = make_model()
    request = Request(compressed(model, some_ids(20), 4), some_ids(5))
    with pytest.raises(InputError, match="transformers cannot generate with these options"):
        generate(model, [request], greedy(model, **option))
    with pytest.raises(InputError, match="transformers cannot generate with these options"):
        looped(model, request, greedy(model, **option))


@pytest.mark.parametrize("option", [{"temperature": 1e-45}, {"suppress_tokens": [*range(VOCAB)], "do_sample": True}])
def test_options_that_leave_no_token_are_an_error_of_ours(option: dict[str, Any]) -> None:
    model = make_model()
    request = Request(compressed(model, some_ids(20), 4), some_ids(5))
    for way in (
        lambda: generate(model, [request], greedy(model, **option)),
        lambda: looped(model, request, greedy(model, **option)),
    ):
        with pytest.raises(InputError, match="these options leave no token to sample from"):
            way()


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_scores": True},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
)
def test_settings_of_a_checkpoint_that_a_memory_decides_change_no_answer(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    stock = tiny_base("llama")
    folder = tiny_checkpoint(tmp_path, stock)
    (folder / "generation_config.json").unlink()  # then what config.json says of it counts
    plain = BeaconModel.from_pretrained(folder, config=BeaconConfig(beacon_window=16), device="cpu")
    request = Request(compressed(plain, some_ids(40), 4), some_ids(5))
    expected = generate(plain, [request], greedy(plain))[0][0].tokens
    assert len(expected) == 12
    for file in ("config.json", "generation_config.json"):
        saved = json.loads((folder / "config.json").read_text()) if file == "config.json" else {}
        (folder / file).write_text(json.dumps(saved | settings))
        model = BeaconModel.from_pretrained(folder, config=BeaconConfig(beacon_window=16), device="cpu")
        assert generate(model, [request], greedy(model))[0][0].tokens == expected
        if file == "config.json":
            (folder / file).write_text(json.dumps(saved))


def test_an_option_without_a_value_switches_off_what_the_checkpoint_says() -> None:
    model = make_model()
    request = Request(compressed(model, some_ids(40), 4), some_ids(5))
    whole = generate(model, [request], greedy(model))[0][0].tokens
    model.base.generation_config.eos_token_id = whole[3]
    assert generate(model, [request], greedy(model))[0][0].tokens == whole
    stopped = generate(model, [request], generation_config(model, None, {"max_new_tokens": 12}))[0][0].tokens
    assert stopped == whole[: whole.index(whole[3]) + 1]
    assert generation_config(model, None, {"max_new_tokens": None}).max_new_tokens == DEFAULT_MAX_NEW_TOKENS


def test_naming_a_temperature_samples_and_zero_is_greedy() -> None:
    model = make_model()
    assert generation_config(model, None, {"temperature": 0.7}).do_sample is True
    assert generation_config(model, None, {"temperature": 0}).do_sample is False
    assert not generation_config(model, None, {}).do_sample


def test_chat_prompt_leaves_out_the_bos_that_stands_in_front_of_the_memory() -> None:
    model = make_model()
    alone = chat_prompt(model, "Who?", behind_memory=False)
    behind = chat_prompt(model, "Who?", behind_memory=True)
    assert alone == [1, *behind]
    assert model.tokenizer.decode(behind) == "<|user|>Who?</s><|assistant|>"


def test_chat_prompt_keeps_a_template_token_that_only_looks_like_bos() -> None:
    model = tiny_model("llama", BeaconConfig(beacon_window=16), tokenizer=tiny_tokenizer(leading_bos=False))
    assert chat_prompt(model, "Who?", behind_memory=True)[0] == 1


def test_chat_prompt_takes_a_conversation_and_refuses_anything_else() -> None:
    model = make_model()
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    text = model.tokenizer.decode(chat_prompt(model, turns, behind_memory=True))
    assert text == "<|system|>Be brief.</s><|user|>Who?</s><|assistant|>"
    with pytest.raises(InputError, match="content"):
        chat_prompt(model, [{"role": "user"}], behind_memory=True)
    model.tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        chat_prompt(model, "Who?", behind_memory=True)


def test_tools_go_through_the_template_or_are_refused() -> None:
    model = make_model()
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(InputError, match="no place for tools"):
        chat_prompt(model, "Is it raining?", behind_memory=False, tools=[tool])
    model.tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}\n{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}{{ m.tool_calls | tojson if m.tool_calls }}\n"
        "{% endfor %}"
    )
    plain = model.tokenizer.decode(chat_prompt(model, "Is it raining?", behind_memory=False))
    with_tool = model.tokenizer.decode(chat_prompt(model, "Is it raining?", behind_memory=False, tools=[tool]))
    assert with_tool.endswith(plain)
    assert '"weather"' in with_tool
    called = [{"role": "assistant", "tool_calls": [tool]}, {"role": "tool", "content": "no"}]
    assert '"weather"' in model.tokenizer.decode(chat_prompt(model, called, behind_memory=False))
