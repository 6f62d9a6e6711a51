"""The part that the chat model and the plain model share: which memory a call asks, and with which options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from pydantic import BaseModel, ConfigDict, Field, model_validator

from beacon_memory import Answer, BeaconMemory
from beacon_memory.modeling.text_tokens import text_tokens

__all__ = ["BeaconLanguageModel", "response_metadata", "usage_metadata"]

_OF_SERVICES = (
    "api_key",
    "base_url",
    "max_retries",
    "timeout",
)  # LangChain's standard parameters, no use for a local model
_NOT_OPTIONS = ("document_ids", "namespace", "stream")


class BeaconLanguageModel(BaseModel):
    """A model in front of which stored documents are loaded.

    memory:       store and model; chains, retrievers and histories of one program share it.
    document_ids: documents to answer from, loaded in this order; none by default. None lets the memory's picker find
                  some for the last question, as `BeaconMemory.ask` does.
    namespace:    where the documents are; by default the memory's own namespace.
    budget:       how much of their memories is loaded, where the question is; see `BeaconMemory.ask`.
    abstain:      whether to answer that it is not in memory where an answer is not supported; likewise.
    max_tokens:   of an answer. temperature, top_p, seed: of sampling. stop: strings at which an answer ends.
    model_kwargs: further options of transformers' `generate`.
    model:        the name of the model in traces.

    Each of them but `memory`, `model_kwargs` and `model` may be given with a call, too, where it comes first:
    `invoke(..., document_ids=[...])`; so may other options of `generate`. They only ever come from the program: nothing
    in a message can name a document or a namespace.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    memory: BeaconMemory = Field(exclude=True, repr=False)
    document_ids: Sequence[str] | None = ()
    namespace: str | None = None
    budget: int | str | None = None
    abstain: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    model: str = "beacon-memory"

    @model_validator(mode="before")
    @classmethod
    def _without_parameters_of_services(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {name: value for name, value in values.items() if name not in _OF_SERVICES}

    def _asked(self, options: Mapping[str, Any]) -> AbstractContextManager[BeaconMemory]:
        """Open the memory in the namespace that a call is about."""
        namespace = options.get("namespace")
        return self.memory.in_namespace(self.namespace if namespace is None else namespace)

    def _options(self, stop: Sequence[str] | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of `BeaconMemory.ask` for a call."""
        own = {
            name: getattr(self, name) for name in ("budget", "abstain", "max_tokens", "temperature", "top_p", "seed")
        }
        chosen = self.model_kwargs | {name: value for name, value in own.items() if value is not None} | dict(options)
        if (most := chosen.pop("max_tokens", None)) is not None:
            chosen["max_new_tokens"] = most
        asked = {name: value for name, value in chosen.items() if name not in _NOT_OPTIONS}
        return asked | {"ids": options.get("document_ids", self.document_ids), "stop": stop or self.stop}

    @property
    def _identifying_params(self) -> dict[str, Any]:
        own = ("model", "namespace", "document_ids", "budget", "abstain")
        names = (*own, "max_tokens", "temperature", "top_p", "seed", "stop")
        of_store = {"store": self.memory.store.place, "store_namespace": self.memory.store.namespace}
        return {**of_store, **{name: getattr(self, name) for name in names}, **self.model_kwargs}

    def get_token_ids(self, text: str) -> list[int]:
        """Return the tokens of a text, by the model's own tokenizer."""
        return text_tokens(self.memory.model.tokenizer, text)[0]


def usage_metadata(answer: Answer) -> UsageMetadata:
    """Return the tokens of an answer; memory slots count as tokens of the prompt that were read from a cache."""
    usage = answer.usage
    return UsageMetadata(
        input_tokens=usage.slots + usage.prompt_tokens,
        output_tokens=usage.generated_tokens,
        total_tokens=usage.slots + usage.prompt_tokens + usage.generated_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.slots),
    )


def response_metadata(answer: Answer, model: str) -> dict[str, Any]:
    """Return the documents and passages that an answer rests on, and how long it took."""
    return {
        "model_name": model,
        "document_ids": list(answer.ids),
        "time_to_first_token": answer.time_to_first_token,
        "seconds": answer.seconds,
        "sources": [asdict(source) for source in answer.sources],
        "supported": answer.supported,
    }
