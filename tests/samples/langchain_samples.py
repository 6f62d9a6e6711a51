"""Tiny chat models for the LangChain adapter: one that babbles, and one that was taught what to answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from langchain_beacon_memory.messages import to_turns
from langchain_core.messages import BaseMessage
from langchain_core.utils.function_calling import convert_to_openai_tool
from tiny_models import BOS, EOS, SPECIAL, VOCAB, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from beacon_memory import BeaconMemory
from beacon_memory.config import BeaconConfig
from beacon_memory.modeling.model import BeaconModel

ROOF = "The roof of the barn was mended in March by Ada Flint, who used larch boards.\n\n"
WELL = "The well behind the mill is forty feet deep. Its water tastes of iron.\n\n"
OWLS = "Two barn owls nest above the hayloft every spring and leave in October.\n\n"

# After the template of Qwen2.5: tools in the system turn, calls as <tool_call>, their results as <tool_response>.
HERMES = """
{{- bos_token }}
{%- if tools %}<|system|>{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n{% endif %}# Tools
<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>
<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>{{ eos_token }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'tool' %}<|user|><tool_response>\n{{ message['content'] }}\n</tool_response>{{ eos_token }}
{%- elif message['role'] != 'system' or not tools %}<|{{ message['role'] }}|>{{ message['content'] }}
{%- for call in message['tool_calls'] or [] %}{% set function = call['function'] %}
<tool_call>\n{"name": "{{ function['name'] }}", "arguments": {{ function['arguments'] | tojson }}}\n</tool_call>
{%- endfor %}{{ eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

Lesson = tuple[Sequence[BaseMessage], Sequence[Any], str]  # a conversation, tools, and what to answer


def babbling_model(template: str | None = None, max_position_embeddings: int = 4096) -> BeaconModel:
    """A random model: what it says depends on every token that it reads."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    settings = BeaconConfig(beacon_window=32)
    return tiny_model("llama", settings, tokenizer=tokenizer, max_position_embeddings=max_position_embeddings)


def filled_memory(folder: Path, model: BeaconModel) -> BeaconMemory:
    """Three documents outside all namespaces."""
    memory = BeaconMemory(folder, model, reserve=100)
    memory.add_many([("roof", ROOF), ("well", WELL), ("owls", OWLS)], ratio=2)
    return memory


def in_words(memory: BeaconMemory) -> dict[str, Any]:
    """Options that make a babbling model write words, with spaces between them, and go on until it is stopped."""
    kept = memory.model.tokenizer("abcde ", add_special_tokens=False)["input_ids"]
    return {"suppress_tokens": [token for token in range(VOCAB) if token not in kept], "eos_token_id": None}


def calling(name: str, **arguments: Any) -> str:
    """An answer that calls a tool."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def taught_model(lessons: Sequence[Lesson]) -> BeaconModel:
    """A tiny model that knows some lessons by heart, with the chat template HERMES."""
    texts = [text for lesson in lessons for text in _texts(*lesson)]
    tokenizer = _tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rows = [_row(tokenizer, *lesson) for lesson in lessons]
    longest = max(len(prompt) + len(answered) for prompt, answered in rows)
    ids = torch.tensor([[*prompt, *answered, *[0] * (longest - len(prompt + answered))] for prompt, answered in rows])
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answered) in enumerate(rows):
        wanted[row, len(prompt) : len(prompt + answered)] = True
    optimizer = torch.optim.AdamW(base.parameters(), lr=4e-3)
    for _ in range(400):
        states = base.model(input_ids=ids).last_hidden_state[:, :-1][wanted[:, 1:]]
        loss = torch.nn.functional.cross_entropy(base.lm_head(states), ids[wanted])
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return BeaconModel(base, BeaconConfig(beacon_window=32), tokenizer=tokenizer).eval()  # freezes the base


def _texts(messages: Sequence[BaseMessage], tools: Sequence[Any], answer: str) -> list[str]:
    schemas = [json.dumps(convert_to_openai_tool(tool)) for tool in tools]
    return [*schemas, *(str(message.content) for message in messages), answer]


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that needs few tokens for these texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = HERMES
    return tokenizer


def _row(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[BaseMessage], tools: Sequence[Any], answer: str
) -> tuple[list[int], list[int]]:
    """The tokens of a lesson: those of the prompt, and those of the answer."""
    turns = to_turns(messages)
    schemas: list[Any] = [convert_to_openai_tool(tool) for tool in tools]
    text = tokenizer.apply_chat_template(turns, tools=schemas, add_generation_prompt=True, tokenize=False)
    return tokenizer(text)["input_ids"], [*tokenizer(answer)["input_ids"], EOS]
