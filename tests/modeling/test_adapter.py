from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    VOCAB,
    some_ids,
    some_probe,
    some_salience,
    some_word_starts,
    tiny_base,
    tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
    train,
)
from torch import Tensor
from transformers import PreTrainedModel

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import AdapterError, ConfigError, ModelError
from beacon_memory.lookup import Lookup
from beacon_memory.modeling.adapter import Adapter, base_name, read_adapter, write_adapter
from beacon_memory.modeling.model import BeaconModel

KINDS: dict[str, dict[str, Any]] = {
    "learned": {"beacon_embed": "learned", "beacon_attn": "full-coverage", "beacon_sink_size": 0},
    "last-token": {"beacon_embed": "last-token", "beacon_param": ("q", "k", "v", "o")},
    "salient": {"beacon_placement": "salient"},
    "salient-words": {"beacon_placement": "salient-words"},
    "without projections": {"beacon_param": ()},
}

every_kind = pytest.mark.parametrize("kind", KINDS)


def a_base(**overrides: Any) -> PreTrainedModel:
    return tiny_base("llama", attention_bias=True, **overrides)


def a_model(beacon_config: BeaconConfig, **options: Any) -> BeaconModel:
    return tiny_model("llama", beacon_config, attention_bias=True, **options)


def config(kind: str = "last-token") -> BeaconConfig:
    return BeaconConfig(beacon_window=8, beacon_ratio=(2, 4), **KINDS[kind])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "base", a_base())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of the `last-token` kind."""
    folder = tmp_path / "adapter"
    a_model(config(), tokenizer=tiny_tokenizer()).save_adapter(folder)
    return folder


def load(base: Path, adapter: Path | None = None, **options: Any) -> BeaconModel:
    return BeaconModel.from_pretrained(base, adapter, device="cpu", **options)


def edit(adapter: Path, change: dict[str, Tensor | None]) -> None:
    """Replace, add or (None) leave out tensors of an adapter."""
    tensors = load_file(adapter / "beacon.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, adapter / "beacon.safetensors")


def parameters(model: BeaconModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_beacon_parameters()}


def assert_same_model(ours: BeaconModel, theirs: BeaconModel) -> None:
    """Equal bit for bit, in what they are and in what they do."""
    assert ours.config == theirs.config
    assert parameters(ours).keys() == parameters(theirs).keys()
    for name, parameter in parameters(theirs).items():
        assert torch.equal(parameters(ours)[name], parameter), name
    document = Work(some_ids(21), [2, 4, 2])
    compressors = (BeaconCompressor(model) for model in (ours, theirs))
    kv, expected = (one.compress_one(document, compression="beacon").kv for one in compressors)
    assert torch.equal(kv.keys, expected.keys)
    assert torch.equal(kv.values, expected.values)
    assert ours.fingerprint == theirs.fingerprint


@every_kind
def test_a_saved_adapter_makes_the_same_model(kind: str, base: Path, tmp_path: Path) -> None:
    trained = a_model(config(kind), tokenizer=tiny_tokenizer())
    trained.save_adapter(tmp_path / "adapter")
    assert_same_model(load(base, tmp_path / "adapter"), trained)


@every_kind
def test_a_saved_adapter_can_be_taken_up_by_a_loaded_model(kind: str, base: Path, tmp_path: Path) -> None:
    trained = a_model(config(kind), tokenizer=tiny_tokenizer())
    trained.save_adapter(tmp_path / "adapter")
    other = a_model(config(kind), trained=False, tokenizer=tiny_tokenizer())
    before = other.fingerprint
    other.load_adapter(tmp_path / "adapter")
    assert other.fingerprint != before
    assert_same_model(other, trained)


@every_kind
def test_an_adapter_can_be_saved_over_itself(kind: str, base: Path, tmp_path: Path) -> None:
    trained = a_model(config(kind), tokenizer=tiny_tokenizer())
    trained.save_adapter(tmp_path / "adapter")
    load(base, tmp_path / "adapter").save_adapter(tmp_path / "adapter")
    assert_same_model(load(base, tmp_path / "adapter"), trained)


def test_a_lora_that_was_trained_is_saved_with_the_beacons(base: Path, tmp_path: Path) -> None:
    a_model(config(), tokenizer=tiny_tokenizer()).save_adapter(tmp_path / "first")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    load(base, tmp_path / "first").save_adapter(tmp_path / "second", lora)
    read = read_adapter(tmp_path / "second")
    assert read.lora == tmp_path / "second" / "reader"
    assert (read.lora / "adapter_config.json").read_text() == "{}"


def test_a_probe_comes_with_the_adapter_and_changes_no_fingerprint(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = load(base, adapter)
    probe = some_probe(model)
    model.save_adapter(tmp_path / "with", probe=probe)
    again = load(base, tmp_path / "with")
    assert again.probe is not None
    assert torch.equal(again.probe.weights, probe.weights)
    assert torch.equal(again.probe.bias, probe.bias)
    assert again.fingerprint == model.fingerprint
    compressor = BeaconCompressor(again, score="expected")
    assert compressor.parameters("select") == {"score": "expected", "probe": probe.digest}
    again.save_adapter(tmp_path / "kept")
    assert (tmp_path / "kept" / "probe.safetensors").read_bytes() == (
        tmp_path / "with" / "probe.safetensors"
    ).read_bytes()
    again.load_adapter(adapter)
    assert again.probe is None
    again.save_adapter(tmp_path / "kept")
    assert not (tmp_path / "kept" / "probe.safetensors").exists()


def test_a_probe_of_another_model_or_a_damaged_one_is_refused(base: Path, adapter: Path) -> None:
    wide = some_probe(a_model(config(), num_hidden_layers=4))
    save_file({"weights": wide.weights, "bias": wide.bias}, adapter / "probe.safetensors")
    with pytest.raises(AdapterError, match=r"the probe has weights of shape \[4, .*the base model needs \[3, "):
        load(base, adapter)
    save_file({"weights": wide.weights}, adapter / "probe.safetensors")
    with pytest.raises(AdapterError, match=r"cannot be read: .*bias"):
        load(base, adapter)
    (adapter / "probe.safetensors").write_bytes(b"{}")
    with pytest.raises(AdapterError, match="cannot be read"):
        load(base, adapter)


def test_lookup_heads_come_with_the_adapter_and_change_no_fingerprint(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    model = load(base, adapter)
    assert model.lookup_heads == ()
    model.save_adapter(tmp_path / "with", lookup_heads=[(2, 3), (0, 1)])
    again = load(base, tmp_path / "with")
    assert again.lookup_heads == Lookup(again).heads == ((2, 3), (0, 1))
    assert again.fingerprint == model.fingerprint
    again.save_adapter(tmp_path / "kept")
    assert load(base, tmp_path / "kept").lookup_heads == ((2, 3), (0, 1))


@pytest.mark.parametrize(
    ("heads", "told"),
    [([[3, 0]], "3 layers of 4 heads"), ([[0, 4]], "3 layers of 4 heads"), ([[0]], "cannot be read"), (7, "cannot be")],
)
def test_lookup_heads_that_the_base_has_not_are_refused(base: Path, adapter: Path, heads: object, told: str) -> None:
    settings = json.loads((adapter / "beacon.json").read_text(encoding="utf-8"))
    (adapter / "beacon.json").write_text(json.dumps({**settings, "lookup_heads": heads}), encoding="utf-8")
    with pytest.raises(AdapterError, match=told):
        load(base, adapter)


def test_saving_what_was_loaded_gives_the_same_files(base: Path, adapter: Path, tmp_path: Path) -> None:
    load(base, adapter).save_adapter(tmp_path / "again")
    assert (tmp_path / "again" / "beacon.safetensors").read_bytes() == (adapter / "beacon.safetensors").read_bytes()
    settings, again = (json.loads((folder / "beacon.json").read_text()) for folder in (adapter, tmp_path / "again"))
    assert again["base"]["digest"] == settings["base"]["digest"]
    assert {**again, "base": None} == {**settings, "base": None}


def test_an_adapter_keeps_its_parameters_whatever_dtype_it_is_used_in(base: Path, adapter: Path) -> None:
    loaded = load(base, adapter, dtype=torch.bfloat16)
    for name, tensor in read_adapter(adapter).tensors.items():
        assert torch.equal(parameters(loaded)[name], tensor.to(torch.bfloat16)), name


def test_an_adapter_brings_the_chat_template_it_was_trained_with(base: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    a_model(config(), tokenizer=tokenizer).save_adapter(tmp_path / "adapter")
    assert load(base, tmp_path / "adapter").tokenizer.chat_template == tokenizer.chat_template
    assert load(base).tokenizer.chat_template != tokenizer.chat_template


def test_an_adapter_goes_before_beacons_in_the_checkpoint(base: Path, adapter: Path) -> None:
    stated = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(stated | config("learned").to_dict()))
    assert load(base).config == config("learned")
    assert load(base, adapter).config == config()


def test_a_checkpoint_with_settings_and_some_parameters_takes_the_rest_from_the_base(base: Path) -> None:
    settings = config("learned").to_dict() | {"beacon_param": ["q", "k"]}
    stated = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(stated | settings))
    weights = load_file(base / "model.safetensors")
    names = [f"model.layers.{i}.self_attn.beacon_q_proj.{kind}" for i in range(3) for kind in ("weight", "bias")]
    own = {name: torch.ones_like(weights[name.replace("beacon_", "")]) for name in names}
    save_file(weights | own, base / "model.safetensors", metadata={"format": "pt"})
    loaded = parameters(load(base))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in own.items())
    for kind in ("weight", "bias"):
        copied = loaded[f"model.layers.1.self_attn.beacon_k_proj.{kind}"]
        assert torch.equal(copied, weights[f"model.layers.1.self_attn.k_proj.{kind}"])
    assert torch.equal(loaded["model.beacon_embed_tokens.weight"].flatten(), weights["model.embed_tokens.weight"][2])


def test_an_adapter_of_another_base_is_used_with_a_warning(adapter: Path, tmp_path: Path) -> None:
    a_base(seed=9).save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="weights differ"):
        load(tmp_path / "other", adapter)


def test_an_adapter_of_this_base_is_used_without_one(base: Path, adapter: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(base, adapter, dtype=torch.bfloat16)


class TestMisfits:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"model.layers.1.self_attn.beacon_k_proj.weight": None}, "model.layers.1.self_attn.beacon_k_proj.weight"),
            ({"model.layers.3.self_attn.beacon_k_proj.weight": torch.ones(2)}, "model.layers.3"),
            ({"beacon_embed_offset": None}, "beacon_embed_offset"),
            ({"beacon_embed_offset": torch.ones(33)}, r"beacon_embed_offset.*\(33,\).*\(32,\)"),
            ({"model.layers.0.self_attn.beacon_q_proj.weight": torch.ones(32, 16)}, r"q_proj.*\(32, 16\).*\(32, 32\)"),
            ({"token_salience": torch.ones(7)}, rf"token_salience.*7.*{VOCAB}"),
            ({"token_starts_word": torch.ones(7, dtype=torch.bool)}, rf"token_starts_word.*7.*{VOCAB}"),
        ],
    )
    def test_parameters_that_do_not_fit_are_named(
        self, base: Path, adapter: Path, change: dict[str, Tensor | None], named: str
    ) -> None:
        edit(adapter, change)
        with pytest.raises(AdapterError, match=named):
            load(base, adapter)

    def test_an_adapter_of_a_larger_base_is_refused(self, adapter: Path, tmp_path: Path) -> None:
        a_base(hidden_size=64).save_pretrained(tmp_path / "larger")
        with pytest.warns(UserWarning, match="weights differ"), pytest.raises(AdapterError, match="shape"):
            load(tmp_path / "larger", adapter)

    def test_a_loaded_model_takes_no_adapter_of_other_settings(self, adapter: Path) -> None:
        model = a_model(config("learned"))
        before = {name: parameter.clone() for name, parameter in parameters(model).items()}
        with pytest.raises(AdapterError, match="other settings"):
            model.load_adapter(adapter)
        assert all(torch.equal(parameters(model)[name], parameter) for name, parameter in before.items())

    def test_a_misfit_leaves_a_loaded_model_as_it_was(self, tmp_path: Path) -> None:
        model = a_model(config("salient"))
        before = {name: parameter.clone() for name, parameter in parameters(model).items()}
        train(a_model(config("salient")), seed=5).save_adapter(tmp_path)
        edit(tmp_path, {"beacon_embed_offset": torch.ones(3), "token_salience": some_salience().flip(0)})
        with pytest.raises(AdapterError):
            model.load_adapter(tmp_path)
        assert all(torch.equal(parameters(model)[name], parameter) for name, parameter in before.items())
        assert model.salience(range(VOCAB)) == some_salience().tolist()

    @pytest.mark.parametrize("name", ["token_salience", "token_starts_word"])
    def test_a_loaded_model_takes_no_salience_of_another_size(self, name: str, tmp_path: Path) -> None:
        model = a_model(config("salient-words"))
        model.save_adapter(tmp_path)
        edit(tmp_path, {name: torch.ones(7)})
        with pytest.raises(AdapterError, match=name):
            model.load_adapter(tmp_path)

    def test_a_loaded_model_needs_what_its_placement_needs(self, tmp_path: Path) -> None:
        model = a_model(config("salient-words"))
        model.save_adapter(tmp_path)
        edit(tmp_path, {"token_starts_word": None})
        with pytest.raises(ConfigError, match="token_starts_word"):
            model.load_adapter(tmp_path)


class TestDamage:
    def test_a_folder_without_adapter_is_refused(self, base: Path) -> None:
        with pytest.raises(AdapterError, match=r"lacks beacon\.json"):
            load(base, base)

    @pytest.mark.parametrize(
        ("file", "named"), [("beacon.json", r"beacon\.json"), ("beacon.safetensors", r"beacon\.safetensors")]
    )
    def test_a_missing_file_is_named(self, base: Path, adapter: Path, file: str, named: str) -> None:
        (adapter / file).unlink()
        with pytest.raises(AdapterError, match=named):
            load(base, adapter)

    @pytest.mark.parametrize("file", ["beacon.json", "beacon.safetensors"])
    @pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff" * 40])
    def test_a_damaged_file_is_refused(self, base: Path, adapter: Path, file: str, content: bytes) -> None:
        (adapter / file).write_bytes(content)
        with pytest.raises(AdapterError):
            load(base, adapter)

    def test_settings_out_of_range_are_named(self, base: Path, adapter: Path) -> None:
        settings = json.loads((adapter / "beacon.json").read_text())
        (adapter / "beacon.json").write_text(json.dumps(settings | {"beacon_window": -8}))
        with pytest.raises(AdapterError, match="beacon_window=-8"):
            load(base, adapter)

    def test_an_unknown_name_is_refused(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for name in ("no-one/no-adapter", "not a name/at/all"):
            with pytest.raises(AdapterError, match=name):
                load(base, name)  # type: ignore[arg-type]

    def test_all_errors_are_model_errors(self) -> None:
        assert issubclass(AdapterError, ModelError)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tensors = {"beacon_embed_offset": torch.randn(32).to(torch.bfloat16)}
    settings, base = config("salient-words"), {"name": "n", "digest": "d"}
    adapter = Adapter(settings, tensors, some_salience(), some_word_starts(), chat_template="{{ x }}", base=base)
    write_adapter(tmp_path, adapter)
    read = read_adapter(tmp_path)
    assert (read.config, read.chat_template, read.base) == (settings, "{{ x }}", base)
    assert torch.equal(read.tensors["beacon_embed_offset"], tensors["beacon_embed_offset"])
    assert read.token_salience is not None
    assert read.token_starts_word is not None
    assert torch.equal(read.token_salience, some_salience())
    assert torch.equal(read.token_starts_word, some_word_starts())
    assert read.lora is None


def test_a_saved_adapter_names_a_base_in_a_folder_without_its_path(base: Path, tmp_path: Path) -> None:
    load(base).save_adapter(tmp_path)
    assert read_adapter(tmp_path).base["name"] == base.name
    assert base_name("owner/model") == "owner/model"


def test_a_base_that_is_only_named_is_taken_by_its_name(base: Path, tmp_path: Path) -> None:
    a_model(config("last-token")).save_adapter(tmp_path)
    settings = json.loads((tmp_path / "beacon.json").read_text())
    (tmp_path / "beacon.json").write_text(json.dumps(settings | {"base": "some model"}))
    assert read_adapter(tmp_path).base == {"name": "some model"}
    load(base, tmp_path)
