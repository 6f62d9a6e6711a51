"""Copies share the model; what is pickled holds names alone, and opens store and model again."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_beacon_memory import (
    BeaconChatMessageHistory,
    BeaconMemoryLLM,
    BeaconMemoryMiddleware,
    BeaconMemoryRetriever,
    ChatBeaconMemory,
    behind_history,
    create_memory_chain,
)
from langchain_core.messages import HumanMessage
from tiny_models import tiny_base, tiny_checkpoint, tiny_model, tiny_tokenizer

from beacon_memory import BeaconConfig, BeaconMemory, InputError


def pickled(one: Any) -> Any:
    return pickle.loads(pickle.dumps(one))  # noqa: S301  # our own


copied = pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])


@pytest.fixture
def memory(tmp_path: Path) -> BeaconMemory:
    base = tiny_checkpoint(tmp_path / "base", tiny_base("llama", max_position_embeddings=2048))
    memory = BeaconMemory(tmp_path / "store", base, device="cpu", reserve=100)
    memory.add("roof", "The roof of the barn was mended in March by Ada Flint.", ratio=2)
    return memory


@copied
def test_models_retrievers_and_chains_answer_as_what_they_were_copied_from(
    memory: BeaconMemory, copied: Callable[[Any], Any]
) -> None:
    chat = ChatBeaconMemory(memory=memory, document_ids=["roof"], max_tokens=4)
    retriever = BeaconMemoryRetriever(memory=memory)
    for one in (
        chat,
        chat.bind(stop=["."]),
        BeaconMemoryLLM(memory=memory, document_ids=["roof"], max_tokens=4),
        retriever,
        create_memory_chain(chat, retriever),
    ):
        made, expected = copied(one).invoke("Who mended the roof?"), one.invoke("Who mended the roof?")
        assert getattr(made, "content", made) == getattr(expected, "content", expected)
    chain = copied(create_memory_chain(chat))
    assert asyncio.run(chain.ainvoke("Who mended the roof?")).content == chain.invoke("Who mended the roof?").content


@copied
def test_histories_and_middleware_go_on_with_the_same_store(memory: BeaconMemory, copied: Callable[[Any], Any]) -> None:
    history = BeaconChatMessageHistory("ada", memory)
    copied(history).add_messages([HumanMessage("Who?")])
    assert [message.content for message in history.messages] == ["Who?"]
    chat = ChatBeaconMemory(memory=memory, max_tokens=4)
    config = {"configurable": {"message_history": history}}
    behind = behind_history(chat)
    assert copied(behind).invoke("Who?", config).content == behind.invoke("Who?", config).content
    assert copied(BeaconMemoryMiddleware(BeaconMemoryRetriever(memory=memory))).retriever.searched == ""


def test_a_deep_copy_shares_the_model(memory: BeaconMemory) -> None:
    other = copy.deepcopy({"chat": ChatBeaconMemory(memory=memory)})["chat"]
    assert other.memory.model is memory.model


def test_a_memory_in_a_namespace_with_a_loaded_model_is_pickled_by_its_names(memory: BeaconMemory) -> None:
    opened = BeaconMemory(memory.store.root, memory.model, namespace="alice", reserve=100)
    opened.add("owls", "Two barn owls nest above the hayloft.", ratio=2)
    assert len(pickle.dumps(opened)) < 2000
    with pickled(opened) as again:
        assert [row.id for row in again.list()] == ["owls"]
        assert again.model is not memory.model
        assert again.ask("Who?", "owls", max_new_tokens=4).text == opened.ask("Who?", "owls", max_new_tokens=4).text


def test_a_memory_of_a_model_without_a_name_cannot_be_pickled(tmp_path: Path) -> None:
    model = tiny_model("llama", BeaconConfig(beacon_window=32), tokenizer=tiny_tokenizer())
    with pytest.raises(InputError, match=r"has no name under which .* BeaconModel\.from_pretrained to pickle"):
        pickle.dumps(ChatBeaconMemory(memory=BeaconMemory(tmp_path, model)))
