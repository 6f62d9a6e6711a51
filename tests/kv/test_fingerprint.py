from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    FAMILIES,
    some_ids,
    some_salience,
    some_word_starts,
    tiny_base,
    tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
)

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import CorruptFileError, FingerprintMismatchError
from beacon_memory.kv.fingerprint import Fingerprint, digest_json, digest_tensors
from beacon_memory.modeling.model import BeaconModel

CONFIG = BeaconConfig(beacon_window=8, beacon_ratio=(2, 4))
SALIENT = replace(CONFIG, beacon_placement="salient")
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


def model(config: BeaconConfig = CONFIG, **how: Any) -> BeaconModel:
    return tiny_model("llama", config, **({"tokenizer": tiny_tokenizer()} | how))


def with_salience(other: bool) -> BeaconModel:
    salience = some_salience().flip(0) if other else some_salience()
    return BeaconModel(tiny_base("llama"), SALIENT, token_salience=salience, tokenizer=tiny_tokenizer())


def differing(ours: Fingerprint, theirs: Fingerprint) -> set[str]:
    return {f.name for f in fields(Fingerprint) if getattr(ours, f.name) != getattr(theirs, f.name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_same_whenever_and_in_whichever_dtype_a_model_is_loaded(family: str, tmp_path: Path) -> None:
    base, adapter = tiny_checkpoint(tmp_path / "base", tiny_base(family)), tmp_path / "adapter"
    tiny_model(family, CONFIG).save_adapter(adapter)
    loaded = [
        BeaconModel.from_pretrained(base, adapter, dtype=dtype, device="cpu").fingerprint
        for dtype in (torch.float32, torch.float32, torch.bfloat16)
    ]
    assert loaded[0] == loaded[1] == loaded[2]
    assert loaded[0].digest == loaded[2].digest


def test_use_does_not_change_it() -> None:
    used = model()
    before = used.fingerprint
    BeaconCompressor(used).compress_one(Work(some_ids(20), [2, 2, 2]))
    used.tokenizer("a b c", truncation=True, max_length=1)
    del used.fingerprint
    assert used.fingerprint == before


@pytest.mark.parametrize(
    ("ingredient", "other"),
    [
        ("base", lambda: model(seed=1)),
        ("adapter", lambda: model(trained=False)),
        ("tokenizer", lambda: model(tokenizer=tiny_tokenizer(leading_bos=False))),
        ("tokenizer", lambda: model(tokenizer=None)),
        ("rope", lambda: model(rope_parameters=YARN)),
        ("rope", lambda: model(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})),
        ("config", lambda: model(replace(CONFIG, beacon_window=16))),
        ("config", lambda: model(replace(CONFIG, beacon_attn="full-coverage"))),
        ("config", lambda: model(replace(CONFIG, beacon_sink_size=0))),
    ],
)
def test_what_differs_is_named(ingredient: str, other: Callable[[], BeaconModel]) -> None:
    ours, theirs = model().fingerprint, other().fingerprint
    assert ingredient in differing(ours, theirs)
    assert differing(ours, theirs) <= {ingredient, "adapter"}  # untrained projections are copies of the base
    with pytest.raises(FingerprintMismatchError, match=rf"'essay'.*{ingredient}"):
        ours.require(theirs, "essay")


@pytest.mark.parametrize("name", ["model.beacon_embed", "q_proj.weight"])
def test_one_changed_parameter_is_another_adapter(name: str) -> None:
    config = replace(CONFIG, beacon_embed="learned")
    ours, changed = model(config), model(config)
    parameter = next(p for key, p in changed.named_beacon_parameters() if key.startswith(name) or key.endswith(name))
    with torch.no_grad():
        parameter.view(-1)[-1] += 0.5
    assert differing(ours.fingerprint, changed.fingerprint) == {"adapter"}


def test_another_salience_is_another_adapter() -> None:
    assert differing(with_salience(False).fingerprint, with_salience(True).fingerprint) == {"adapter"}


def test_other_words_are_another_adapter() -> None:
    made = [
        BeaconModel(
            tiny_base("llama"),
            replace(CONFIG, beacon_placement="salient-words"),
            token_salience=some_salience(),
            token_starts_word=starts,
        ).fingerprint
        for starts in (some_word_starts(), ~some_word_starts())
    ]
    assert differing(*made) == {"adapter"}


def test_ratios_do_not_matter_since_any_ratio_can_be_read() -> None:
    other = replace(CONFIG, beacon_ratio=(8,), beacon_ratio_mix="sequence")
    assert model(other).fingerprint == model().fingerprint


def test_kv_of_the_same_model_are_accepted() -> None:
    model().fingerprint.require(model().fingerprint, "essay")


class TestForm:
    made = Fingerprint(base="1", adapter="2", tokenizer="3", config="4", rope="5")

    def test_it_survives_a_dict(self) -> None:
        assert Fingerprint.from_dict(self.made.to_dict()) == self.made

    @pytest.mark.parametrize("name", [f.name for f in fields(Fingerprint)])
    def test_every_ingredient_counts_in_the_digest(self, name: str) -> None:
        assert replace(self.made, **{name: "other"}).digest != self.made.digest

    @pytest.mark.parametrize("change", [{"base": None}, {"base": 1}, {"extra": "6"}, {"rope": ["5"]}])
    def test_a_dict_of_another_form_is_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(CorruptFileError, match="fingerprint"):
            Fingerprint.from_dict({**self.made.to_dict(), **change})

    def test_a_missing_ingredient_is_refused(self) -> None:
        with pytest.raises(CorruptFileError, match="fingerprint"):
            Fingerprint.from_dict({"base": "1"})


class TestDigests:
    def test_the_order_of_keys_and_tensors_does_not_matter(self) -> None:
        a, b = torch.ones(3), torch.zeros(2)
        assert digest_tensors([("a", a), ("b", b)]) == digest_tensors([("b", b), ("a", a)])
        assert digest_json({"x": 1, "y": 2}) == digest_json({"y": 2, "x": 1})

    def test_names_shapes_and_elements_do(self) -> None:
        ones = torch.ones(2, 3)
        others = [("b", ones), ("a", ones.T), ("a", ones * 2), ("a", torch.ones(6))]
        assert len({digest_tensors([one]) for one in [("a", ones), *others]}) == 5

    def test_a_sampled_digest_tells_trainings_apart(self) -> None:
        weight = torch.randn(300, 500)
        same, trained = weight.clone(), weight + 0.01 * torch.randn(300, 500)
        digests = [digest_tensors([("a", tensor)], sampled=True) for tensor in (weight, same, trained)]
        assert digests[0] == digests[1] != digests[2]
