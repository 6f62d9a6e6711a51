"""Ways to answer from a text, compressed memory among them, which are compared on the same model."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from beacon_memory.compression.compressor import BeaconCompressor
from beacon_memory.compression.work import Work
from beacon_memory.errors import CapacityError, InputError
from beacon_memory.evidence import words_in_one
from beacon_memory.generation.generate import Request, generate
from beacon_memory.generation.options import generation_config
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.kv.levels import kept_from, level_of
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.quantize import quantized
from beacon_memory.lookup import Lookup, gist_slots, sections_of_entries
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window, document_slots, slots_of
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.ranking import TELLING, joined, matches, rank_passages
from beacon_memory.zoom import allocate, chunks, section_counts, zoomed

from .items import Item
from .pieces import Passages, cut_middle, passage_ids, split_documents

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
    "Zoomed",
    "greedy",
    "mean_nll",
]

BATCH = 8  # items that are answered together


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer of a baseline, and its costs.

    kv_bytes: bytes of the K/V of the text, without the sink.
    seconds:  time to read the text, even if that was done for an earlier item or baseline, and to answer.
    cut:      whether the text did not fit the model's positions, so that its middle was left out.
    """

    text: str
    kv_bytes: int
    seconds: float
    cut: bool = False


class Baseline(ABC):
    """One way to answer from a text. With `asks_first`, it must know the question before it reads the text."""

    asks_first = False

    def __init__(self, name: str, model: BeaconModel) -> None:
        self.name = name
        self.model = model

    @abstractmethod
    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[Outcome]:
        """Answer items by greedy decoding."""

    @abstractmethod
    def score(self, context: Sequence[int], continuation: Sequence[int]) -> float:
        """Return the mean negative log likelihood, in nats, of the tokens that follow `context`, except the first.

        Raises CapacityError if the context would have to be cut.
        """

    @property
    def reading(self) -> object:
        """Return the object that reads texts; baselines with the same one read a text once if they take turns."""
        return self

    def forget(self) -> None:  # noqa: B027  # not all keep something
        """Free the memory of all texts that were read."""


class _Memory(Protocol):
    """The memory of any baseline."""

    @property
    def cut(self) -> bool: ...


M = TypeVar("M", bound=_Memory)


class ReadingBaseline(Baseline, Generic[M]):
    """A baseline that makes a memory of a text, once for all successive questions about it."""

    def __init__(self, name: str, model: BeaconModel) -> None:
        super().__init__(name, model)
        self.compressor = BeaconCompressor(model)
        self._last: tuple[object, M, float] | None = None

    @abstractmethod
    def read(self, passages: Passages, question: str | None) -> M:
        """Make the memory of a text. There is no question if a continuation is scored."""

    def memory(self, item: Item) -> tuple[M, float]:
        """Return the memory of an item's text, and the seconds that it took to make."""
        key = (item.context, item.question if self.asks_first else None)
        if self._last is None or self._last[0] != key:
            self._last = None  # a memory is large: free it before the next is made
            started = time.perf_counter()
            memory = self.read(passage_ids(self.model.tokenizer, item.context), item.question)
            self._last = (key, memory, time.perf_counter() - started)
        return self._last[1], self._last[2]

    def forget(self) -> None:
        """Free the memory of the last text."""
        self._last = None

    def memory_to_continue(self, context: Sequence[int]) -> M:
        """Return the memory of a text that is to be continued. Raises CapacityError if it had to be cut."""
        memory = self.read([context], None)
        if memory.cut:
            raise CapacityError(
                f"{self.name}: a text of {len(context)} tokens does not fit the model's {self.model.max_positions} "
                "positions whole; shorten the context, or leave this baseline out"
            )
        return memory

    @property
    def room(self) -> int:
        """Return how many positions a text may take, so that sink (or bos), question and answer fit too."""
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
    """A memory, the sink included, that is used as the prefix of any question. For kv_bytes and cut see Outcome.

    saved: seconds of reading that another baseline has spent already.
    """

    kv: MemoryKV
    kv_bytes: int
    cut: bool = False
    saved: float = 0.0


class PrefixBaseline(ReadingBaseline[PrefixMemory]):
    """A baseline whose memory is a prefix of the question: all of them except those with presses."""

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
        """Return the mean negative log likelihood of a continuation that follows the memory of `context`."""
        prefix = self.memory_to_continue(context).kv
        layout = BeaconLayout.build([Piece(Cursor(), [Window.behind(0, continuation)])], self.model.config)
        prefixes = [self.model.prefix(prefix)]
        hidden = self.model.run(layout, self.model.empty_kv(), [], prefixes=prefixes, answers=True).hidden
        return mean_nll(self.model.head(hidden[:-1]), continuation[1:])

    def memories(self, documents: Sequence[Sequence[int]], ratio: int, compression: str = "beacon") -> list[MemoryKV]:
        """Return the memory of each document, without the sink. Ratio 0 keeps the K/V of every token."""
        whole = [[*self.lead, *ids] for ids in documents]
        work = [Work(ids, self.compressor.ratios(len(ids), ratio, compression)) for ids in whole]
        return [one.kv for _, one in self.compressor.compress(enumerate(work), compression=compression)]

    @property
    def lead(self) -> list[int]:
        """Return the token ids that stand before each document: a bos where the model has no sink, but sets one."""
        return [] if self.model.sink_ids else self.model.leading_bos

    def composed(self, memories: Sequence[MemoryKV]) -> MemoryKV:
        """Join the sink and the memories of documents."""
        sink = MemoryKV.of(self.compressor.sink)
        return MemoryKV.concat([sink, *memories], sink.slots + self.room)

    def raw(self, ids: Sequence[int], *, cut: bool = False) -> PrefixMemory:
        """Return the sink and the K/V of every token as a memory."""
        (memory,) = self.memories([ids], 0)
        return PrefixMemory(self.composed([memory]), self.kept_bytes([memory]), cut)

    def asked(self, question: str | None) -> str:
        """Return the question of an item; raises InputError where a continuation is scored and there is none."""
        if question is None:
            raise InputError(f"{self.name} needs a question: leave it out where a continuation is scored")
        return question

    def texts(self, pieces: Passages) -> list[str]:
        """Return the texts of token ids."""
        return [str(self.model.tokenizer.decode(list(piece))) for piece in pieces]

    def kept_bytes(self, memories: Sequence[MemoryKV]) -> int:
        """Return the bytes of memories as a store keeps them, in the dtype of the checkpoint."""
        return sum(memory.to(dtype=self.model.kv_dtype).nbytes for memory in memories)


class NoText(PrefixBaseline):
    """The baseline `none`."""

    def read(self, passages: Passages, question: str | None) -> PrefixMemory:  # noqa: ARG002  # it has no text
        """Return the sink alone."""
        return PrefixMemory(MemoryKV.of(self.compressor.sink), kv_bytes=0)


class Truncated(PrefixBaseline):
    """The baseline `truncated:R`, and `full` with R = 1."""

    def __init__(self, name: str, model: BeaconModel, ratio: int) -> None:
        super().__init__(name, model)
        self.ratio = ratio

    def read(self, passages: Passages, question: str | None) -> PrefixMemory:
        """Keep the first tokens of a text, or the last ones if it is to be continued."""
        ids = [id for passage in passages for id in passage]
        size = -(-len(ids) // self.ratio)
        kept = ids[:size] if question is not None else ids[len(ids) - size :]
        return self.raw(cut_middle(kept, self.room), cut=size > self.room)


class Retrieved(PrefixBaseline):
    """The baseline `bm25:R`."""

    asks_first = True

    def __init__(self, name: str, model: BeaconModel, ratio: int) -> None:
        super().__init__(name, model)
        self.ratio = ratio

    def read(self, passages: Passages, question: str | None) -> PrefixMemory:
        """Keep the passages that match best and fit the budget, in the order of the text; one of them may be cut."""
        pieces = [chunk for passage in passages for chunk in chunks(passage)]
        budget = min(-(-sum(map(len, passages)) // self.ratio), self.room)
        chosen: dict[int, list[int]] = {}
        for number in rank_passages(self.texts(pieces), self.asked(question)):
            if budget <= 0:
                break
            chosen[number] = pieces[number][:budget]
            budget -= len(chosen[number])
        return self.raw([id for number in sorted(chosen) for id in chosen[number]])


class Compressed(PrefixBaseline):
    """The baselines `beacon:R`, `select:R:N` and so on, one for each compression method; quantized with `bits`."""

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
        self._richest = ratio
        self._timed = lru_cache(maxsize=1)(self._compress)

    @staticmethod
    def share_reading(alike: Sequence[Compressed]) -> None:
        """Let baselines with the same `reads` read each text of a batch once, at the lowest of their ratios.

        A document of several windows is read once for each ratio: what is left of a window is in front of the next.
        """
        timed, richest = lru_cache(maxsize=BATCH)(alike[0]._compress), min(one.ratio for one in alike)
        for one in alike:
            one._timed, one._richest = timed, richest

    def read(self, passages: Passages, question: str | None) -> PrefixMemory:
        """Compress the text, as one or more documents, and join what is loaded of their memories."""
        parts = split_documents(passages, self.documents)
        cut = sum(self._slots(len(part) + 1) for part in parts) > self.room  # a bos leads where there is no sink
        if cut:
            passages = [cut_middle([id for passage in passages for id in passage], self.capacity)]
            parts = split_documents(passages, self.documents)
        one_window = all(len(self.lead) + len(part) <= self.model.config.beacon_window for part in parts)
        ratio = self._richest if one_window else self.ratio
        started = time.perf_counter()
        read, seconds = self._timed(tuple(map(tuple, parts)), ratio)
        saved = max(0.0, seconds - (time.perf_counter() - started))
        if ratio < self.ratio:
            read = [memory.from_level(level_of(self.ratio)) for memory in read]
        memories = self.loaded(read, passages, question)
        kv_bytes = self.kept_bytes(memories)
        if self.bits is not None:
            stored = [quantized(memory, self.bits) for memory in memories]
            kv_bytes = sum(one.nbytes for one in stored)
            memories = [one.dequantized() for one in stored]
        return PrefixMemory(self.composed(memories), kv_bytes, cut, saved)

    def loaded(
        self,
        memories: Sequence[MemoryKV],
        passages: Passages,  # noqa: ARG002  # for those that look at the text
        question: str | None,  # noqa: ARG002  # for those that know it
    ) -> Sequence[MemoryKV]:
        """Return what is loaded of the memories of documents: all of it, whatever the question."""
        return memories

    def _compress(self, documents: tuple[tuple[int, ...], ...], ratio: int) -> tuple[list[MemoryKV], float]:
        """Return the memories of documents at a ratio, and the seconds that they took."""
        started = time.perf_counter()
        return self.memories(documents, ratio, self.compression), time.perf_counter() - started

    @property
    def reads(self) -> tuple[str, str, int, int | None]:
        """Return what decides how texts are read: method, score, number of documents, and the ratio.

        None for a ratio whose memory of a window is the part of any richer one from some level on.
        """
        dense = self.model.config.beacon_dense_ratio
        levelled = self.compression == "select" or (self.compression == "beacon" and 0 < dense <= self.ratio)
        nested = levelled and kept_from(level_of(self.ratio), 1000 * self.ratio) == 1000
        return self.compression, self.compressor.score, self.documents, None if nested else self.ratio

    @property
    def reading(self) -> object:
        """Return the function that compresses documents, which baselines with the same `reads` may share."""
        return self._timed

    def forget(self) -> None:
        """Free the memories of all documents."""
        super().forget()
        self._timed.cache_clear()

    def _slots(self, tokens: int) -> int:
        return document_slots(tokens, self.ratio, self.model.config.beacon_window)

    @property
    def capacity(self) -> int:
        """Return how many tokens of a text have slots that surely fit, however it is cut into documents."""
        window = self.model.config.beacon_window
        windows = self.room // self._slots(window) - (self.documents - 1)
        if windows < 1:
            raise CapacityError(f"{self.name}: the model has no positions for so many long documents; name fewer")
        return windows * window - self.documents


class Zoomed(Compressed):
    """The baselines `zoom:R`, `look:R`, `slice:R` and `nested:R`: 1/R of the K/V, out of a memory that serves every R.

    ratio: R.
    rich:  the ratio of that memory.
    blind: whether levels alone decide what is loaded, and not the question; see `zoom.allocate`.
    looks: whether passages are found by attention, too, where words do not tell; see `lookup`.
    """

    def __init__(
        self,
        name: str,
        model: BeaconModel,
        ratio: int,
        documents: int = 1,
        *,
        rich: int = 2,
        blind: bool = False,
        looks: bool = False,
    ) -> None:
        super().__init__(name, model, "select", rich, documents, score="auto")
        self.budget, self.asks_first = ratio, not blind
        self.lookup = Lookup(model) if looks else None

    def loaded(self, memories: Sequence[MemoryKV], passages: Passages, question: str | None) -> list[MemoryKV]:
        """Return what is loaded of all documents together, as one memory."""
        pieces = [chunk for passage in passages for chunk in chunks(passage)]
        memory, bounds = MemoryKV.concat(memories), self._bounds(memories, pieces)
        counts = section_counts(memory, bounds)

        def part(relevance: Sequence[float], slots: int) -> tuple[MemoryKV, list[int]]:
            lowest = allocate(counts.sum((2, 3)), relevance, slots * memory.counts.numel())
            return zoomed(memory, bounds, lowest, relevance), lowest

        relevance = blind = [0.0] * len(pieces)
        if self.asks_first:
            texts, asked = self.texts(pieces), self.asked(question)
            relevance = matches(texts, asked)
            if self.lookup is not None and 0 < (told := words_in_one(texts, asked)) <= TELLING:
                gist, lowest = part(blind, gist_slots(memory.span))
                sections = sections_of_entries([counts], lowest, self.lookup.layers, self.compressor.sink.slots)
                prefix = self.model.prefix(self.composed([gist]))
                looked = self.lookup.relevance(asked, prefix, sections, len(pieces))
                relevance = joined(relevance, looked, told)
        return [part(relevance, slots_of(memory.span, self.budget))[0]]

    def _slots(self, tokens: int) -> int:
        return slots_of(tokens, self.budget)  # only what is loaded must fit

    def _bounds(self, memories: Sequence[MemoryKV], pieces: Passages) -> list[int]:
        """Return where in the joined memories the pieces of the text begin, and where the last one ends."""
        lead = len(self.lead)
        ends = [*accumulate(memory.span - lead for memory in memories)]  # of documents, in tokens of the text
        return [0, *(end + lead * (bisect_left(ends, end) + 1) for end in accumulate(map(len, pieces)))]


def greedy(model: BeaconModel, max_new_tokens: int) -> GenerationConfig:
    """Return the settings of greedy decoding, whatever the base model's own settings are."""
    plain = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    return generation_config(model, None, {"max_new_tokens": max_new_tokens, **plain})


def mean_nll(logits: Tensor, ids: Sequence[int]) -> float:
    """Return the mean negative log likelihood of ids in nats; logits: [tokens, vocab], a row for each id."""
    return cross_entropy(logits.float(), torch.tensor(list(ids), device=logits.device)).item()
