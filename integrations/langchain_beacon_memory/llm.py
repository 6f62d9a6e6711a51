"""BeaconMemoryLLM: text in, text out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from langchain_core.caches import BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import Field

from beacon_memory import Answer
from beacon_memory.generation.background import in_background

from .language_model import BeaconLanguageModel, response_metadata, usage_metadata

__all__ = ["BeaconMemoryLLM"]


class BeaconMemoryLLM(BeaconLanguageModel, BaseLLM, extra="forbid"):
    """A plain language model in front of which stored documents are loaded; a prompt is one question.

    LangChain's cache of answers is off unless it is asked for: for plain models its key cannot tell the versions of a
    document apart. `ChatBeaconMemory` has no such limit.
    """

    cache: BaseCache | bool | None = Field(default=False, exclude=True)

    @property
    def _llm_type(self) -> str:
        return "beacon-memory"

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002  # the base class names it
        **kwargs: Any,
    ) -> LLMResult:
        options = self._options(stop, kwargs)
        with self._asked(kwargs) as memory:
            answers = [memory.ask(prompt, **options) for prompt in prompts]
        return LLMResult(generations=[[Generation(text=one.text, generation_info=self._info(one))] for one in answers])

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        seen = shown = ""
        with self._asked(kwargs) as memory:
            for piece in memory.stream(prompt, **self._options(stop, kwargs)):
                seen = piece.text if isinstance(piece, Answer) else seen + piece
                new, shown = seen.strip().removeprefix(shown), seen.strip()
                info = self._info(piece) if isinstance(piece, Answer) else None
                if new or info:
                    chunk = GenerationChunk(text=new, generation_info=info)
                    if run_manager:
                        run_manager.on_llm_new_token(new, chunk=chunk)
                    yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        async with aclosing(in_background(lambda: self._stream(prompt, stop, **kwargs))) as chunks:
            async for chunk in chunks:
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _info(self, answer: Answer) -> dict[str, Any]:
        return {**response_metadata(answer, self.model), "usage_metadata": usage_metadata(answer)}
