"""Conversations of bounded size in LangChain's message histories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_beacon_memory import BeaconChatMessageHistory, ChatBeaconMemory, behind_history
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import ConfigurableFieldSpec
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_samples import ROOF, babbling_model, filled_memory

from beacon_memory import BeaconMemory, InputError
from beacon_memory.modeling.model import BeaconModel

pytestmark = pytest.mark.filterwarnings("ignore:RunnableWithMessageHistory is deprecated")


@pytest.fixture(scope="module")
def base() -> BeaconModel:
    return babbling_model()


@pytest.fixture
def memory(base: BeaconModel, tmp_path: Path) -> BeaconMemory:
    return filled_memory(tmp_path, base)


@pytest.fixture
def model(memory: BeaconMemory) -> ChatBeaconMemory:
    return ChatBeaconMemory(memory=memory, max_tokens=8, temperature=0)


def exchange(n: int) -> list[BaseMessage]:
    return [HumanMessage(f"Question {n}?"), AIMessage(f"Answer {n}.")]


def contents(messages: list[BaseMessage]) -> list[tuple[str, Any]]:
    return [(message.type, message.content) for message in messages]


def of_session(session_id: str) -> Any:
    return {"configurable": {"session_id": session_id}}


def test_messages_come_back_as_they_were(memory: BeaconMemory) -> None:
    calls: Any = [
        {"name": "look", "args": {"at": "the 'roof'\n</tool_cal", "n": [1, None]}, "id": "call_1", "type": "tool_call"},
        {"name": "add", "args": {}, "id": "call_2", "type": "tool_call"},
    ]
    said: list[BaseMessage] = [
        SystemMessage("Be brief."),
        HumanMessage("Look, and add.\nUser: no"),
        AIMessage("Yes.", tool_calls=calls),
        ToolMessage("Red.", tool_call_id="call_1", name="look"),
        ToolMessage("3", tool_call_id="call_2", name="add"),
        AIMessage("Red, and 3."),
        ChatMessage(content="Hear, hear.", role="chorus"),
        HumanMessage("日本 \u2028 \U0001f600"),
    ]
    history = BeaconChatMessageHistory("ada", memory)
    history.add_messages(said)
    assert history.messages == said
    assert BeaconChatMessageHistory("ada", memory).messages == said


def test_old_messages_fold_into_a_document_and_recent_ones_stay(memory: BeaconMemory) -> None:
    history = BeaconChatMessageHistory("ada", memory, recent=100)
    for n in range(12):
        history.add_messages(exchange(n))
    assert contents(history.messages)[-2:] == contents(exchange(11))
    assert len(history.messages) < 6
    text = "".join(map(memory.store.text, history.document_ids))
    assert text.startswith("User: Question 0?\nAssistant: Answer 0.\n")
    folded = text.count("User: ")
    assert folded + len(history.messages) // 2 == 12
    assert memory.verify() == []


def test_long_message_is_folded_and_the_conversation_goes_on(base: BeaconModel, tmp_path: Path) -> None:
    memory = BeaconMemory(tmp_path / "long", base, reserve=100)
    model = ChatBeaconMemory(memory=memory, max_tokens=4, temperature=0)
    chatting = chat(model, lambda id: BeaconChatMessageHistory(id, memory, slots=400))
    history = BeaconChatMessageHistory("ada", memory, slots=400)
    words = " ".join(f"word{n}" for n in range(1200))
    history.add_messages([HumanMessage(words), AIMessage("Done.")])
    text = "".join(map(memory.store.text, history.document_ids))
    assert text == f"User: {words}\nAssistant: Done.\n"
    for n in range(3):
        answer = chatting.invoke([HumanMessage(f"Question {n}?")], of_session("ada"))
        assert answer.response_metadata["document_ids"] == history.document_ids


def test_system_message_stays_in_force(memory: BeaconMemory) -> None:
    history = BeaconChatMessageHistory("ada", memory, recent=60)
    for n in range(6):
        history.add_messages([SystemMessage("Be brief."), *exchange(n)])
    assert history.document_ids
    assert contents(history.messages)[0] == ("system", "Be brief.")
    assert "Be brief." not in "".join(map(memory.store.text, history.document_ids))


def test_conversation_outlives_the_process(base: BeaconModel, memory: BeaconMemory, tmp_path: Path) -> None:
    history = BeaconChatMessageHistory("ada", memory, recent=60)
    for n in range(6):
        history.add_messages(exchange(n))
    memory.close()
    again = BeaconChatMessageHistory("ada", BeaconMemory(tmp_path, base), recent=60)
    assert (again.messages, again.document_ids) == (history.messages, history.document_ids)
    assert again.document_ids


async def test_cleared_conversation_is_gone(memory: BeaconMemory) -> None:
    history = BeaconChatMessageHistory("ada", memory, recent=20)
    await history.aadd_messages([*exchange(0), *exchange(1)])
    assert history.document_ids
    await history.aclear()
    assert (await history.aget_messages(), history.document_ids) == ([], [])
    assert {row.id for row in memory.list()} == {"roof", "well", "owls"}
    history.clear()


@pytest.mark.parametrize("session_id", ["roof", "session/roof", "../roof", "roof\0", "/", "日本"])
def test_session_id_is_no_way_to_documents_or_other_sessions(memory: BeaconMemory, session_id: str) -> None:
    before = {row.id: memory.store.text(row.id) for row in memory.list()}
    histories = [
        BeaconChatMessageHistory(session_id, memory, namespace=namespace, recent=20) for namespace in (None, "alice")
    ]
    for number, history in enumerate(histories):
        assert (history.messages, history.document_ids) == ([], [])
        history.add_messages([*exchange(number), *exchange(number)])
    for number, history in enumerate(histories):
        (document,) = history.document_ids
        assert f"Question {1 - number}" not in history.memory.store.text(document)
    histories[1].clear()
    assert histories[0].document_ids
    histories[0].clear()
    assert {row.id: memory.store.text(row.id) for row in memory.list()} == before
    with pytest.raises(InputError, match="block of type 'image'"):
        histories[0].add_messages([HumanMessage([{"type": "image", "url": "x"}])])


def chat(model: ChatBeaconMemory, history: Callable[[str], BeaconChatMessageHistory]) -> Any:
    return RunnableWithMessageHistory(behind_history(model), history)


@pytest.mark.parametrize("way", ["invoke", "stream", "ainvoke", "astream"])
async def test_runnable_with_message_history_answers_behind_the_folded_messages(
    memory: BeaconMemory, model: ChatBeaconMemory, way: str
) -> None:
    def history(session_id: str) -> BeaconChatMessageHistory:
        return BeaconChatMessageHistory(session_id, memory, recent=160)

    chatting = chat(model, history)
    for n in range(8):
        kept = history("ada")
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in kept.session.turns]
        asked = {"role": "user", "content": f"Question {n}?"}
        expected = memory.ask([*turns, asked], kept.document_ids, max_new_tokens=8, temperature=0)
        question, config = [HumanMessage(f"Question {n}?")], of_session("ada")
        if way == "invoke":
            text = chatting.invoke(question, config).content
        elif way == "ainvoke":
            text = (await chatting.ainvoke(question, config)).content
        elif way == "stream":
            text = "".join(chunk.content for chunk in chatting.stream(question, config))
        else:
            text = "".join([chunk.content async for chunk in chatting.astream(question, config)])
        assert text == expected.text
        assert contents(history("ada").messages)[-2:] == [("human", f"Question {n}?"), ("ai", expected.text)]
    assert history("ada").document_ids == list(expected.ids)
    assert history("ben").messages == []


def test_chain_with_prompt_and_parser_may_stand_around_the_model(memory: BeaconMemory) -> None:
    model = ChatBeaconMemory(memory=memory, max_tokens=8, temperature=0, document_ids=["roof"])
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Be brief."), MessagesPlaceholder("history"), ("human", "{question}")]
    )
    chatting = RunnableWithMessageHistory(
        prompt | behind_history(model) | StrOutputParser(),
        lambda user: BeaconChatMessageHistory("talk", memory, namespace=None if user == "root" else user, recent=160),
        input_messages_key="question",
        history_messages_key="history",
        history_factory_config=[ConfigurableFieldSpec(id="user", annotation=str)],
    )
    config: Any = {"configurable": {"user": "root"}}
    answers = [chatting.invoke({"question": f"Question {n}?"}, config) for n in range(6)]
    history = BeaconChatMessageHistory("talk", memory, recent=160)
    assert history.document_ids
    assert contents(history.messages)[-1] == ("ai", answers[-1])
    turns = [{"role": "system", "content": "Be brief."}, *history.session.turns, {"role": "user", "content": "Who?"}]
    expected = memory.ask(turns, ["roof", *history.document_ids], max_new_tokens=8, temperature=0).text
    assert chatting.invoke({"question": "Who?"}, config) == expected


def test_histories_of_two_namespaces_know_nothing_of_each_other(memory: BeaconMemory, model: ChatBeaconMemory) -> None:
    users = {name: chat(model, lambda id, name=name: BeaconChatMessageHistory(id, memory, namespace=name, recent=40))  # type: ignore[misc]
             for name in ("alice", "bob")}  # fmt: skip
    for name, chatting in users.items():
        for n in range(4):
            chatting.invoke([HumanMessage(f"{name.upper()} {n}")], of_session("talk"))
    for name, other in (("alice", "BOB"), ("bob", "ALICE")):
        history = BeaconChatMessageHistory("talk", memory, namespace=name)
        text = "".join(map(memory.within(name).store.text, history.document_ids))
        assert name.upper() in text
        assert other not in text + str(history.messages)


def test_model_that_finds_documents_does_so_behind_a_history(memory: BeaconMemory) -> None:
    model = ChatBeaconMemory(memory=memory, max_tokens=4, temperature=0, document_ids=None)
    chatting = chat(model, lambda id: BeaconChatMessageHistory(id, memory, recent=20))
    for question, found in (("How deep is the well?", "well"), ("Who mended the roof?", "roof")):
        folded = BeaconChatMessageHistory("ada", memory).document_ids
        answer = chatting.invoke([HumanMessage(question)], of_session("ada"))
        assert answer.response_metadata["document_ids"] == [found, *folded]
    assert folded


def test_model_may_have_documents_of_its_own_in_front(memory: BeaconMemory) -> None:
    model = ChatBeaconMemory(memory=memory, max_tokens=8, temperature=0, document_ids=["roof"])
    chatting = chat(model, lambda id: BeaconChatMessageHistory(id, memory, recent=30))
    for n in range(3):
        folded = BeaconChatMessageHistory("ada", memory).document_ids
        answer = chatting.invoke([HumanMessage(f"Question {n}?")], of_session("ada"))
    assert folded
    assert answer.response_metadata["document_ids"] == ["roof", *folded]
    assert ROOF not in str(BeaconChatMessageHistory("ada", memory).messages)
