"""Ways to answer from a text: what compressed memory is compared with, on the same lora."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.errors import CapacityError, InputError
from beacon_memory.generation.generate import Request, generate
from beacon_memory.generation.options import generation_config
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import quantized
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window, slots_of
from beacon_memory.modeling.model import BeaconModel

from .items import Item
from .pieces import Passages, chunks, cut_middle, passage_ids, split_documents
from .retrieval import rank_passages

__all__ = [
    "BATCH",
    "Baseline",
    "Compressed",
    "NoText",
    "Outcome",
    "PrefixBaseline",
    "PrefixMemory",
    "ReadingBaseline",
    "Retrieved",
    "Truncated",
    "greedy",
    "mean_nll",
]

BATCH = 8  # items that are answered together


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a baseline answered.

    kv_bytes: K/V that stand for the text, without the sink.
    seconds:  to read the text, even if that was done for an earlier item or baseline, and to answer.
    cut:      the text did not fit the model's positions, and its middle was left out.
    """

    text: str
    kv_bytes: int
    seconds: float
    cut: bool = False


class Baseline(ABC):
    """One way to answer from a text. `asks_first`: the question must be known before the text is read."""

    asks_first = False

    def __init__(self, name: str, model: BeaconModel) -> None:
        self.name = name
        self.model = model

    @abstractmethod
    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[Outcome]:
        """Answer some items, greedily."""

    @abstractmethod
    def score(self, context: Sequence[int], continuation: Sequence[int]) -> float:
        """Mean negative log likelihood, in nats, of the tokens that follow `context`, the first one not counted.

        Raises CapacityError if the context would have to be cut.
        """

    @property
    def reading(self) -> object:
        """What reads the texts: baselines that have one in common read a text once if they answer in turn."""
        return self

    def forget(self) -> None:  # noqa: B027  # not all have something to forget
        """Let go of all texts that were read."""


class _Memory(Protocol):
    """What any baseline's memory tells."""

    @property
    def cut(self) -> bool: ...


M = TypeVar("M", bound=_Memory)


class ReadingBaseline(Baseline, Generic[M]):
    """A baseline that makes a memory of a text, once for all its questions that follow each other."""

    def __init__(self, name: str, model: BeaconModel) -> None:
        super().__init__(name, model)
        self.compressor = BeaconCompressor(model)
        self._last: tuple[object, M, float] | None = None

    @abstractmethod
    def read(self, passages: Passages, question: str | None) -> M:
        """Make the memory of a text, given as token ids of its passages; no question if a continuation is scored."""

    def memory(self, item: Item) -> tuple[M, float]:
        """The memory of an item's text, and the seconds that it took to make."""
        key = (item.context, item.question if self.asks_first else None)
        if self._last is None or self._last[0] != key:
            self._last = None  # a memory is large: let go of it before the next is made
            started = time.perf_counter()
            memory = self.read(passage_ids(self.model.tokenizer, item.context), item.question)
            self._last = (key, memory, time.perf_counter() - started)
        return self._last[1], self._last[2]

    def forget(self) -> None:
        """See Baseline."""
        self._last = None

    def memory_to_continue(self, context: Sequence[int]) -> M:
        """The memory of a text that is to be continued. Raises CapacityError if it had to be cut."""
        memory = self.read([context], None)
        if memory.cut:
            raise CapacityError(
                f"{self.name}: a text of {len(context)} tokens does not fit the model's {self.model.max_positions} "
                "positions whole; shorten the context, or leave this baseline out"
            )
        return memory

    @property
    def room(self) -> int:
        """Positions for a text, beside the sink (or bos) and what follows the text."""
        free = max(self.compressor.reserve, self.model.config.beacon_window)  # a window is read raw
        room = self.model.max_positions - free - len(self.model.sink_ids or self.model.leading_bos)
        if room < 1:
            raise CapacityError(
                f"the model has {self.model.max_positions} positions, {free} of which are kept free for question and "
                "answer; evaluation needs a model with more"
            )
        return room


@dataclass(frozen=True, slots=True, eq=False)
class PrefixMemory:
    """A memory that stands in front of any question, the sink included. kv_bytes, cut: see Outcome.

    saved: seconds of reading that were spent for another baseline.
    """

    kv: MemoryKV
    kv_bytes: int
    cut: bool = False
    saved: float = 0.0


class PrefixBaseline(ReadingBaseline[PrefixMemory]):
    """A baseline whose memory is a prefix: all that read with beacons, or with none."""

    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[Outcome]:
        """Answer items in one batch."""
        config = greedy(self.model, max_new_tokens)
        memories = [self.memory(item) for item in items]
        requests = [
            Request(memory.kv, chat_prompt(self.model, item.question, behind_memory=bool(memory.kv.span)))
            for item, (memory, _) in zip(items, memories, strict=True)
        ]
        started = time.perf_counter()
        answers = generate(self.model, requests, config)
        each = (time.perf_counter() - started) / len(items)
        return [
            Outcome(answer.text, memory.kv_bytes, seconds + memory.saved + each, memory.cut)
            for (answer,), (memory, seconds) in zip(answers, memories, strict=True)
        ]

    @torch.inference_mode()
    def score(self, context: Sequence[int], continuation: Sequence[int]) -> float:
        """See Baseline."""
        prefix = self.memory_to_continue(context).kv
        layout = BeaconLayout.build([Piece(Cursor(), [Window.behind(0, continuation)])], self.model.config)
        hidden = self.model.run(layout, self.model.empty_kv(), [], prefixes=[self.model.prefix(prefix)]).hidden
        return mean_nll(self.model.head(hidden[:-1]), continuation[1:])

    def memories(self, documents: Sequence[Sequence[int]], ratio: int, compression: str = "beacon") -> list[MemoryKV]:
        """The memory of each document, without the sink. Ratio 0 keeps the K/V of every token."""
        lead = [] if self.model.sink_ids else self.model.leading_bos
        whole = [[*lead, *ids] for ids in documents]
        work = [Work(ids, self.compressor.ratios(len(ids), ratio)) for ids in whole]
        return [one.kv for _, one in self.compressor.compress(enumerate(work), compression=compression)]

    def composed(self, memories: Sequence[MemoryKV]) -> MemoryKV:
        """The sink and memories of documents, one behind another."""
        sink = MemoryKV.of(self.compressor.sink)
        return MemoryKV.concat([sink, *memories], sink.slots + self.room)

    def raw(self, ids: Sequence[int], *, cut: bool = False) -> PrefixMemory:
        """The sink and the K/V of every token."""
        (memory,) = self.memories([ids], 0)
        return PrefixMemory(self.composed([memory]), memory.nbytes, cut)


class NoText(PrefixBaseline):
    """`none`."""

    def read(self, passages: Passages, question: str | None) -> PrefixMemory:  # noqa: ARG002  # it has no text
        """The sink alone."""
        return PrefixMemory(MemoryKV.of(self.compressor.sink), kv_bytes=0)


class Truncated(PrefixBaseline):
    """`truncated:R`, and `full` for R = 1."""

    def __init__(self, name: str, model: BeaconModel, ratio: int) -> None:
        super().__init__(name, model)
        self.ratio = ratio

    def read(self, passages: Passages, question: str | None) -> PrefixMemory:
        """The first tokens; of a text that is to be continued, the last."""
        ids = [id for passage in passages for id in passage]
        size = -(-len(ids) // self.ratio)
        kept = ids[:size] if question is not None else ids[len(ids) - size :]
        return self.raw(cut_middle(kept, self.room), cut=size > self.room)


class Retrieved(PrefixBaseline):
    """`bm25:R`."""

    asks_first = True

    def __init__(self, name: str, model: BeaconModel, ratio: int) -> None:
        super().__init__(name, model)
        self.ratio = ratio

    def read(self, passages: Passages, question: str | None) -> PrefixMemory:
        """The best passages that fit the budget, in the order of the text; the last of them may be cut."""
        if question is None:
            raise InputError(f"{self.name} needs a question: leave it out where a continuation is scored")
        pieces = [chunk for passage in passages for chunk in chunks(passage)]
        budget = min(-(-sum(map(len, passages)) // self.ratio), self.room)
        chosen: dict[int, list[int]] = {}
        for number in rank_passages([str(self.model.tokenizer.decode(piece)) for piece in pieces], question):
            if budget <= 0:
                break
            chosen[number] = pieces[number][:budget]
            budget -= len(chosen[number])
        return self.raw([id for number in sorted(chosen) for id in chosen[number]])


class Compressed(PrefixBaseline):
    """`beacon:R`, `beacon:R:N` and the same of any other compression method, with `bits` quantized."""

    def __init__(
        self,
        name: str,
        model: BeaconModel,
        compression: str,
        ratio: int,
        documents: int = 1,
        *,
        score: str = "repeat",
        bits: int | None = None,
    ) -> None:
        super().__init__(name, model)
        self.compressor = BeaconCompressor(model, score=score)
        self.compression, self.ratio, self.documents, self.bits = compression, ratio, documents, bits
        self._timed = lru_cache(maxsize=1)(self._compress)

    @staticmethod
    def share_reading(alike: Sequence[Compressed]) -> None:
        """Let baselines that differ in bits alone read each text of a batch once."""
        timed = lru_cache(maxsize=BATCH)(alike[0]._compress)
        for one in alike:
            one._timed = timed

    def read(self, passages: Passages, question: str | None) -> PrefixMemory:  # noqa: ARG002  # compression is blind to it
        """One or more documents, compressed and composed."""
        parts = split_documents(passages, self.documents)
        cut = sum(self._slots(len(part) + 1) for part in parts) > self.room  # a bos leads where there is no sink
        if cut:
            kept = cut_middle([id for passage in passages for id in passage], self.capacity)
            parts = split_documents([kept], self.documents)
        started = time.perf_counter()
        memories, seconds = self._timed(tuple(map(tuple, parts)))
        saved = max(0.0, seconds - (time.perf_counter() - started))
        kv_bytes = sum(memory.nbytes for memory in memories)
        if self.bits is not None:
            stored = [quantized(memory, self.bits) for memory in memories]
            kv_bytes = sum(one.nbytes for one in stored)
            memories = [one.dequantized() for one in stored]
        return PrefixMemory(self.composed(memories), kv_bytes, cut, saved)

    def _compress(self, documents: tuple[tuple[int, ...], ...]) -> tuple[list[MemoryKV], float]:
        """The memories of documents, and the seconds that they took."""
        started = time.perf_counter()
        return self.memories(documents, self.ratio, self.compression), time.perf_counter() - started

    @property
    def reading(self) -> object:
        """See Baseline."""
        return self._timed

    def forget(self) -> None:
        """See Baseline."""
        super().forget()
        self._timed.cache_clear()

    def _slots(self, tokens: int) -> int:
        whole, rest = divmod(tokens, self.model.config.beacon_window)
        return whole * slots_of(self.model.config.beacon_window, self.ratio) + slots_of(rest, self.ratio)

    @property
    def capacity(self) -> int:
        """Tokens of a text whose slots are sure to fit, however it is cut into documents."""
        window = self.model.config.beacon_window
        windows = self.room // slots_of(window, self.ratio) - (self.documents - 1)
        if windows < 1:
            raise CapacityError(f"{self.name}: the model has no positions for so many long documents; name fewer")
        return windows * window - self.documents


def greedy(model: BeaconModel, max_new_tokens: int) -> GenerationConfig:
    """The most likely token each time, whatever else the base model's own settings ask for."""
    plain = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    return generation_config(model, None, {"max_new_tokens": max_new_tokens, **plain})


def mean_nll(logits: Tensor, ids: Sequence[int]) -> float:
    """Mean negative log likelihood in nats: logits [tokens, vocab], one row for each id."""
    return cross_entropy(logits.float(), torch.tensor(list(ids), device=logits.device)).item()
