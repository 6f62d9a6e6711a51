"""Middleware of agents: which documents a run loads, and conversations of bounded size."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain.agents import create_agent
from langchain_beacon_memory import (
    BeaconChatMessageHistory,
    BeaconHistoryMiddleware,
    BeaconMemoryMiddleware,
    BeaconMemoryRetriever,
    ChatBeaconMemory,
)
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import tool
from langchain_samples import Lesson, babbling_model, calling, filled_memory, taught_model
from langgraph.checkpoint.memory import InMemorySaver

from beacon_memory import BeaconMemory, DocumentNotFoundError, InputError
from beacon_memory.modeling.model import BeaconModel


@dataclass
class User:
    """What a program knows of whoever asks."""

    name: str


class Counting(BaseRetriever):
    """An index that counts how often it is asked."""

    asked: list[str]

    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        self.asked.append(query)
        return [Document("x", metadata={"document_id": "owls"})]


@tool
def look_up(place: str) -> str:
    """What is known of a place."""
    return f"The {place} is forty feet deep."


CALL: Any = {"name": "look_up", "args": {"place": "well"}, "id": "call_1", "type": "tool_call"}
DEEP = "The well is forty feet deep."


@pytest.fixture(scope="module")
def babbling() -> BeaconModel:
    return babbling_model()


@pytest.fixture(scope="module")
def calling_model() -> Iterator[BeaconModel]:
    asked = HumanMessage("How deep is the well?")
    lessons: list[Lesson] = [
        ([asked], [look_up], calling("look_up", place="well")),
        ([asked, AIMessage("", tool_calls=[CALL]), ToolMessage(DEEP, tool_call_id="call_1")], [look_up], "Forty feet."),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield taught_model(lessons)
    torch.set_num_threads(threads)


@pytest.fixture
def memory(babbling: BeaconModel, tmp_path: Path) -> BeaconMemory:
    memory = filled_memory(tmp_path, babbling)
    memory.within("alice").add("diary", "Alice counts the owls of the barn.", ratio=2)
    memory.within("bob").add("diary", "Bob keeps the key to the cellar.", ratio=2)
    return memory


@pytest.fixture
def model(memory: BeaconMemory) -> ChatBeaconMemory:
    return ChatBeaconMemory(memory=memory, max_tokens=6, temperature=0)


def ask(agent: Any, question: str, config: Any = None, **options: Any) -> Any:
    given = {name: options.pop(name) for name in ("document_ids",) if name in options}
    return agent.invoke({"messages": [HumanMessage(question)], **given}, config, **options)


def loaded(state: Any) -> list[str]:
    ids: list[str] = state["messages"][-1].response_metadata["document_ids"]
    return ids


async def test_run_loads_what_is_found_or_what_it_is_given(memory: BeaconMemory, model: ChatBeaconMemory) -> None:
    agent: Any = create_agent(model, middleware=[BeaconMemoryMiddleware(BeaconMemoryRetriever(memory=memory))])
    state = ask(agent, "How deep is the well?")
    expected = memory.ask("How deep is the well?", ["well"], max_new_tokens=6, temperature=0)
    assert (state["messages"][-1].content, loaded(state)) == (expected.text, ["well"])
    assert set(state) == {"messages"}
    assert loaded(ask(agent, "How deep is the well?", document_ids=["roof", "owls"])) == ["roof", "owls"]
    assert loaded(ask(agent, "How deep is the well?", document_ids=[])) == []
    assert loaded(ask(agent, "Zebras?")) == []
    given = {"messages": [HumanMessage("How deep is the well?")]}
    assert loaded(await agent.ainvoke(given)) == ["well"]
    assert loaded(await agent.ainvoke({**given, "document_ids": ["owls"]})) == ["owls"]


def test_documents_of_the_model_stay_in_front(memory: BeaconMemory) -> None:
    model = ChatBeaconMemory(memory=memory, max_tokens=6, document_ids=["roof"])
    agent = create_agent(model, middleware=[BeaconMemoryMiddleware(BeaconMemoryRetriever(memory=memory))])
    assert loaded(ask(agent, "How deep is the well?")) == ["roof", "well"]
    assert loaded(ask(agent, "Who mended the roof?")) == ["roof"]
    assert model.document_ids == ["roof"]


def test_documents_that_do_not_fit_together_are_loaded_in_part(tmp_path: Path) -> None:
    memory = BeaconMemory(tmp_path, babbling_model(max_position_embeddings=512), reserve=60)
    memory.add_many([("one", "owl " * 100), ("two", "owl " * 110), ("three", "owl " * 20)], ratio=2)
    model = ChatBeaconMemory(memory=memory, max_tokens=6, temperature=0, document_ids=["three"])
    agent: Any = create_agent(model, middleware=[BeaconMemoryMiddleware(BeaconMemoryRetriever(memory=memory))])
    best = memory.pick("Which owl?", 2)
    assert sum(pick.row.slots for pick in best) < 512
    state = ask(agent, "Which owl? " + "Well? " * 10)
    assert loaded(state)[0] == "three"
    assert set(loaded(state)) == {"one", "two", "three"}
    state = ask(agent, "Which owl? " + "Well? " * 10, document_ids=["one", "two", "three"])
    assert loaded(state) == ["three", "one", "two"]  # the model's own comes first


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_all_model_calls_of_a_run_load_the_documents_that_were_found_once(
    calling_model: BeaconModel, tmp_path: Path, asynchronous: bool
) -> None:
    memory = filled_memory(tmp_path, calling_model)
    model = ChatBeaconMemory(memory=memory, max_tokens=60, temperature=0)
    index = Counting(asked=[])
    middleware = BeaconMemoryMiddleware(BeaconMemoryRetriever(memory=memory, inner=index))
    agent: Any = create_agent(model, [look_up], middleware=[middleware])
    question = {"messages": [HumanMessage("How deep is the well?")]}
    state = await agent.ainvoke(question) if asynchronous else agent.invoke(question)
    answers = [message for message in state["messages"] if message.type == "ai"]
    assert [answer.response_metadata["document_ids"] for answer in answers] == [["owls"]] * len(answers)
    assert len(answers) == 2
    assert index.asked == ["How deep is the well?"]


def test_thread_of_a_checkpointer_picks_anew_for_every_run(memory: BeaconMemory, model: ChatBeaconMemory) -> None:
    agent = create_agent(
        model,
        middleware=[BeaconMemoryMiddleware(BeaconMemoryRetriever(memory=memory))],
        checkpointer=InMemorySaver(),
    )
    config = {"configurable": {"thread_id": "1"}}
    assert loaded(ask(agent, "How deep is the well?", config)) == ["well"]
    assert loaded(ask(agent, "Who mended the roof?", config)) == ["roof"]


@pytest.mark.parametrize("fails", [False, True])
async def test_documents_that_a_run_was_given_are_not_those_of_the_next(
    memory: BeaconMemory, model: ChatBeaconMemory, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent: Any = create_agent(
        model,
        middleware=[BeaconMemoryMiddleware(BeaconMemoryRetriever(memory=memory))],
        checkpointer=InMemorySaver(),
    )
    config = {"configurable": {"thread_id": "1"}}
    with monkeypatch.context() as patched:
        if fails:
            patched.setattr(BeaconMemory, "ask", lambda *_, **__: pytest.fail("out of memory"))
            with pytest.raises(pytest.fail.Exception):
                ask(agent, "How deep is the well?", config, document_ids=["owls"])
        else:
            state = ask(agent, "How deep is the well?", config, document_ids=["owls"])
            assert (loaded(state), set(state)) == (["owls"], {"messages"})
    assert loaded(ask(agent, "How deep is the well?", config)) == ["well"]
    assert loaded(ask(agent, "How deep is the well?", config, document_ids=[])) == []
    assert loaded(await agent.ainvoke({"messages": [HumanMessage("Who mended the roof?")]}, config)) == ["roof"]


def test_run_that_is_resumed_keeps_its_documents(calling_model: BeaconModel, tmp_path: Path) -> None:
    memory = filled_memory(tmp_path, calling_model)
    agent: Any = create_agent(
        ChatBeaconMemory(memory=memory, max_tokens=60, temperature=0),
        [look_up],
        middleware=[BeaconMemoryMiddleware(BeaconMemoryRetriever(memory=memory))],
        checkpointer=InMemorySaver(),
        interrupt_before=["tools"],
    )
    config = {"configurable": {"thread_id": "1"}}
    assert loaded(ask(agent, "How deep is the well?", config, document_ids=["owls"])) == ["owls"]
    assert loaded(agent.invoke(None, config)) == ["owls"]


def test_namespace_of_a_run_comes_from_its_context(memory: BeaconMemory, model: ChatBeaconMemory) -> None:
    middleware = BeaconMemoryMiddleware(
        lambda runtime: BeaconMemoryRetriever(memory=memory, namespace=runtime.context.name)
    )
    agent = create_agent(model, middleware=[middleware], context_schema=User)
    for name, question in (("alice", "Who counts owls?"), ("bob", "Who keeps the key?")):
        expected = memory.within(name).ask(question, ["diary"], max_new_tokens=6, temperature=0).text
        assert ask(agent, question, context=User(name))["messages"][-1].content == expected
    alices = memory.within("alice").ask("Who keeps the key?", ["diary"], max_new_tokens=6, temperature=0).text
    state = ask(agent, "Who keeps the key?", context=User("alice"))  # her own diary, the one document that she has
    assert (state["messages"][-1].content, loaded(state)) == (alices, ["diary"])


@pytest.mark.parametrize("id", ["diary", "bob/diary", "bob\0diary", "../bob/diary"])
def test_no_run_can_name_a_document_of_another_namespace(
    memory: BeaconMemory, model: ChatBeaconMemory, id: str
) -> None:
    agent: Any = create_agent(model, middleware=[BeaconMemoryMiddleware(BeaconMemoryRetriever(memory=memory))])
    names = {"document_ids": [id], "namespace": "bob", "loaded_document_ids": [id]}
    with pytest.raises(DocumentNotFoundError):
        ask(agent, "Where is the key?", document_ids=[id])
    message = HumanMessage("Where is the key? namespace=bob", additional_kwargs=names, name="bob", id="1")
    config = {"configurable": names, "metadata": names}
    assert loaded(agent.invoke({"messages": [message], **names, "document_ids": None}, config)) == []


def test_middleware_of_two_namespaces_is_refused(memory: BeaconMemory, model: ChatBeaconMemory) -> None:
    documents = BeaconMemoryMiddleware(BeaconMemoryRetriever(memory=memory, namespace="bob"))
    history = BeaconHistoryMiddleware(BeaconChatMessageHistory("talk", memory, namespace="alice"))
    with pytest.raises(InputError, match="not of 'bob' and 'alice'"):
        ask(create_agent(model, middleware=[documents, history]), "Who?")


# Conversations


async def test_history_stands_in_front_of_each_run_and_grows_by_it(
    memory: BeaconMemory, model: ChatBeaconMemory
) -> None:
    history = BeaconChatMessageHistory("ada", memory, recent=160)
    documents = BeaconMemoryMiddleware(BeaconMemoryRetriever(memory=memory, k=1))
    agent: Any = create_agent(
        model, system_prompt="Be brief.", middleware=[documents, BeaconHistoryMiddleware(history)]
    )
    for n in range(6):
        question = f"Question {n} on the roof?"
        turns = [
            {"role": "system", "content": "Be brief."},
            *history.session.turns,
            {"role": "user", "content": question},
        ]
        ids = ["roof", *history.document_ids]
        expected = memory.ask(turns, ids, max_new_tokens=6, temperature=0)
        state = ask(agent, question) if n % 2 else await agent.ainvoke({"messages": [HumanMessage(question)]})
        assert (state["messages"][-1].content, loaded(state)) == (expected.text, ids)
        assert [message.type for message in state["messages"]] == ["human", "ai"]
        assert [message.content for message in history.messages[-2:]] == [question, expected.text]
    assert len(ids) == 2


def test_model_that_finds_documents_does_so_behind_a_history(memory: BeaconMemory) -> None:
    model = ChatBeaconMemory(memory=memory, max_tokens=6, temperature=0, document_ids=None)
    history = BeaconChatMessageHistory("ada", memory, recent=20)
    agent = create_agent(model, middleware=[BeaconHistoryMiddleware(history)])
    assert loaded(ask(agent, "How deep is the well?")) == ["well"]
    assert history.document_ids
    ids = ["roof", *history.document_ids]
    assert loaded(ask(agent, "Who mended the roof?")) == ids


def test_tool_calls_are_part_of_the_history(calling_model: BeaconModel, tmp_path: Path) -> None:
    memory = filled_memory(tmp_path, calling_model)
    model = ChatBeaconMemory(memory=memory, max_tokens=60, temperature=0)
    history = BeaconChatMessageHistory("ada", memory)
    agent = create_agent(model, [look_up], middleware=[BeaconHistoryMiddleware(history)])
    state = ask(agent, "How deep is the well?")
    said = history.messages
    assert [message.type for message in said] == ["human", "ai", "tool", "ai"]
    call, result = said[1], said[2]
    assert isinstance(call, AIMessage)
    assert isinstance(result, ToolMessage)
    assert call.tool_calls == state["messages"][1].tool_calls
    assert (result.content, result.tool_call_id, result.name) == (DEEP, call.tool_calls[0]["id"], "look_up")
    assert said[3].content == "Forty feet."


def test_state_of_a_checkpointer_stays_small_and_nothing_is_said_twice(
    memory: BeaconMemory, model: ChatBeaconMemory
) -> None:
    history = BeaconChatMessageHistory("ada", memory, recent=4000)
    agent = create_agent(model, middleware=[BeaconHistoryMiddleware(history)], checkpointer=InMemorySaver())
    for n in range(4):
        state = ask(agent, f"Question {n}?", {"configurable": {"thread_id": "1"}})
        assert [message.type for message in state["messages"]] == ["human", "ai"]
    asked = [message.content for message in history.messages if message.type == "human"]
    assert asked == [f"Question {n}?" for n in range(4)]


async def test_runs_of_many_users_at_a_time_stay_apart(memory: BeaconMemory, model: ChatBeaconMemory) -> None:
    def history(name: str) -> BeaconChatMessageHistory:
        return BeaconChatMessageHistory("talk", memory, namespace=name, recent=60)

    middleware = BeaconHistoryMiddleware(lambda runtime: history(runtime.context.name))
    agent: Any = create_agent(model, middleware=[middleware], context_schema=User)
    users = [f"user {number}" for number in range(6)]
    for n in range(3):
        questions = [{"messages": [HumanMessage(f"{user}, question {n}?")]} for user in users]
        runs = zip(users, questions, strict=True)
        await asyncio.gather(*(agent.ainvoke(question, context=User(user)) for user, question in runs))
    for user in users:
        kept = history(user)
        text = "".join(memory.within(user).store.text(id) for id in kept.document_ids) + str(kept.messages)
        assert [other for other in users if f"{other}, question" in text] == [user]
        assert all(f"{user}, question {n}?" in text for n in range(3))
