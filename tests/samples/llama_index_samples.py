"""What the tests of the LlamaIndex components share: tiny models, one of which can be made to say something."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from llama_index_beacon_memory import BeaconMemoryLLM
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory import BeaconMemory
from beacon_memory.config import BeaconConfig
from beacon_memory.modeling.model import BeaconModel

ROOF = "The roof of the barn was mended in March by Ada Flint, who used larch boards."
WELL = "The well behind the mill is forty feet deep. Its water tastes of iron."
OWLS = "Two barn owls nest above the hayloft every spring and leave in October."

_TOOLS = (
    "{{ bos_token }}{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "<tool_call></tool_call>{{ eos_token }}{% endif %}"
    "{% for message in messages %}<|{{ message.role if message.role != 'tool' else 'user' }}|>"
    "{{ message.content }}{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def model(tools: bool = False, weights: int = 0) -> BeaconModel:
    """A tiny model, with a chat template that has a place for tools or has none."""
    tokenizer = tiny_tokenizer()
    if tools:
        tokenizer.chat_template = _TOOLS
    settings = BeaconConfig(beacon_window=32)
    return tiny_model("llama", settings, tokenizer=tokenizer, max_position_embeddings=4096, seed=weights)


def make_llm(folder: Path, *, tools: bool = False, weights: int = 0, **fields: Any) -> BeaconMemoryLLM:
    """A model with short answers on a store in this folder."""
    memory = BeaconMemory(folder, model(tools, weights), reserve=100)
    return BeaconMemoryLLM(memory=memory, **{"max_tokens": 8, **fields})


def saying(text: str) -> dict[str, Any]:
    """Fields of a BeaconMemoryLLM that have its model answer with this text: each token has to follow those before."""
    tokenizer = model(False, 0).tokenizer
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    bias = [[ids[: n + 1], 1000.0 * (n + 1)] for n in range(len(ids))]
    return {"max_tokens": len(ids), "generate_kwargs": {"sequence_bias": bias}}
