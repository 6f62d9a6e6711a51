from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_gguf import tiny_gguf
from tiny_models import (
    FAMILIES,
    VOCAB,
    keeps_control_tokens_text,
    some_ids,
    tiny_base,
    tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from beacon_memory import BeaconMemory
from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.config import BeaconConfig
from beacon_memory.errors import AdapterError, ConfigError, ModelError, UnsupportedModelError
from beacon_memory.modeling import loading
from beacon_memory.modeling.adapter import read_adapter
from beacon_memory.modeling.loading import tokenizer_digest
from beacon_memory.modeling.lora import merge_lora
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.text_tokens import text_tokens

CONFIG = BeaconConfig(beacon_window=8, beacon_ratio=(2, 4))
REMOTE_CODE = """from pathlib import Path
Path(__file__).with_name("executed").touch()
raise RuntimeError("remote code was executed")
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "base", tiny_base("llama"))


def load(base: Path, adapter: Path | None = None, **options: Any) -> BeaconModel:
    return BeaconModel.from_pretrained(base, adapter, device="cpu", **options)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestBase:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_checkpoint_without_beacons_starts_untrained(self, family: str, tmp_path: Path) -> None:
        stock = tiny_base(family)
        stock.save_pretrained(tmp_path)
        model = load(tmp_path, config=CONFIG)
        ids = torch.tensor([some_ids(12)])
        assert model.config == CONFIG
        assert not model.training
        assert torch.equal(model.base(ids).logits, stock(ids).logits)
        assert not model.beacon_embed.any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_it_is_loaded_in_its_own_dtype_or_the_one_asked_for(
        self, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loading, "_multiplies_in", lambda _: True)
        tiny_base("llama").to(dtype).save_pretrained(tmp_path)
        assert (load(tmp_path).dtype, load(tmp_path).kv_dtype) == (dtype, dtype)
        asked = load(tmp_path, dtype=torch.float64)
        assert (asked.dtype, asked.kv_dtype) == (torch.float64, torch.float64)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_processor_that_is_slow_in_16_bits_computes_in_float32_and_keeps_kv_as_the_checkpoint_is(
        self, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loading, "_multiplies_in", lambda _: False)
        tiny_base("llama").to(dtype).save_pretrained(tmp_path)
        model = load(tmp_path)
        assert (model.dtype, model.kv_dtype) == (torch.float32, dtype)
        asked = load(tmp_path, dtype=dtype)
        assert (asked.dtype, asked.kv_dtype) == (dtype, dtype)
        assert model.fingerprint == asked.fingerprint

        monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        assert load(tmp_path).dtype == dtype  # twice the memory is not there

    def test_it_needs_no_tokenizer(self, tmp_path: Path) -> None:
        tiny_base("llama").save_pretrained(tmp_path)
        kv = BeaconCompressor(load(tmp_path, config=CONFIG)).compress_one(Work(some_ids(8), [2])).kv
        assert kv.slots == 4

    def test_a_missing_parameter_is_named(self, base: Path) -> None:
        weights = load_file(base / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            load(base)

    def test_a_parameter_of_another_shape_is_refused(self, base: Path) -> None:
        weights = load_file(base / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=str(base)):
            load(base)

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
    @pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff" * 9], ids=str)
    def test_a_missing_or_damaged_file_is_refused(self, base: Path, file: str, content: bytes | None) -> None:
        (base / file).unlink()
        if content is not None:
            (base / file).write_bytes(content)
        with pytest.raises(ModelError, match=str(base)):
            load(base)

    def test_an_unknown_name_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for name in ("no-one/no-model", "not a name/at/all"):
            with pytest.raises(ModelError, match=name):
                BeaconModel.from_pretrained(name)

    def test_loading_leaves_the_level_of_messages_as_it_was(self, base: Path) -> None:
        before = logging.get_verbosity()
        load(base)
        assert logging.get_verbosity() == before

    @pytest.mark.parametrize("attention", ["flash_attention_2", "kernels-community/flash-attn", "flex_attention"])
    def test_the_attention_that_a_checkpoint_asks_for_does_not_matter(self, base: Path, attention: str) -> None:
        expected = load(base)
        edit_json(base / "config.json", attn_implementation=attention)
        ids = torch.tensor([some_ids(12)])
        assert torch.equal(load(base).base(ids).logits, expected.base(ids).logits)
        assert load(base).detach().config._attn_implementation == "sdpa"

    @pytest.mark.parametrize(
        "quantization",
        [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"load_in_8bit": True}, {"quant_method": "new"}],
    )
    def test_quantized_weights_are_refused_before_they_are_read(self, base: Path, quantization: dict[str, Any]) -> None:
        edit_json(base / "config.json", quantization_config=quantization)
        (base / "model.safetensors").unlink()
        with pytest.raises(UnsupportedModelError, match=r"are quantized .* or a GGUF file"):
            load(base)

    @pytest.mark.parametrize("device", ["meta", "nowhere", "privateuseone", "cuda:99", "vulkan", "hpu", "cpu:x"])
    def test_a_device_that_cannot_be_computed_on_is_refused_before_anything_is_read(self, device: str) -> None:
        with pytest.raises(ModelError, match=f"device '{device}' cannot be used"):
            BeaconModel.from_pretrained("absent", device=device)

    @pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "half", torch.int8, torch.complex64, None, 5])
    def test_a_dtype_that_cannot_be_computed_in_is_refused(self, dtype: Any) -> None:
        with pytest.raises(ConfigError, match=r"dtype=.* must be auto, bfloat16, float16, float32 or float64"):
            BeaconModel.from_pretrained("absent", dtype=dtype)

    def test_a_tokenizer_that_does_not_say_where_tokens_stand_is_refused(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
        with pytest.raises(ModelError, match=r"does not say where in a text its tokens stand.* tokenizer\.json"):
            load(base)


class TestGguf:
    @pytest.fixture
    def stock(self) -> PreTrainedModel:
        return tiny_base("llama", vocab_size=VOCAB + 1)

    @pytest.fixture
    def file(self, stock: PreTrainedModel, tmp_path: Path) -> Path:
        return tiny_gguf(tmp_path / "tiny.gguf", stock)

    def test_it_is_loaded_with_its_tokenizer_and_chat_template(self, file: Path, stock: PreTrainedModel) -> None:
        model, ids = load(file, dtype=torch.float32), torch.tensor([some_ids(12)])
        assert torch.equal(model.base(ids).logits, stock(ids).logits)
        assert model.tokenizer.chat_template == tiny_tokenizer().chat_template
        assert text_tokens(model.tokenizer, "the mill") == text_tokens(tiny_tokenizer(), "the mill")
        assert model.base.config.name_or_path == str(file)

    @keeps_control_tokens_text
    def test_a_control_token_that_the_model_lacks_does_no_harm(self, file: Path) -> None:
        text = "It is <|endoftext|> of token 263, which the model lacks."
        memory = BeaconMemory(file.parent / "store", load(file, dtype=torch.float32), reserve=100)
        memory.add("text", text, ratio=2)
        assert memory.ask(text, "text", max_new_tokens=3).usage.generated_tokens == 3

    def test_its_kv_take_16_bits(self, file: Path) -> None:
        assert load(file).kv_dtype == torch.bfloat16

    def test_an_adapter_for_it_does_not_tell_where_it_lies(self, file: Path, tmp_path: Path) -> None:
        load(file).save_adapter(tmp_path)
        assert read_adapter(tmp_path).base["name"] == "tiny.gguf"

    @pytest.mark.parametrize("content", [None, b"", b"GGUF", b"GGUF" + bytes(100)])
    def test_one_that_is_missing_or_damaged_is_refused(self, tmp_path: Path, content: bytes | None) -> None:
        if content is not None:
            (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(ModelError, match=r"bad\.gguf' cannot be loaded"):
            load(tmp_path / "bad.gguf")

    def test_one_that_is_cut_off_is_refused(self, file: Path, tmp_path: Path) -> None:
        (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-5000])
        with pytest.raises(ModelError, match=r"cut\.gguf' cannot be loaded"):
            load(tmp_path / "cut.gguf")


class TestRemoteCode:
    def offer(self, base: Path, **config: str) -> Path:
        """Give a checkpoint code of its own; returns what it leaves behind if it is executed."""
        automatic = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
        edit_json(base / "config.json", auto_map=automatic, **config)
        edit_json(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["custom.Tokenizer", "custom.Tokenizer"]})
        (base / "custom.py").write_text(REMOTE_CODE)
        return base / "executed"

    def test_a_known_architecture_is_loaded_by_the_library(self, base: Path) -> None:
        executed = self.offer(base)
        ids = torch.tensor([some_ids(12)])
        assert torch.equal(load(base).base(ids).logits, tiny_base("llama")(ids).logits)
        assert not executed.exists()

    @pytest.mark.parametrize("architecture", ["beacon_llama", "phi3"])
    def test_an_unknown_one_is_refused_without_a_question(
        self, base: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        executed = self.offer(base, model_type=architecture)
        with pytest.raises((ModelError, UnsupportedModelError)):
            load(base)
        assert not executed.exists()


class TestTokenizerDigest:
    def test_it_is_that_of_the_saved_tokenizer(self, base: Path) -> None:
        assert tokenizer_digest(load(base).tokenizer) == tokenizer_digest(tiny_tokenizer())

    @pytest.mark.parametrize(
        "use", [lambda t: t("a b", truncation=True, max_length=1), lambda t: t(["a", "b c"], padding=True)]
    )
    def test_use_does_not_change_it(self, use: Callable[[Any], Any]) -> None:
        tokenizer = tiny_tokenizer()
        use(tokenizer)
        assert tokenizer_digest(tokenizer) == tokenizer_digest(tiny_tokenizer())

    def test_another_vocabulary_or_leading_token_changes_it(self) -> None:
        larger = tiny_tokenizer()
        larger.add_tokens(["<new>"])
        digests = {tokenizer_digest(one) for one in (tiny_tokenizer(), larger, tiny_tokenizer(leading_bos=False), None)}
        assert len(digests) == 4


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft's, when the test makes a LoRA
class TestReader:
    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        folder = tmp_path / "adapter"
        tiny_model("llama", CONFIG, tokenizer=tiny_tokenizer()).save_adapter(folder)
        return folder

    @pytest.fixture(autouse=True)
    def lora(self, adapter: Path) -> Tensor:
        """Give the adapter a LoRA; returns PEFT's own logits with it merged in."""
        targets = ["q_proj", "k_proj", "v_proj"]
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
        torch.manual_seed(0)
        reading = get_peft_model(tiny_base("llama"), lora)
        reading.save_pretrained(str(adapter / "reader"))
        with torch.no_grad():
            logits: Tensor = reading.merge_and_unload()(torch.tensor([some_ids(20)])).logits
        return logits

    def test_it_is_merged_as_peft_merges_it(self, base: Path, adapter: Path, lora: Tensor) -> None:
        loaded = load(base, adapter)
        with torch.no_grad():
            assert torch.equal(loaded.base(torch.tensor([some_ids(20)])).logits, lora)
            plain = load(base).base(torch.tensor([some_ids(20)])).logits
        assert float((plain - lora).abs().max()) > 0.1
        assert not [name for name, _ in loaded.named_parameters() if "lora" in name]

    @pytest.mark.parametrize(
        ("dtype", "settings"),
        [
            (torch.float32, {}),
            (torch.bfloat16, {}),
            (torch.bfloat16, {"target_modules": ["q_proj", "down_proj", "up_proj"], "r": 3, "lora_alpha": 5}),
            (torch.float32, {"use_rslora": True}),
            (torch.float32, {"use_dora": True}),
            (torch.float32, {"rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
            (torch.float32, {"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}),
            (torch.float32, {"layers_to_transform": [1]}),
            (torch.float32, {"target_modules": r".*\.1\..*(q|up)_proj"}),
        ],
        ids=str,
    )
    def test_it_is_merged_as_peft_merges_it_bit_by_bit(
        self, tmp_path: Path, dtype: torch.dtype, settings: dict[str, Any]
    ) -> None:
        shape: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"], **settings}
        torch.manual_seed(0)
        reading = get_peft_model(tiny_base("llama").to(dtype), LoraConfig(init_lora_weights=False, **shape))
        reading.save_pretrained(str(tmp_path))
        edit_json(tmp_path / "adapter_config.json", init_lora_weights=True)  # as training writes it
        theirs = PeftModel.from_pretrained(tiny_base("llama").to(dtype), str(tmp_path)).merge_and_unload()
        ours = dict(merge_lora(tiny_base("llama").to(dtype), tmp_path).named_parameters())
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.named_parameters())
        base = dict(tiny_base("llama").to(dtype).named_parameters())
        assert not all(torch.equal(ours[name], base[name]) for name in base)

    def test_a_plain_one_needs_no_peft(self, base: Path, adapter: Path, lora: Tensor) -> None:
        edit_json(adapter / "reader" / "adapter_config.json", init_lora_weights=True)
        program = """
            import sys, torch
            from beacon_memory import BeaconModel
            loaded = BeaconModel.from_pretrained(sys.argv[1], sys.argv[2]).base
            assert "peft" not in sys.modules
            torch.save(loaded(torch.tensor([eval(sys.argv[3])])).logits, sys.argv[4])
        """
        arguments = [str(base), str(adapter), str(some_ids(20)), str(adapter / "logits")]
        subprocess.run([sys.executable, "-c", dedent(program), *arguments], check=True)
        assert torch.equal(torch.load(adapter / "logits"), lora)

    def test_it_leaves_the_beacons_own_projections_alone(self, base: Path, adapter: Path) -> None:
        stored = read_adapter(adapter).tensors
        loaded = dict(load(base, adapter).named_beacon_parameters())
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name], stored[name]) for name in stored)

    def test_it_belongs_to_the_fingerprint(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        with_lora = load(base, adapter).fingerprint
        (adapter / "reader").rename(tmp_path / "elsewhere")
        without = load(base, adapter).fingerprint
        assert with_lora.adapter != without.adapter
        assert with_lora.base == without.base

    def test_it_is_saved_with_the_adapter(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        trained = load(base, adapter)
        trained.save_adapter(tmp_path / "again")
        again = load(base, tmp_path / "again")
        assert again.fingerprint == trained.fingerprint
        ids = torch.tensor([some_ids(20)])
        assert torch.equal(again.base(ids).logits, trained.base(ids).logits)

    def test_it_stays_where_an_adapter_is_saved_over_itself(
        self, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        trained = load(base, Path("adapter"))
        trained.save_adapter(adapter)
        assert load(base, adapter).fingerprint == trained.fingerprint

    def test_one_of_an_earlier_adapter_does_not_stay_behind(self, base: Path, adapter: Path) -> None:
        plain = tiny_model("llama", CONFIG, tokenizer=tiny_tokenizer())
        plain.save_adapter(adapter)
        assert load(base, adapter).fingerprint == plain.fingerprint

    def test_one_that_does_not_fit_is_refused(self, base: Path, adapter: Path) -> None:
        tensors = load_file(adapter / "reader" / "adapter_model.safetensors")
        wider = {name: torch.ones(tensor.shape[0], tensor.shape[1] + 1) for name, tensor in tensors.items()}
        save_file(wider, adapter / "reader" / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match="LoRA"):
            load(base, adapter)

    def test_one_of_an_unknown_kind_is_refused(self, base: Path, adapter: Path) -> None:
        edit_json(adapter / "reader" / "adapter_config.json", target_modules=5)
        with pytest.raises(AdapterError, match="LoRA"):
            load(base, adapter)

    @pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
    @pytest.mark.parametrize("content", [None, b"", b"{"], ids=str)
    def test_one_with_a_missing_or_damaged_file_is_refused(
        self, base: Path, adapter: Path, file: str, content: bytes | None
    ) -> None:
        (adapter / "reader" / file).unlink()
        if content is not None:
            (adapter / "reader" / file).write_bytes(content)
        with pytest.raises(AdapterError, match="LoRA"):
            load(base, adapter)
