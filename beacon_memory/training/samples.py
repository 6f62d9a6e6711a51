"""Training samples: documents, and the tokens that are predicted from their memories."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from beacon_memory.errors import ConfigError, InputError
from beacon_memory.generation.prompt import chat_prompt
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.text_tokens import text_tokens

from .recipe import DataSource, Recipe, Stage
from .rows import Context, Rows, contexts_by_title, load_rows, texts

__all__ = ["Branch", "Loaded", "Sample", "SampleSet"]

CHARS_PER_TOKEN = 6  # a text of n tokens is shorter than this times n
_BLIND = 2  # selected memories that the questions on one document share
_LEAST_ZOOM = 2  # the ratio of the memory that passages are loaded from


@dataclass(frozen=True, slots=True)
class Loaded:
    """How much of a selected memory is loaded for a branch: tokens / ratio slots; 0 loads everything.

    question: the passages that match it are loaded whole, best first; without one, the best entries of all the text.
    """

    ratio: int
    question: str = ""


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens that follow a memory: ids[:labelled] are given, ids[labelled:] are predicted.

    loaded: of a selected memory, what the tokens follow; None where branches follow the memory as the sample's ratios
            leave it.
    """

    ids: tuple[int, ...]
    labelled: int
    loaded: Loaded | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One document, and the tokens that are predicted from its memory.

    kind:       kind of its source, `text` or `qa`.
    parts:      token ids of its parts. Each is compressed on its own; their memories follow each other in this order.
    ratios:     for each part the ratio of each of its windows.
    branches:   token sequences that follow the memory, in parallel.
    label_text: whether the raw tokens of the parts are predicted too, each window from the memory of those before it.
    """

    kind: str
    parts: tuple[tuple[int, ...], ...]
    ratios: tuple[tuple[int, ...], ...]
    branches: tuple[Branch, ...]
    label_text: bool = False

    @property
    def ratio(self) -> int | None:
        """Return the ratio of its windows, or None if they have different ones."""
        found = {branch.loaded.ratio for branch in self.branches if branch.loaded is not None} or {
            ratio for part in self.ratios for ratio in part
        }
        return found.pop() if len(found) == 1 else None


class SampleSet(Dataset[Sample]):
    """The samples of one stage.

    Sample i depends only on recipe, data and i, so a run that is resumed sees the same samples as one that was not
    interrupted. Every sample has tokens to predict. Raises InputError, with file and line, for unusable data.
    """

    def __init__(self, model: BeaconModel, recipe: Recipe, stage: Stage, folder: Path, size: int) -> None:
        self.model, self.stage, self.size = model, stage, size
        self.seed = f"{recipe.seed} {stage.name}"
        self.ratios = stage.ratios or model.config.beacon_ratio
        # every document follows the sink; without a sink, it begins with the tokenizer's bos, if there is one
        self.lead = [] if model.sink_ids else model.leading_bos
        window = model.config.beacon_window
        if stage.compression == "hybrid" and model.config.beacon_attn != "hidden":
            raise ConfigError(f"compression='hybrid' of stage {stage.name!r} needs beacon_attn='hidden'")
        if stage.compression == "hybrid" and len(self.lead) + stage.tokens[1] > window:
            raise ConfigError(
                f"tokens={list(stage.tokens)} of stage {stage.name!r} must fit beacon_window={window}: hybrid memories "
                "are trained on documents of one window"
            )
        self.draws = [self._source(source, folder) for source in stage.data]
        self.weights = [source.weight for source in stage.data]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        rng = random.Random(f"{self.seed} {index}")
        draw = rng.choices(self.draws, self.weights)[0]
        return draw(rng)

    def _source(self, source: DataSource, folder: Path) -> Callable[[random.Random], Sample]:
        rows = load_rows(source, folder)
        return self._text_source(source, rows) if source.kind == "text" else self._question_source(source, rows)

    def _text_source(self, source: DataSource, rows: Rows) -> Callable[[random.Random], Sample]:
        among = _some(texts(rows, source.where), source, rows)
        found = [text for text in among if self._long_enough(text)]
        if not found:
            raise InputError(
                f"{rows.name}: no text is as long as the {self._shortest} tokens that a sample of stage "
                f"{self.stage.name!r} needs"
            )
        lengths = list(accumulate(map(len, found)))
        return lambda rng: self._text(rng, rng.choices(found, cum_weights=lengths)[0])

    def _question_source(self, source: DataSource, rows: Rows) -> Callable[[random.Random], Sample]:
        titles = _some(list(contexts_by_title(rows, source.where).values()), source, rows)
        chat_prompt(self.model, "?", behind_memory=True)  # refuses a tokenizer without a chat template
        if self.model.tokenizer.eos_token_id is None:
            raise InputError("the model's tokenizer has no eos token, which answers end with")
        questions = list(accumulate(sum(len(context.questions) for context in title) for title in titles))
        return lambda rng: self._questions(rng, rng.choices(titles, cum_weights=questions)[0])

    @property
    def _shortest(self) -> int:
        return max(2, self.stage.tokens[0] + (0 if self.stage.label_text else self.stage.continuation))

    def _long_enough(self, text: str) -> bool:
        return len(text) >= CHARS_PER_TOKEN * self._shortest or len(self._tokens(text)) >= self._shortest

    def _tokens(self, text: str) -> list[int]:
        return text_tokens(self.model.tokenizer, text)[0]

    def _text(self, rng: random.Random, text: str) -> Sample:
        """Draw a part of a text; the tokens after it are predicted from its memory."""
        wanted = rng.randint(*self.stage.tokens) + self.stage.continuation
        at = rng.randrange(max(1, len(text) - CHARS_PER_TOKEN * wanted))
        at = text.find(" ", at) + 1 if at else 0
        ids = self._tokens(text[at : at + CHARS_PER_TOKEN * wanted])[:wanted]
        if len(ids) < min(wanted, 3):  # if the next space was at the end of the text
            ids = self._tokens(text)[:wanted]
        split = max(1, len(ids) - self.stage.continuation)
        parts = self._split(rng, [[id] for id in ids[:split]])
        (loaded,) = self._blind(rng, 1)
        branches = (Branch(tuple(ids[split:]), 1, loaded),) if len(ids) > split + 1 else ()
        return Sample("text", parts, self._ratios(rng, parts), branches, self.stage.label_text)

    def _questions(self, rng: random.Random, title: Sequence[Context]) -> Sample:
        """Draw contexts of one title, in random order, and questions about them."""
        room = rng.randint(*self.stage.tokens)
        chosen: list[Context] = []
        pieces: list[list[int]] = []
        for context in rng.sample(title, len(title)):
            ids = self._tokens(context.text if not pieces else "\n" + context.text)
            if pieces and len(ids) > room:
                break
            pieces.append(ids[: self.stage.tokens[1]])
            chosen.append(context)
            room -= len(ids)
        parts = self._split(rng, pieces)
        questions = [question for context in chosen for question in context.questions]
        branches, blind = [], self._blind(rng, _BLIND)
        for question in rng.sample(questions, min(len(questions), self.stage.branches)):
            prompt = chat_prompt(self.model, question.question, behind_memory=True)
            answer = [*self._tokens(rng.choice(question.answers)), self.model.tokenizer.eos_token_id]
            loaded = rng.choice(blind)
            if self.stage.zoomed and rng.random() < self.stage.zoomed:
                loaded = Loaded(rng.choice([ratio for ratio in self.ratios if ratio > _LEAST_ZOOM]), question.question)
            branches.append(Branch((*prompt, *answer), len(prompt), loaded))
        return Sample("qa", parts, self._ratios(rng, parts), tuple(branches))

    def _split(self, rng: random.Random, pieces: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """Join pieces to one or more parts; each part begins with the beginning of a piece."""
        count = min(rng.choice(self.stage.parts), len(pieces))
        cuts = [0, *sorted(rng.sample(range(1, len(pieces)), count - 1)), len(pieces)]
        return tuple(
            (*self.lead, *(id for piece in pieces[start:stop] for id in piece)) for start, stop in pairwise(cuts)
        )

    def _blind(self, rng: random.Random, count: int) -> list[Loaded | None]:
        """Draw what questions share that do not load passages of their own."""
        if self.stage.compression != "select":
            return [None]
        return [Loaded(ratio) for ratio in rng.choices(self.ratios, k=count)]

    def _ratios(self, rng: random.Random, parts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        if self.stage.compression == "select":
            return ()  # of each branch
        window = self.model.config.beacon_window
        counts = [-(-len(part) // window) for part in parts]
        if self.stage.ratio_per == "document":
            ratio = rng.choice(self.ratios)
            return tuple((ratio,) * count for count in counts)
        return tuple(tuple(rng.choices(self.ratios, k=count)) for count in counts)


def _some(found: list[Any], source: DataSource, rows: Rows) -> list[Any]:
    """Return the rows that were found; raises InputError if there are none."""
    if not found:
        raise InputError(f"{rows.name}: there are no rows{f' with {dict(source.where)}' if source.where else ''}")
    return found
