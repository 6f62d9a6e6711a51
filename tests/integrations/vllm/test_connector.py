"""vLLM itself behind stored memories, beside our own path; opt-in, for vLLM has to be installed: see docs/vllm.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from torch import Tensor

from beacon_memory.generation.generate import Request, generate
from beacon_memory.generation.options import generation_config
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.prefix import Prefix
from beacon_memory.memory import BeaconMemory
from beacon_memory.modeling.cache import MemoryCache

vllm = pytest.importorskip("vllm", reason="vllm is not installed; benchmarks/vllm/run.sh does that")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

from vllm_beacon_memory import Front, Fronts, write_model_folder  # noqa: E402

STORY = (ROOT / "examples" / "treasure_island_chapter_1.txt").read_text(encoding="utf-8")
QUESTIONS = (
    "How much was the boy promised each month?",
    "What is the name of the inn?",
    "What song did the captain sing?",
)
# Blocks of vLLM's cache; the second one has room for two memories of a whole chapter, and for few tokens behind them.
CACHES = {"float32": {}, "bfloat16": {"block_size": 32, "num_gpu_blocks_override": 179}}


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A memory, one on the same store that computes in float32, and vLLM with the same model and store."""

    memory: BeaconMemory
    exact: BeaconMemory
    fronts: Fronts
    llm: Any
    dtype: str

    def prompt(self, question: str) -> list[int]:
        """The question in the model's chat template, as vLLM's tokenizer has it."""
        turns = [{"role": "user", "content": question}]
        ids: list[int] = self.llm.get_tokenizer().apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False
        )
        assert ids == chat_prompt(self.memory.model, question, behind_memory=True)
        return ids

    def ours(self, ids: Sequence[str], prompt: Sequence[int], tokens: int) -> tuple[int, ...]:
        """The greedy answer of our own path."""
        config = generation_config(self.memory.model, None, {"max_new_tokens": tokens, "do_sample": False})
        return generate(self.memory.model, [Request(prefix(self.memory, ids), prompt)], config)[0][0].tokens

    def asked(self, asked: Sequence[tuple[Front, Sequence[int]]], **options: Any) -> list[Any]:
        """The outputs of vLLM for prompts behind memories, all at a time."""
        prompts = [front.prompt(prompt) for front, prompt in asked]
        given = [with_memory(front, **options) for front, _ in asked]
        return [output.outputs[0] for output in self.llm.generate(prompts, given, use_tqdm=False)]

    def counted(self, name: str) -> int:
        """The value of one of vLLM's counters."""
        return int(next(one.value for one in self.llm.get_metrics() if one.name == f"vllm:{name}"))


def prefix(memory: BeaconMemory, ids: Sequence[str]) -> Prefix:
    """Whole documents in front of a prompt of our own path."""
    return memory.model.prefix(MemoryKV.of(memory.compressor.sink), *(memory.store.get(id).kv for id in ids))


def with_memory(front: Front, **options: Any) -> Any:
    """Parameters of a greedy request behind a memory."""
    extra = {"kv_transfer_params": front.kv_transfer_params}
    return vllm.SamplingParams(**{"temperature": 0, "extra_args": extra, **options})


@pytest.fixture(scope="module", params=[*CACHES])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    dtype: str = request.param
    folder = tmp_path_factory.mktemp(dtype)
    write_model_folder(folder / "model", dtype=dtype)
    memory = BeaconMemory(folder / "store", device="cpu", dtype=dtype)
    memory.add("island", STORY, ratio=0)
    memory.add("beacons", STORY[:2000], ratio=2, compression="beacon")
    memory.add("owls", "Two barn owls nest above the hayloft.", ratio=0)
    memory.append("owls", " They hunt at dusk.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        llm = vllm.LLM(
            str(folder / "model"),
            dtype=dtype,
            enforce_eager=True,
            max_logprobs=100,
            max_model_len=4096,
            disable_log_stats=False,
            kv_transfer_config=vllm.config.KVTransferConfig(
                kv_connector="BeaconMemoryConnector",
                kv_connector_module_path="vllm_beacon_memory.connector",
                kv_role="kv_consumer",
                kv_connector_extra_config={"store": str(folder / "store")},
            ),
            **CACHES[dtype],
        )
        exact = memory if dtype == "float32" else BeaconMemory(memory.store, device="cpu", dtype="float32")
        yield Served(memory, exact, Fronts(memory.store, folder / "model"), llm, dtype)
        llm.llm_engine.engine_core.shutdown()


DOCUMENTS = [["island"], ["beacons"], ["owls"], ["owls", "island"], []]


def test_greedy_answers_are_ours(served: Served) -> None:
    asked = [(ids, served.prompt(question)) for ids in DOCUMENTS for question in QUESTIONS]
    ours = [served.ours(ids, prompt, tokens=16) for ids, prompt in asked]
    theirs = served.asked([(served.fronts.of(ids), prompt) for ids, prompt in asked], max_tokens=16)
    same = [tuple(one.token_ids) == expected for one, expected in zip(theirs, ours, strict=True)]
    if served.dtype == "float32":
        assert all(same)
    else:  # two numbers that are nearly the same may change places
        assert sum(same) >= 0.6 * len(same)
    assert len({*ours}) > 8


@torch.inference_mode()
def log_probabilities(memory: BeaconMemory, ids: Sequence[str], tokens: Sequence[int]) -> Tensor:
    """[tokens, vocab] what follows each token, by our own path."""
    base: Any = memory.model.base
    cache = MemoryCache([prefix(memory, ids)], config=base.config)
    logits: Tensor = base(torch.tensor([list(tokens)]), past_key_values=cache).logits[0]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("ids", DOCUMENTS[:3], ids="+".join)
def test_teacher_forced_likelihoods_are_ours(
    served: Served, ids: list[str], record_property: Callable[[str, object], None]
) -> None:
    """In float32 they are the same; in bfloat16 vLLM is no further from those in float32 than our own path is."""
    prompt = served.prompt(QUESTIONS[1])
    answer = served.memory.model.tokenizer("the Admiral Benbow inn.", add_special_tokens=False)["input_ids"]
    front, tokens = served.fronts.of(ids), [*prompt, *answer]
    steps = [(front, tokens[: len(prompt) + number]) for number in range(len(answer) + 1)]
    likely = [one.logprobs[0] for one in served.asked(steps, max_tokens=1, logprobs=100)]
    places = [torch.tensor([*one]) for one in likely]
    theirs = torch.cat([torch.tensor([found.logprob for found in one.values()]) for one in likely])

    def ours(memory: BeaconMemory) -> Tensor:
        rows = log_probabilities(memory, ids, tokens)[len(prompt) - 1 :]
        assert len(rows) == len(places) > 5
        return torch.cat([row[place] for row, place in zip(rows, places, strict=True)])

    exact = ours(served.exact)
    off, own = (theirs - exact).abs(), (ours(served.memory) - exact).abs()
    figures = f"vLLM {off.mean():.1e} {off.max():.1e}, ours {own.mean():.1e} {own.max():.1e}"
    record_property("mean and largest difference from float32", figures)
    if served.dtype == "float32":
        assert off.max() < 2e-3
    assert off.mean() <= 1.5 * own.mean() + 1e-3, figures
    assert off.max() <= 2 * own.max() + 2e-3, figures


def test_what_was_loaded_is_a_hit_of_vllms_prefix_cache_afterwards(served: Served) -> None:
    served.llm.reset_prefix_cache()
    prompt, front = served.prompt(QUESTIONS[0]), served.fronts.of(["island"])
    block = served.llm.llm_engine.vllm_config.cache_config.block_size
    whole = front.slots // block * block
    for loaded, found in ((front.slots, 0), (front.slots - whole, whole)):
        before = {name: served.counted(name) for name in ("prefix_cache_hits", "external_prefix_cache_hits")}
        served.asked([(front, prompt)], max_tokens=4)
        after = {name: served.counted(name) - count for name, count in before.items()}
        assert after == {"prefix_cache_hits": found, "external_prefix_cache_hits": loaded}


def test_two_memories_of_the_same_length_are_not_mixed(served: Served) -> None:
    if served.dtype != "float32":
        pytest.skip("bytes are compared in float32")
    memory, prompt = served.memory, served.prompt("Who pays the rent?")
    names = ("Ada Flint", "Ida Stone", "Eva March", "Lea Brook")
    for name in names:
        memory.add(name, f"The rent of the mill is paid by {name}. " + STORY[:400], ratio=0)
    fronts = [served.fronts.of([name]) for name in names]
    assert len({front.slots for front in fronts}) < len(fronts)
    alone = [served.ours([name], prompt, tokens=8) for name in names]
    for _ in range(2):
        together = served.asked([(front, prompt) for front in fronts], max_tokens=8)
        assert [tuple(one.token_ids) for one in together] == alone


def test_requests_that_lose_their_blocks_load_their_memory_again(served: Served) -> None:
    if served.dtype == "float32":
        pytest.skip("there is room for all")
    prompt = served.prompt("Tell a long story.")
    asked = [(served.fronts.of(ids), prompt) for ids in (["island"], ["owls", "island"])]
    alone = [served.asked([one], max_tokens=64, ignore_eos=True)[0] for one in asked]
    before = served.counted("num_preemptions")
    both = served.asked(asked, max_tokens=64, ignore_eos=True)
    assert served.counted("num_preemptions") > before
    for one, expected in zip(both, alone, strict=True):
        assert one.token_ids[:8] == expected.token_ids[:8]
        assert len(one.token_ids) == 64


def refused(served: Served, prompt: Any, options: Any) -> bool:
    """Whether a request ends with an error; one that is right is answered afterwards."""
    (output,) = served.llm.generate([prompt], [options], use_tqdm=False)
    (after,) = served.asked([(served.fronts.of(["owls"]), served.prompt(QUESTIONS[0]))], max_tokens=4)
    assert after.finish_reason in ("stop", "length")
    return bool(output.outputs[0].finish_reason == "error" and not output.outputs[0].token_ids)


Change = Callable[[dict[str, Any], dict[str, Any]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda prompt, _: prompt.pop("cache_salt"),
        lambda prompt, _: prompt.update(cache_salt="beacon_memory:other"),
        lambda prompt, _: prompt["prompt_token_ids"].pop(0),
        lambda prompt, _: prompt.update(prompt_token_ids=prompt["prompt_token_ids"][:3]),
        lambda _, options: options.pop("extra_args"),
        lambda _, options: options.update(extra_args={"kv_transfer_params": {"beacon_memory": "owls"}}),
        lambda _, options: options.update(repetition_penalty=1.2),
        lambda _, options: options.update(prompt_logprobs=1),
        lambda _, options: options.update(skip_reading_prefix_cache=True),
    ],
    ids=[
        *("without a salt", "another salt", "a placeholder less", "truncated"),
        *("without parameters", "other parameters", "repetition_penalty", "prompt_logprobs", "not from the cache"),
    ],
)
@pytest.mark.parametrize("cached", [False, True], ids=["cold", "cached"])
def test_a_request_that_cannot_have_its_memory_ends_with_an_error(served: Served, change: Change, cached: bool) -> None:
    front, question = served.fronts.of(["island"]), served.prompt(QUESTIONS[0])
    served.llm.reset_prefix_cache()
    if cached:
        served.asked([(front, question)], max_tokens=1)
    prompt, options = front.prompt(question), {"extra_args": {"kv_transfer_params": front.kv_transfer_params}}
    change(prompt, options)
    assert refused(served, prompt, vllm.SamplingParams(temperature=0, max_tokens=1, **options))


def test_so_does_one_whose_document_was_replaced_or_damaged(served: Served) -> None:
    memory, prompt = served.memory, served.prompt(QUESTIONS[0])
    memory.add("well", "The well is deep.", ratio=0)
    front = served.fronts.of(["well"])
    memory.add("well", "The well is dry.", ratio=0)
    assert refused(served, front.prompt(prompt), with_memory(front))
    front, file = served.fronts.of(["well"]), memory.store.folder / memory.store.row("well").file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert refused(served, front.prompt(prompt), with_memory(front))


def test_requests_without_a_memory_are_answered_as_ever(served: Served) -> None:
    prompt = served.prompt(QUESTIONS[0])
    (output,) = served.llm.generate(
        [{"prompt_token_ids": prompt}], [vllm.SamplingParams(temperature=0, max_tokens=4)], use_tqdm=False
    )
    assert len(output.outputs[0].token_ids) > 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kv_connector_extra_config": {}}, "must have `store`"),
        ({"kv_load_failure_policy": "recompute"}, "kv_load_failure_policy must be 'fail'"),
    ],
)
def test_settings_that_memories_cannot_have_are_refused(
    tmp_path: Path,
    settings: dict[str, Any],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    transfer = {
        "kv_connector": "BeaconMemoryConnector",
        "kv_connector_module_path": "vllm_beacon_memory.connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"store": str(tmp_path)},
    }
    write_model_folder(tmp_path / "model")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with pytest.raises(Exception, match="ngine"):
        vllm.LLM(str(tmp_path / "model"), enforce_eager=True, kv_transfer_config={**transfer, **settings})
    assert says in "".join(capfd.readouterr())
