from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_tokenizer
from torch import Tensor
from training_samples import QA, TEXT, a_base, a_model, a_recipe, a_stage, write_rows

from beacon_memory.errors import ConfigError, ModelError
from beacon_memory.training import SalienceRecipe
from beacon_memory.training.start import start_model, token_salience, token_starts_word

SALIENT = {"beacon_window": 8, "beacon_ratio": [2, 4], "beacon_placement": "salient"}


def of(letters: str, salience: Tensor) -> list[float]:
    return salience[tiny_tokenizer()(letters, add_special_tokens=False)["input_ids"]].tolist()  # type: ignore[no-any-return]


class TestSalience:
    def salience(self, data: Path, *sources: Any, answer_weight: float = 0) -> Tensor:
        recipe = SalienceRecipe(data=sources, answer_weight=answer_weight)
        return token_salience(tiny_tokenizer(), recipe, data, VOCAB)

    def test_it_is_the_information_of_a_token_counted_once_more_than_seen(self, data: Path) -> None:
        write_rows(data / "text.jsonl", [{"text": "aab"}, {"text": "ac"}])
        total = 5 + VOCAB
        expected = [-math.log(seen / total) for seen in (4, 2, 2, 1)]
        assert of("abcd", self.salience(data, TEXT)) == pytest.approx(expected)

    def test_contexts_of_questions_are_texts_too(self, data: Path) -> None:
        row = {"context": "aab", "question": "?", "answers": ["b"]}
        write_rows(data / "qa.jsonl", [row, {**row, "question": "??"}])
        write_rows(data / "text.jsonl", [{"text": "aab"}])
        assert torch.equal(self.salience(data, QA), self.salience(data, TEXT))

    def test_what_stands_in_answers_may_count_more(self, data: Path) -> None:
        asked = [{"question": "?", "answers": ["B", "no b"]}, {"question": "?", "answers": ["bc"]}]
        write_rows(data / "qa.jsonl", [{"context": "aaabc a", "qa": asked}])
        plain, weighted = (self.salience(data, QA, answer_weight=weight) for weight in (0, 2))
        mean = 2 / 7  # b and c, of seven
        odds = [(inside + 20 * mean) / (seen + 20) / mean for seen, inside in ((4, 0), (1, 1), (1, 1), (0, 0))]
        assert of("abcz", weighted - plain) == pytest.approx([2 * math.log(one) for one in odds], abs=1e-5)

    def test_without_an_answer_in_the_text_nothing_is_added(self, data: Path) -> None:
        write_rows(data / "qa.jsonl", [{"context": "aaa", "question": "?", "answers": ["b"]}])
        assert torch.equal(self.salience(data, QA, answer_weight=2), self.salience(data, QA))


def test_words_begin_at_spaces_and_signs() -> None:
    starts = token_starts_word(tiny_tokenizer(), VOCAB + 2)
    assert of("ze Q7.\n", starts) == [False, False, True, False, False, True, True]
    assert starts[VOCAB:].tolist() == [True, True]  # ids that the tokenizer does not have


class TestStart:
    def start(self, base: Path, data: Path, **settings: Any) -> Any:
        return start_model(a_recipe(base, **settings), data.parent, data, "cpu")

    def saved_salience(self, model: Any, folder: Path) -> Tensor:
        from safetensors.torch import load_file

        model.save_adapter(folder)
        return load_file(folder / "beacon.safetensors")["token_salience"]

    def test_salience_is_the_recipe_s_else_the_adapter_s_else_of_the_stages_data(self, data: Path) -> None:
        base, root = a_base(data.parent / "base"), data.parent
        a_model(beacon_placement="salient").save_adapter(root / "adapter")
        own = SalienceRecipe(data=(QA,))
        found = {
            "recipe": self.start(base, data, beacon=SALIENT, adapter="adapter", salience=own),
            "adapter": self.start(base, data, beacon=SALIENT, adapter="adapter"),
            "stages": self.start(base, data, beacon=SALIENT),
        }
        salience = {name: self.saved_salience(model, root / name) for name, model in found.items()}
        tokenizer = tiny_tokenizer()
        every = SalienceRecipe(data=tuple(a_stage().data))
        assert torch.equal(salience["recipe"], token_salience(tokenizer, own, data, VOCAB))
        assert torch.equal(salience["adapter"], self.saved_salience(a_model(beacon_placement="salient"), root / "it"))
        assert torch.equal(salience["stages"], token_salience(tokenizer, every, data, VOCAB))

    def test_a_chat_template_is_the_recipe_s_else_the_tokenizer_s(self, data: Path) -> None:
        base = a_base(data.parent / "base")
        assert self.start(base, data).tokenizer.chat_template == tiny_tokenizer().chat_template
        assert self.start(base, data, chat_template="{{ x }}").tokenizer.chat_template == "{{ x }}"

    def test_settings_that_the_adapter_s_beacons_do_not_fit_are_refused(self, data: Path) -> None:
        base = a_base(data.parent / "base")
        a_model().save_adapter(data.parent / "adapter")
        with pytest.raises(ModelError, match="lacks or has in excess"):
            self.start(base, data, adapter="adapter", beacon={"beacon_param": ["q", "k", "v", "o"]})
        with pytest.raises(ConfigError, match="beacon_window"):
            self.start(base, data, beacon={"beacon_window": 0})

    def test_a_base_without_tokenizer_is_refused(self, data: Path) -> None:
        base = a_base(data.parent / "base")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (base / file).unlink()
        with pytest.raises(ModelError, match="has no tokenizer"):
            self.start(base, data)
