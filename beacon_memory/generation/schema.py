"""Answers that are JSON of a given schema, from any model: tokens that would break it cannot come."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerFast

from beacon_memory.errors import InputError
from beacon_memory.modeling.model import BeaconModel

__all__ = ["SchemaProcessor"]

# As Python and most training texts write JSON, on one line: a small model that may break lines does it without end.
_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class SchemaProcessor(LogitsProcessor):
    """Lets only those tokens come with which an answer goes on as JSON of a schema, or ends when it is whole.

    It belongs in front of all other processors, so that these choose among what may come, and to one answer.

    schema: a JSON schema; {} is any JSON, {"type": "object"} any object.
    prompt: number of tokens of the prompt.

    Raises InputError for what is no schema, for one that asks for what cannot be enforced, and for a tokenizer in
    Python alone.
    """

    def __init__(self, model: BeaconModel, schema: Mapping[str, Any], config: GenerationConfig, prompt: int) -> None:
        tokenizer = _tokenizers.of(model, config)
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_FORM)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"schema={schema!r:.200} is no JSON: {error}") from error
        self._matcher = LLMatcher(tokenizer, grammar)
        if self._matcher.is_error():
            raise InputError(f"schema={schema!r:.200} cannot be met: {self._matcher.get_error():.300}")
        self._read = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [1, vocab] in which tokens that may not come have minus infinity.

        input_ids: [1, tokens], the prompt and the answer so far.
        """
        new = input_ids[0, self._read :].tolist()
        self._read += len(new)
        if not self._matcher.consume_tokens(new):
            raise InputError("these options leave no token with which the answer goes on as the schema wants it")
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        known = min(len(allowed), scores.shape[-1])  # the head may have rows that are no token's
        barred = torch.ones(scores.shape[-1], dtype=torch.bool)
        barred[:known] = ~allowed[:known]
        return scores.masked_fill(barred.to(scores.device), -torch.inf)


class _Tokenizers:
    """Tokenizers of models as the matcher takes them; one takes a second to make."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[BeaconModel, dict[tuple[int, ...], LLTokenizer]] = WeakKeyDictionary()
        self._making = threading.Lock()

    def of(self, model: BeaconModel, config: GenerationConfig) -> LLTokenizer:
        """Return that of a model whose answers end with the tokens that the config names."""
        if not isinstance(model.tokenizer, PreTrainedTokenizerFast):
            raise InputError(f"{type(model.tokenizer).__name__} cannot hold an answer to a schema; a fast one can")
        given = config.eos_token_id
        ends = tuple(given) if isinstance(given, list) else () if given is None else (given,)
        with self._making:
            made = self._made.setdefault(model, {})
            if ends not in made:
                made[ends] = from_tokenizer(model.tokenizer, eos_token=list(ends) or None)
            return made[ends]


_tokenizers = _Tokenizers()
