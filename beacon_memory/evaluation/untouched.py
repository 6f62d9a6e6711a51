"""The unchanged base model as a baseline, with which LoRA and memory are compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from beacon_memory.generation.generate import Request, generate
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.modeling.loading import load_base
from beacon_memory.modeling.model import BeaconModel

from .baselines import Baseline, Outcome, Truncated, greedy
from .items import Item
from .pieces import cut_middle, token_ids

__all__ = ["Untouched"]

INSTRUCTION = "Answer the question with a few words from the text."


class Untouched(Baseline):
    """The baseline `base`: the base model loaded again, without LoRA or memory, with the whole text in its prompt."""

    def __init__(self, name: str, model: BeaconModel) -> None:
        base, tokenizer = load_base(str(model.base.config.name_or_path), model.device, model.dtype)
        # nothing is compressed, so the placement does not matter; others than `end` would need tensors
        config = replace(model.config, beacon_placement="end")
        super().__init__(name, BeaconModel(base, config, tokenizer=tokenizer).eval())
        self._raw = Truncated(name, self.model, 1)

    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[Outcome]:
        """Answer items in one batch."""
        config = greedy(self.model, max_new_tokens)
        no_memory = MemoryKV.of(self.model.empty_kv())
        requests, sizes = [], []
        for item in items:
            text = "\n".join(item.context)
            ids = token_ids(self.model.tokenizer, text)
            kept = cut_middle(ids, self._raw.room)
            if len(kept) < len(ids):
                text = str(self.model.tokenizer.decode(kept))
            message = f"{text}\n\n{INSTRUCTION}\nQuestion: {item.question}"
            requests.append(Request(no_memory, chat_prompt(self.model, message, behind_memory=False)))
            sizes.append((len(kept), len(kept) < len(ids)))
        started = time.perf_counter()
        answers = generate(self.model, requests, config)
        each = (time.perf_counter() - started) / len(items)
        return [
            Outcome(answer.text, size * self.model.slot_bytes, each, cut)
            for (answer,), (size, cut) in zip(answers, sizes, strict=True)
        ]

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> float:
        """Return the score of `full` for the base; so without a LoRA both are equal to the last bit."""
        return self._raw.score(context, continuation)
