"""Relevance by attention: which sections of a memory the model looks up when it reads a question behind it.

A question is read behind a *gist*, a weak memory of the documents, and few heads are asked where their attention goes:
those that look answers up. Which ones do is found out by questions about a text of our own, once for an adapter.
Question and answer need no word in common. To choose parts of a long K/V cache by the model's own attention is the way
of InfLLM (arXiv 2402.04617) and Quest (arXiv 2406.10774).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.resources import files

import torch
from torch import Tensor

from beacon_memory.compression.selection import read_raw, read_sink
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.kv.levels import LEVELS
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.kv.prefix import Block, Prefix
from beacon_memory.modeling.attention import PassEndedError
from beacon_memory.modeling.layout import BeaconLayout, Cursor, Piece, Window
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.text_tokens import text_tokens

__all__ = ["Lookup", "Sections", "gist_slots", "sections_of_entries"]

# For each layer that is asked and each kv head in it, the section of each entry, int64; -1 for those of none.
Sections = Mapping[int, Sequence[Tensor]]

_HEADS = 5  # that are asked
_GIST_RATIO, _GIST_SLOTS = 8, 1024
_DISTANCE = 2000  # positions between the text of our own and its questions, as in a long memory
_SENTENCE_END = re.compile(r"[.;:]\s+")
_LEAST = 1e-4  # a share of the attention that is as good as none


class Lookup:
    """Ask the heads of a model that look answers up which sections of a memory a question is about."""

    def __init__(self, model: BeaconModel) -> None:
        self.model = model

    def relevance(self, question: str, prefix: Prefix, sections: Sections, count: int) -> list[float]:
        """Return how much each of `count` sections is looked up: the geometric mean of heads' shares of attention.

        prefix:   the memory that the question is read behind, the sink included.
        sections: which entries of it belong to which section, for all `layers`.
        """
        (shares,) = self._shares([question], prefix, sections, count)
        asked = torch.stack([shares[layer][head] for layer, head in self.heads])
        relevance: list[float] = asked.log().mean(0).exp().tolist()
        return relevance

    @property
    def layers(self) -> list[int]:
        """Return the layers whose heads are asked."""
        return sorted({layer for layer, _ in self.heads})

    @cached_property
    def heads(self) -> Sequence[tuple[int, int]]:
        """The heads that are asked, as layer and query head in it: those that the adapter names, or that are found."""
        return self.model.lookup_heads or self.found()

    @torch.inference_mode()
    def found(self) -> list[tuple[int, int]]:
        """Find the heads that give most attention to the sentence with the answer, in the mean over questions."""
        folder = files("beacon_memory.compression")
        text = folder.joinpath("calibration.txt").read_text(encoding="utf-8")
        answers: dict[str, str] = json.loads(folder.joinpath("calibration.json").read_text(encoding="utf-8"))
        ends = torch.tensor([end.end() for end in _SENTENCE_END.finditer(text)])
        right = torch.bucketize(torch.tensor([text.index(answer) for answer in answers.values()]), ends, right=True)
        ids, offsets = text_tokens(self.model.tokenizer, text)
        sentences = torch.bucketize(torch.tensor([start for start, _ in offsets]), ends, right=True)

        layers, kv_heads, _ = self.model.kv_shape
        sink = MemoryKV.of(read_sink(self.model))
        read = MemoryKV.of(read_raw(self.model, self.model.prefix(sink), ids))
        prefix = self.model.prefix(sink, replace(read, span=read.span + _DISTANCE))
        of_entries = torch.cat((sentences.new_full((sink.slots,), -1), sentences))
        sections = dict.fromkeys(range(layers), [of_entries] * kv_heads)
        found = self._shares(list(answers), prefix, sections, len(ends) + 1)
        shares = torch.stack([torch.stack([*of_layers.values()]) for of_layers in found]).cpu()
        told = shares.log()[torch.arange(len(right)), ..., right].mean(0)
        best = told.flatten().topk(min(_HEADS, told.numel())).indices.tolist()
        return [divmod(head, told.shape[1]) for head in best]

    @torch.inference_mode()
    def _shares(
        self, questions: Sequence[str], prefix: Prefix, sections: Sections, count: int
    ) -> list[dict[int, Tensor]]:
        """Return which share of their attention to the memory query heads give to sections, the mean over the question.

        The result has [heads, count] float32 for each question and each layer of `sections`.
        """
        prompts = [chat_prompt(self.model, question, behind_memory=True) for question in questions]
        found: list[dict[int, Tensor]] = [{} for _ in prompts]

        def watch(layer: int, sequence: int, query: Tensor, _own: Tensor, _slots: int, front: Sequence[Block]) -> None:
            if layer in sections:
                found[sequence][layer] = _shares_of(query.float(), front, sections[layer], count)
                if layer == max(sections) and sequence + 1 == len(prompts):
                    raise PassEndedError

        layout = BeaconLayout.build(
            [Piece(Cursor(), [Window.behind(0, prompt)]) for prompt in prompts], self.model.config
        )
        self.model.read(layout, self.model.empty_kv(), [], prefixes=[prefix] * len(prompts), watch=watch)
        return found


def gist_slots(tokens: int) -> int:
    """Return how many slots the gist of documents has, by their tokens: a memory of ratio 8, but of a bounded size."""
    return min(-(-tokens // _GIST_RATIO), _GIST_SLOTS)


def _shares_of(query: Tensor, front: Sequence[Block], sections: Sequence[Tensor], count: int) -> Tensor:
    """Return the shares of each query head, [heads, count]; query: [heads, rows, head_dim], scaled and rotated."""
    groups, shares = len(query) // len(sections), []
    keys = [key.float() for _, of_block, _ in front for key in of_block]
    for head, (key, of_entries) in enumerate(zip(keys, sections, strict=True)):
        section = of_entries.to(key.device)
        weights = query[head * groups : (head + 1) * groups] @ key[section >= 0].T
        received = weights.softmax(-1).mean(1)
        shares.append(received.new_zeros(groups, count).index_add_(1, section[section >= 0], received))
    return torch.cat(shares).clamp(min=_LEAST)


def sections_of_entries(counts: Sequence[Tensor], lowest: Sequence[int], layers: Iterable[int], sink: int) -> Sections:
    """Return the section of each entry of memories of which all sections are loaded in their order, behind a sink.

    counts: of each memory, [sections, LEVELS, layers, kv_heads] entries of each level. lowest: of each section of all
    of them the lowest level loaded. layers: those that are needed. sink: entries of a head that belong to the sink.
    """
    loaded = torch.arange(LEVELS)[None, :] >= torch.tensor(list(lowest))[:, None]
    kept = (torch.cat([*counts]) * loaded[..., None, None]).sum(1)
    numbers = torch.arange(-1, len(kept))
    in_front = torch.full((1, kept.shape[-1]), sink)
    return {
        layer: [numbers.repeat_interleave(head) for head in torch.cat((in_front, kept[:, layer])).T] for layer in layers
    }
