"""A base that carried beacons, or was to carry them, can be had back as a stock model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import MODELS, some_ids, tiny_base, tiny_checkpoint, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import AdapterError, ModelError
from beacon_memory.generation.generate import Request, generate
from beacon_memory.generation.options import generation_config
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window
from beacon_memory.modeling.model import BeaconModel

HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name)
OF_KVPRESS = {"masked_key_indices"}  # which it sets on each module that attends, once anything has imported it

every_model = pytest.mark.parametrize("name", MODELS)
every_param = pytest.mark.parametrize("param", ["", "v", "qk", "qkvo"])


def config(param: str = "qkv") -> BeaconConfig:
    return BeaconConfig(beacon_window=8, beacon_ratio=(2, 4), beacon_param=tuple(param))


def shape(base: PreTrainedModel) -> dict[str, Any]:
    """The modules of a model, their attributes and hooks, and what decides how it attends and trains."""
    modules = {
        name: (type(module), vars(module).keys() - OF_KVPRESS, {hooks: dict(getattr(module, hooks)) for hooks in HOOKS})
        for name, module in base.named_modules()
    }
    trained = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    return {"modules": modules, "trained": trained, "config": base.config.to_dict(), "attends": attends(base)}


def attends(base: PreTrainedModel) -> str:
    implementation: str = base.config._attn_implementation
    return implementation


def logits(base: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        output: Tensor = base(torch.tensor([some_ids(20)])).logits
    return output


def require_stock(base: PreTrainedModel, stock: PreTrainedModel) -> None:
    assert shape(base) == shape(stock)
    weights, stock_weights = base.state_dict(), stock.state_dict()
    assert list(weights) == list(stock_weights)
    assert all(torch.equal(weights[name], stock_weights[name]) for name in weights)
    assert torch.equal(logits(base), logits(stock))


def stock(name: str, attention: str = "sdpa") -> PreTrainedModel:
    family, overrides = MODELS[name]
    base = tiny_base(family, **overrides)
    base.set_attn_implementation(attention)
    return base


def used(base: PreTrainedModel, settings: BeaconConfig) -> BeaconModel:
    """A model that has read a text and answered behind its memory."""
    model = BeaconModel(base, settings, tokenizer=tiny_tokenizer()).eval()
    compressed = BeaconCompressor(model).compress_one(Work(some_ids(11), [2, 4]), compression="beacon")
    generate(model, [Request(compressed.kv, some_ids(3))], generation_config(model, None, {"max_new_tokens": 2}))
    return model


class TestDetach:
    @every_model
    @every_param
    def test_the_base_is_the_stock_model_again(self, name: str, param: str) -> None:
        base = stock(name)
        model = used(base, config(param))
        assert shape(base) != shape(stock(name))
        assert model.detach() is model.base is base
        require_stock(base, stock(name))

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_it_attends_as_it_did_before(self, attention: str) -> None:
        base = stock("llama", attention)
        used(base, config()).detach()
        assert attends(base) == attention
        require_stock(base, stock("llama", attention))

    def test_what_was_frozen_stays_so_and_the_rest_can_be_trained_again(self) -> None:
        base, untouched = stock("qwen2"), stock("qwen2")
        for one in (base, untouched):
            one.model.layers[0].requires_grad_(False)
        used(base, config()).detach()
        require_stock(base, untouched)

    def test_hooks_of_others_stay(self) -> None:
        base = stock("llama")
        calls: list[int] = []
        base.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(0))
        base.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
        model = used(base, config())
        model.detach()
        calls.clear()
        logits(base)
        assert calls == [0, 1]

    def test_twice_is_as_good_as_once(self) -> None:
        base = stock("llama")
        model = used(base, config())
        model.detach()
        model.detach()
        require_stock(base, stock("llama"))

    def test_the_base_can_carry_beacons_anew(self) -> None:
        base = stock("llama")
        used(base, config()).detach()
        again = used(base, config("qkvo"))
        assert again.fingerprint == used(stock("llama"), config("qkvo")).fingerprint
        again.detach()
        require_stock(base, stock("llama"))

    def test_a_loaded_model_gives_back_what_transformers_loads(self, tmp_path: Path) -> None:
        folder = tiny_checkpoint(tmp_path, stock("qwen3"))
        base = BeaconModel.from_pretrained(folder, config=config()).detach()
        require_stock(base, type(base).from_pretrained(folder))

    def test_a_lora_stays_merged(self, tmp_path: Path) -> None:
        merged = get_peft_model(stock("llama"), lora_config())
        merged.save_pretrained(str(tmp_path))
        base = stock("llama")
        BeaconModel(base, config(), lora=tmp_path).detach()
        merged = merged.merge_and_unload()
        merged.requires_grad_(True)
        require_stock(base, merged)
        assert not torch.equal(logits(base), logits(stock("llama")))


class TestAfterDetach:
    @pytest.fixture
    def model(self) -> BeaconModel:
        model = used(stock("llama"), config())
        _ = model.fingerprint
        model.detach()
        return model

    def test_nothing_is_read_or_compressed(self, model: BeaconModel) -> None:
        with pytest.raises(ModelError, match=r"detached from its base.*from_pretrained"):
            model(torch.tensor([some_ids(20)]))
        with pytest.raises(ModelError, match="detached"):
            BeaconCompressor(model).compress_one(Work(some_ids(11), [2, 4]), compression="beacon")
        layout = BeaconLayout.build([Piece(Cursor(), [Window.behind(0, some_ids(3))])], model.config)
        with pytest.raises(ModelError, match="detached"):
            model.run(layout, model.empty_kv(), [])

    def test_no_memory_is_left_out_in_silence(self, model: BeaconModel) -> None:
        memory = MemoryKV.of(model.empty_kv())
        with pytest.raises(ModelError, match="detached"):
            generate(model, [Request(memory, some_ids(3))], generation_config(model, None, {"max_new_tokens": 2}))

    def test_no_beacons_are_saved_loaded_or_known(self, model: BeaconModel, tmp_path: Path) -> None:
        used(stock("llama"), config()).save_adapter(tmp_path / "other")
        with pytest.raises(ModelError, match="detached"):
            model.load_adapter(tmp_path / "other")
        with pytest.raises(ModelError, match="detached"):
            model.save_adapter(tmp_path / "own")
        with pytest.raises(ModelError, match="detached"):
            _ = model.fingerprint


class _UncopiableLinear(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        raise MemoryError("no room for a copy")


def lora_config(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)


class TestFailedConstruction:
    @every_param
    def test_a_projection_that_cannot_be_copied_leaves_the_base_as_it_was(self, param: str) -> None:
        base, untouched = stock("llama"), stock("llama")
        for one in (base, untouched):
            one.model.layers[1].self_attn.v_proj.__class__ = _UncopiableLinear
        if "v" not in param:
            BeaconModel(base, config(param)).detach()
        else:
            with pytest.raises(MemoryError, match="no room"):
                BeaconModel(base, config(param))
        require_stock(base, untouched)

    def test_a_lora_that_does_not_fit_leaves_the_base_as_it_was(self, tmp_path: Path) -> None:
        get_peft_model(tiny_base("llama", hidden_size=64), lora_config()).save_pretrained(str(tmp_path))
        base = stock("llama")
        with pytest.raises(AdapterError, match="does not fit the base model"):
            BeaconModel(base, config(), lora=tmp_path)
        require_stock(base, stock("llama"))


def test_a_copy_is_detached_alone() -> None:
    model = tiny_model("llama", config(), tokenizer=tiny_tokenizer())
    before = shape(model.base)["attends"], model.fingerprint, logits(model.base)
    other = copy.deepcopy(model)
    other.detach()
    require_stock(other.base, stock("llama"))
    assert (attends(model.base), model.fingerprint) == before[:2]
    assert torch.equal(logits(model.base), before[2])
    BeaconCompressor(model).compress_one(Work(some_ids(11), [2, 4]), compression="beacon")
