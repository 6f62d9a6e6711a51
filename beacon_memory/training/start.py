"""The model that a training run starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from beacon_memory.config import BeaconConfig
from beacon_memory.errors import ConfigError, ModelError
from beacon_memory.modeling.adapter import Adapter, read_adapter
from beacon_memory.modeling.default_model import default_adapter, ensure_default_model
from beacon_memory.modeling.loading import load_base
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.modeling.text_tokens import text_tokens

from .lora import answering_parameters, inject_answers, inject_lora, lora_parameters
from .recipe import Recipe, SalienceRecipe
from .rows import Context, contexts_by_title, load_rows, texts

__all__ = ["start_model", "token_salience", "token_starts_word", "trained_parameters"]

_SPACE_MARKS = "ĠĊ▁"  # how byte-level BPE and SentencePiece write a space or a line end
_PRIOR = 20  # occurrences of each token that are assumed beside those in the data


def start_model(recipe: Recipe, recipe_folder: Path, data: Path, device: str | None = None) -> BeaconModel:
    """Load base, beacons and LoRA for the first step of a recipe; parameters that are trained are in float32.

    For salient placement, the salience of tokens comes from the recipe, else from the adapter, else from counting the
    tokens in the data of all stages. Raises ConfigError if adapter, LoRA and settings do not fit each other.
    """
    base, tokenizer = load_base(recipe.base or ensure_default_model(), device, getattr(torch, recipe.dtype))
    if tokenizer is None:
        raise ModelError(f"the base model {recipe.base!r} has no tokenizer, which training on text needs")
    source = _source(recipe, recipe_folder)
    tokenizer.chat_template = recipe.chat_template or source.chat_template or tokenizer.chat_template
    config = recipe.beacon_config(source.config)
    salience, starts_word = source.token_salience, source.token_starts_word
    if config.beacon_placement != "end":
        vocab = base.config.vocab_size
        if salience is None or recipe.salience is not None:
            every = SalienceRecipe(data=tuple(source for stage in recipe.stages for source in stage.data))
            salience = token_salience(tokenizer, recipe.salience or every, data, vocab)
        starts_word = token_starts_word(tokenizer, vocab) if starts_word is None else starts_word
    model = BeaconModel(
        base,
        config,
        token_salience=salience,
        token_starts_word=starts_word,
        tokenizer=tokenizer,
        lora=source.lora if recipe.lora is None else None,
        answers=source.answers if recipe.answers is not None else None,
    )
    if source.tensors:
        model.set_beacon_parameters(source.tensors)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        if recipe.lora is not None:
            inject_lora(model, recipe.lora, source.lora)
        if recipe.answers is not None:
            inject_answers(model, recipe.answers, source.answers)
    model.requires_grad_(False)
    for _, parameter in trained_parameters(model):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return model


def _source(recipe: Recipe, recipe_folder: Path) -> Adapter:
    """Return the adapter to start from; it has settings but no parameters if the recipe names none."""
    if recipe.adapter is None:
        return Adapter(recipe.beacon_config(BeaconConfig()))
    source = read_adapter(default_adapter() if recipe.adapter == "default" else recipe_folder / recipe.adapter)
    if source.lora is not None and recipe.lora is None and recipe.answers is None:
        raise ConfigError(f"the adapter {recipe.adapter!r} has a LoRA, so the recipe needs a [lora] of its shape")
    return source


def trained_parameters(model: BeaconModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield all parameters that training changes: those of the LoRA of answers alone, or of the beacons and a LoRA."""
    answering = [*answering_parameters(model.base)]
    if answering:
        yield from answering
        return
    yield from model.named_beacon_parameters()
    yield from lora_parameters(model.base)


def token_salience(tokenizer: PreTrainedTokenizerBase, recipe: SalienceRecipe, folder: Path, vocab: int) -> Tensor:
    """Return how informative each token is, [vocab]: -log p(token) + answer_weight log(p(answer | token) / p(answer)).

    p(token) is the token's share of the data, where every token counts once more than it was seen. p(answer | token) is
    how often the token, where it is seen in a context, is part of an answer to one of the questions about it. To have a
    value for rare tokens too, `_PRIOR` more occurrences with the mean rate p(answer) are added for every token.
    """
    counts, seen, answering = (torch.zeros(vocab) for _ in range(3))

    def count(into: Tensor, ids: list[int]) -> None:
        into += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=vocab)

    for source in recipe.data:
        rows = load_rows(source, folder)
        if source.kind == "text":
            for text in texts(rows, source.where):
                count(counts, text_tokens(tokenizer, text)[0])
            continue
        for context in (one for title in contexts_by_title(rows, source.where).values() for one in title):
            ids, offsets = text_tokens(tokenizer, context.text)
            count(counts, ids)
            count(seen, ids)
            count(answering, _in_answers(context, ids, offsets))
    information = -((counts + 1) / (counts + 1).sum()).log()
    if not (recipe.answer_weight and answering.sum()):
        return information
    mean = answering.sum() / seen.sum()
    return information + recipe.answer_weight * ((answering + _PRIOR * mean) / (seen + _PRIOR) / mean).log()


def _in_answers(context: Context, ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
    """Return the tokens of a context that are part of an answer to one of its questions, where it is quoted there."""
    text = context.text.lower()
    answers = {answer.lower() for question in context.questions for answer in question.answers}
    spans = [(start, start + len(answer)) for answer in answers if (start := text.find(answer)) >= 0]
    return [
        token
        for token, (first, last) in zip(ids, offsets, strict=True)
        if any(first < stop and last > start for start, stop in spans)
    ]


def token_starts_word(tokenizer: PreTrainedTokenizerBase, vocab: int) -> Tensor:
    """Return which tokens begin a word, [vocab] bool.

    These are tokens that begin with a space or with a character that is neither a letter nor a digit.
    """
    pieces: Any = tokenizer.convert_ids_to_tokens(list(range(min(vocab, len(tokenizer)))))  # None: no such id
    starts = [piece is None or not piece[:1].isalnum() or piece[0] in _SPACE_MARKS for piece in pieces]
    return torch.tensor(starts + [True] * (vocab - len(starts)))
