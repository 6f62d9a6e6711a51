"""The embedded default model, for real: converted, loaded, asked. These are the slow tests."""

from __future__ import annotations

import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from statistics import fmean

import pytest
import torch
from repository import CHAPTER, ROOT

from beacon_memory import BeaconMemory, BeaconModel
from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.generation.decode_loop import DecodeLoop
from beacon_memory.generation.generate import Request, generate
from beacon_memory.generation.options import generation_config
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.cache import MemoryCache
from beacon_memory.modeling.default_model import default_adapter, ensure_default_model

HARBOUR = (
    "The harbour of the island lies to the north, behind a wall of grey stone. The lighthouse keeper, whose name is "
    "Josiah Tavershaw, has lived there for thirty years, with two goats and a barometer that nobody else may touch. "
    "Every morning at seven he walks down to the pier to wait for the ferry. The ferry is called the Ombrelline; she "
    "carries the post, flour and paraffin, and in summer a few visitors who come to see the birds. When the fog is "
    "thick, the keeper rings a bell until she has made fast, and then the crew has coffee in his kitchen."
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    return BeaconModel.from_pretrained()


def test_what_is_converted_is_whole(model: BeaconModel) -> None:
    assert sum(weights.numel() for weights in model.base.parameters()) > 134_000_000
    assert {path.name for path in ensure_default_model().iterdir()} >= {"model.safetensors", "tokenizer.json"}


def test_default_adapter_was_made_for_the_default_model(model: BeaconModel, recwarn: pytest.WarningsRecorder) -> None:
    BeaconModel.from_pretrained()
    assert not [w for w in recwarn if "adapter was trained on" in str(w.message)]
    assert model.adapter == str(default_adapter())
    assert (model.config.beacon_attn, model.config.beacon_placement) == ("hidden", "salient-words")


def test_uncompressed_memory_gives_the_answer_of_the_full_text(model: BeaconModel, tmp_path: Path) -> None:
    """The whole path on the real model: windows, file, prefix and template do what a plain prompt does."""
    memory = BeaconMemory(tmp_path, model)
    memory.add("chapter", CHAPTER, ratio=0)
    config = generation_config(model, None, {"max_new_tokens": 24})
    for question, expected in (
        ("What is the name of the inn?", "Benbow"),
        ("Who told the captain that rum would kill him?", "Livesey"),
    ):
        ids = memory.compressor.tokenize(CHAPTER).ids
        prompt = [*model.sink_ids, *ids, *chat_prompt(model, question, behind_memory=True)]
        ((full,),) = generate(model, [Request(MemoryKV.of(model.empty_kv()), prompt)], config)
        assert expected in full.text
        assert expected in memory.ask(question, "chapter", budget="x1", max_new_tokens=24).text


def test_beacons_keep_more_of_the_text_the_more_there_are(model: BeaconModel) -> None:
    """Loss of a passage behind the compressed text in front of it: between full text and no text, by ratio."""
    compressor = BeaconCompressor(model)
    ids = compressor.tokenize(CHAPTER).ids[:1280]
    text, passage = ids[:1024], ids[1024:]
    none = passage_loss(model, compressor, [], passage, 0)
    losses = [passage_loss(model, compressor, text, passage, ratio) for ratio in (0, 8, 32)]
    assert losses == sorted(losses)
    assert losses[-1] < none - 0.5 * (none - losses[0])


@torch.inference_mode()
def passage_loss(
    model: BeaconModel, compressor: BeaconCompressor, text: list[int], passage: list[int], ratio: int
) -> float:
    memory = MemoryKV.of(compressor.sink)
    if text:
        ratios = compressor.ratios(len(text), ratio)
        memory = MemoryKV.concat([memory, compressor.compress_one(Work(text, ratios), compression="beacon").kv])
    tokens = torch.tensor([passage])
    output = model.base(tokens, past_key_values=MemoryCache([model.prefix(memory)]))
    return float(torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), tokens[0, 1:]))


def test_beacon_answers_of_the_default_model_rest_on_the_document(model: BeaconModel, tmp_path: Path) -> None:
    memory = BeaconMemory(tmp_path, model)
    memory.add("chapter", CHAPTER, ratio=2, compression="beacon")
    question = "Who told the captain that rum would kill him?"
    assert "Livesey" in memory.ask(question, "chapter", budget="x1", max_new_tokens=24).text
    assert "Livesey" not in memory.ask(question, [], max_new_tokens=24).text


def test_chosen_tokens_answer_what_nothing_else_tells(model: BeaconModel, tmp_path: Path) -> None:
    memory = BeaconMemory(tmp_path, model)
    added = memory.add("harbour", HARBOUR, ratio=4, compression="select")
    assert (added.compression, added.slots) == ("select", -(-added.tokens // 4))
    for question, expected in (
        ("What is the name of the lighthouse keeper?", "Tavershaw"),
        ("What is the name of the ferry?", "Ombrelline"),
    ):
        assert expected in memory.ask(question, "harbour", max_new_tokens=24).text
        assert expected not in memory.ask(question, [], max_new_tokens=24).text


def test_in_one_reading_most_of_what_a_repetition_finds_is_found(model: BeaconModel) -> None:
    kept = []
    for score in ("repeat", "expected"):
        compressor = BeaconCompressor(model, score=score)
        ids = compressor.tokenize(CHAPTER).ids[:512]
        memory = compressor.compress_one(Work(ids, [8]), compression="select").kv
        heads = (head for layer in range(len(memory.counts)) for head in memory.layer(layer))
        kept.append({(number, place) for number, head in enumerate(heads) for place in head[2].tolist()})
    assert len(kept[0]) == len(kept[1])
    assert len(kept[0] & kept[1]) > 0.8 * len(kept[0])  # by chance 0.125, by attention that is expected alone 0.7


def test_in_16_bits_requests_decoded_together_are_as_likely_as_alone() -> None:
    """Tokens may part where two are as likely; so far, and there, both ways agree on how likely they are."""
    model = BeaconModel.from_pretrained(dtype="bfloat16")
    compressor = BeaconCompressor(model)
    ids = compressor.tokenize(CHAPTER).ids
    works = [Work(ids[start : start + 400], compressor.ratios(400, 4)) for start in (0, 400, 800, 1200)]
    memories = [compressor.compress_one(work, compression="select").kv for work in works]
    prompt = chat_prompt(model, "What happens here? Tell it in your own words.", behind_memory=True)
    config = generation_config(model, None, {"max_new_tokens": 24})
    requests = [Request(MemoryKV.concat([MemoryKV.of(compressor.sink), memory]), prompt) for memory in memories]
    loop = DecodeLoop(model)
    together = [ticket.result() for ticket in [loop.submit(request, config) for request in requests]]
    for request, one in zip(requests, together, strict=True):
        alone = loop.submit(request, config).result()
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone.tokens, one.tokens, strict=False)))
        pairs = [*zip(alone.likelihoods, one.likelihoods, strict=False)][: same + 1]
        apart = [abs(first - second) for first, second in pairs]
        assert max(apart) < 0.4  # where two tokens are as likely, rounding counts most, on some processors more
        assert fmean(apart) < 0.05
        assert same >= 4


def test_example_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "01_compress_and_ask.py"), "--store", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "2,788 tokens" in done.stdout
    assert done.stdout.count("\nQ: ") == 3
