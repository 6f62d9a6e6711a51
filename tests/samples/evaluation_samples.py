"""Tiny models in folders, as evaluation loads them, and a text with questions on it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_base, tiny_checkpoint, train
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from beacon_memory.config import BeaconConfig
from beacon_memory.evaluation.baseline_names import baselines
from beacon_memory.evaluation.baselines import Baseline, Outcome
from beacon_memory.evaluation.items import Item
from beacon_memory.evaluation.presses import _hiding
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.rope import apply_rotation
from beacon_memory.modeling.loading import load_base
from beacon_memory.modeling.model import BeaconModel

RIVERS = ("Amber", "Birch", "Cobalt", "Dune", "Ember", "Fern", "Garnet", "Hazel")
CONTEXT = tuple(f"The river {name} rises near {name[::-1]} and is {20 + 7 * len(name)} miles long." for name in RIVERS)
TEXT = "\n".join(CONTEXT)
QUESTION = "Where does the Cobalt rise?"


def an_item(question: str = QUESTION, context: Sequence[str] = CONTEXT, **more: Any) -> Item:
    return replace(Item("rivers 1", tuple(context), question, ("near tlaboC",), ("f1", "contains")), **more)


_FOLDERS: list[TemporaryDirectory[str]] = []  # until the tests are over


def a_folder() -> Path:
    _FOLDERS.append(TemporaryDirectory())
    return Path(_FOLDERS[-1].name)


@cache
def saved_base(positions: int = 4096, family: str = "llama") -> Path:
    """The folder of a tiny stock model."""
    return tiny_checkpoint(a_folder(), tiny_base(family, max_position_embeddings=positions))


@cache
def saved_model(positions: int = 4096, sink: int = 1, family: str = "llama") -> BeaconModel:
    """A trained tiny model in windows of 32 tokens, loaded from a folder."""
    config = BeaconConfig(beacon_window=32, beacon_sink_size=sink)
    return train(BeaconModel.from_pretrained(saved_base(positions, family), config=config, device="cpu"))


def save_lora(config: LoraConfig, folder: Path) -> None:
    """Save a LoRA of random numbers, the same in whatever order tests run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        get_peft_model(tiny_base("llama"), config).save_pretrained(str(folder))


@cache
def model_with_lora() -> BeaconModel:
    """Return the same model with a LoRA, and a chat template of its own."""
    folder, model = a_folder(), saved_model()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    save_lora(lora, folder / "lora")
    model.save_adapter(folder / "adapter", folder / "lora")
    reading = BeaconModel.from_pretrained(saved_base(), folder / "adapter", device="cpu")
    reading.tokenizer.chat_template = "{{ bos_token }}Q: {{ messages[0]['content'] }} A:"
    return reading


@cache
def model_with_answers() -> BeaconModel:
    """Return the same model with a LoRA for what follows a memory."""
    folder, model = a_folder(), saved_model()
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    save_lora(lora, folder / "answers")
    settings = folder / "answers" / "adapter_config.json"
    plain = json.loads(settings.read_text(encoding="utf-8")) | {"init_lora_weights": True}
    settings.write_text(json.dumps(plain), encoding="utf-8")
    model.save_adapter(folder / "adapter", answers=folder / "answers")
    return BeaconModel.from_pretrained(saved_base(), folder / "adapter", device="cpu")


def baseline(name: str, model: BeaconModel | None = None) -> Any:
    (made,) = baselines([name], model or saved_model())
    return made


def answer(one: Baseline, item: Item | None = None) -> Outcome:
    (outcome,) = one.answer([item or an_item()], 12)
    return outcome


def ids_of(text: str) -> list[int]:
    ids: list[int] = saved_model().tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def stock(positions: int = 4096) -> PreTrainedModel:
    """The stock model that the others are made of."""
    return load_base(saved_base(positions), "cpu", torch.float32)[0]


@torch.no_grad()
def stock_answer(text: Sequence[int], question: str = QUESTION, base: PreTrainedModel | None = None) -> str:
    """Return the stock model's greedy answer to [sink | text | conversation]."""
    model = saved_model()
    tokens = [*model.sink_ids, *text, *chat_prompt(model, question, behind_memory=True)]
    return continued(base or stock(), tokens)


@torch.no_grad()
def continued(base: PreTrainedModel, tokens: Sequence[int]) -> str:
    ids = torch.tensor([list(tokens)])
    output = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    return str(saved_model().tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)).strip()


@torch.no_grad()
def stock_nll(text: Sequence[int], continuation: Sequence[int], base: PreTrainedModel | None = None) -> float:
    """Mean NLL that the stock model gives the continuation without its first token, behind [sink | text]."""
    tokens = torch.tensor([[*saved_model().sink_ids, *text, *continuation]])
    logits = (base or stock())(input_ids=tokens).logits[0, -len(continuation) : -1]
    return _nll(logits, continuation)


@torch.no_grad()
def nll_behind(memory: MemoryKV, continuation: Sequence[int]) -> float:
    """The same behind a memory in a cache of the stock model's own, where a mask hides from each head what it lacks."""
    model, base, cache = saved_model(), stock(), DynamicCache()
    longest = int(memory.counts.max())
    hidden = torch.arange(longest) >= memory.counts[..., None]
    for layer in range(len(memory.counts)):
        heads = [
            (apply_rotation(keys, *model.rope.table(positions)), values)
            for keys, values, positions in memory.layer(layer)
        ]
        padded = [[torch.nn.functional.pad(part, (0, 0, 0, longest - len(part))) for part in head] for head in heads]
        keys, values = (torch.stack(parts)[None] for parts in zip(*padded, strict=True))
        cache.update(keys, values, layer)
    positions = torch.arange(memory.span, memory.span + len(continuation))[None]
    with _hiding(base, hidden):
        logits = base(torch.tensor([list(continuation)]), past_key_values=cache, position_ids=positions).logits[0]
    return _nll(logits[:-1], continuation)


def _nll(logits: Tensor, continuation: Sequence[int]) -> float:
    return cross_entropy(logits, torch.tensor(list(continuation[1:]))).item()


class Fake(Baseline):
    """A baseline that answers from `say` and scores from `nll`, by the id or the text of what it is given."""

    def __init__(self, name: str, say: Mapping[str, str] | None = None, nll: Mapping[int, float] | None = None) -> None:
        super().__init__(name, saved_model())
        self.say, self.nll = say or {}, {} if nll is None else nll
        self.batches: list[int] = []

    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[Outcome]:  # noqa: ARG002  # the base class names it
        self.batches.append(len(items))
        texts = [self.say.get(item.id, item.answers[0] if self.name == "cheat" else "") for item in items]
        return [
            Outcome(text, 1000 * len(item.context), 0.5, cut=len(item.context) > 2)
            for text, item in zip(texts, items, strict=True)
        ]

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> float:  # noqa: ARG002
        return self.nll[context[0]]


def rows_of_data() -> dict[str, list[dict[str, Any]]]:
    """A few rows of every kind of evaluation data, by file name."""
    asked = [
        {"question": f"Where does the {name} rise?", "answers": [f"near {name[::-1]}"], "category": "one-hop"}
        for name in RIVERS
    ]
    document = {"doc_id": "rivers", "context": TEXT, "qa": asked}
    pairs = [(f"key {number}", f"value {number * 37 % 101}") for number in range(12)]
    return {
        "qa_dev": [
            {"source": source, "title": "Rivers", "context": line, **one}
            for source in ("squad_v1.1", "fairytaleqa")
            for line, one in zip(CONTEXT, asked, strict=True)
        ],
        "squad_articles": [document],
        "locomo": [{**document, "sessions": CONTEXT, "qa": [*asked, {"question": "Who?", "answers": []}]}],
        "leval": [
            {**document, "task": "coursera", "metric": "exam", "qa": [{"question": "A or B?", "answers": ["A"]}]}
        ],
        "longbench": [
            {"dataset": dataset, "context": TEXT, "input": "Where?", "answers": ["near"], "all_classes": None}
            for dataset in ("qasper", "hotpotqa")
        ],
        "kv_retrieval": [
            {
                "doc_id": f"kv {number}",
                "context": "\n".join(": ".join(pair) for pair in pairs),
                "question": f"{key}?",
                "answers": [value],
            }
            for number, (key, value) in enumerate(pairs)
        ],
        "paul_graham_essays": [{"id": f"essay {number}", "text": f"{number}. {TEXT} " * 8} for number in range(4)],
    }


def write_data(folder: Path, *names: str) -> Path:
    """Data files, all or those named, gzipped."""
    folder.mkdir(exist_ok=True)
    for name, rows in rows_of_data().items():
        if not names or name in names:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder
