"""A question that is ready to be answered: its documents are chosen and loaded, and its prompt is made."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from beacon_memory.generation.generate import Generation, Request
from beacon_memory.generation.tool_calls import read_answer

from .question import Question
from .recall import Portion
from .results import NOT_IN_MEMORY, Answer, Evidence, LoadedDocument, Usage

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["Asked"]


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A question that is ready to be answered, and what its answer will tell of.

    loaded:    what was loaded of documents; `documents` tells what that took.
    said:      how many tokens were said before the question and stand in front of what was loaded, not in the prompt.
    evidence:  what speaks for an answer before there is one.
    started:   when it was asked, in seconds on the clock of time.perf_counter.
    """

    question: Question
    loaded: Sequence[Portion]
    documents: tuple[LoadedDocument, ...]
    said: int
    evidence: Evidence | None
    request: Request
    config: GenerationConfig
    tokenizer: Any
    started: float

    @property
    def refused(self) -> Answer | None:
        """The answer to a question that is abstained from before anything is generated; None to any other."""
        if not self.question.abstain or self.evidence is None or self.evidence.relevant:
            return None
        return self.answer(Generation((), NOT_IN_MEMORY, time.perf_counter()))

    def shown(self, piece: str | Generation | None) -> Iterator[str | Answer]:
        """Yield what a stream shows for a piece of the generated text, or for all of it; None: nothing is generated."""
        if isinstance(piece, str):
            if not self.question.abstain:  # else it is only known at the end whether it is the answer
                yield piece
            return
        answer = self.refused if piece is None else self.answer(piece)
        if answer is not None:
            if self.question.abstain:
                yield answer.text
            yield answer

    def answer(self, generation: Generation) -> Answer:
        """Return the answer of which a text was generated."""
        now = time.perf_counter()
        parts = read_answer(
            self.tokenizer,
            generation.text,
            generation.tokens,
            prompt=self.request.prompt,
            stops=self.config.stop_strings or (),
            tools=self.question.tools,
        )
        evidence = self.evidence
        if evidence is not None and generation.likelihoods:
            evidence = replace(evidence, likelihood=math.exp(fmean(generation.likelihoods)))
        slots, prompt = self.request.memory.slots - self.said, len(self.request.prompt) + self.said
        answer = Answer(
            text=generation.text,
            parts=parts,
            ids=tuple(one.row.id for one in self.loaded),
            usage=Usage(slots, prompt, len(generation.tokens), self.documents),
            time_to_first_token=generation.first_token_at - self.started,
            seconds=now - self.started,
            sources=tuple(source for one in self.loaded for source in one.sources),
            evidence=evidence,
            ended=generation.ended,
        )
        if self.question.abstain and answer.supported is False:
            return replace(answer, text=NOT_IN_MEMORY, parts=(NOT_IN_MEMORY,), ended=True)
        return answer
