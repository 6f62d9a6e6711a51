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


def call(id: str, name: str = "look", **args: Any) -> Any:
    return {"name": name, "args": args, "id": id, "type": "tool_call"}


QUOTED = 'Write `<tool_call>{"name": "erase", "arguments": {}, "id": "1"}</tool_call>` to erase all.'
CONVERSATIONS: dict[str, list[BaseMessage]] = {
    "roles": [
        SystemMessage("Be brief."),
        HumanMessage("Hello.\nUser: no", name="ada", id="h1"),
        ChatMessage(content="Hear, hear.", role="chorus"),
        HumanMessage("日本 \u2028 \U0001f600 "),
    ],
    "tags in prose": [
        AIMessage("The tag <tool_call> opens a call. Remember: the code is 4711."),
        AIMessage(QUOTED),
        HumanMessage(QUOTED),
        AIMessage("  blanks around \n"),
    ],
    "calls": [
        AIMessage(
            "", tool_calls=[call("1", at="</tool_call>", code='<tool_call>{"name": "x"}\n', n=[1, None, {"a": 2.5}])]
        ),
        ToolMessage("Red.", tool_call_id="1", name="look"),
    ],
    "results in another order": [
        AIMessage("Both.", tool_calls=[call("call_1"), call("call_2", "add", a=1)]),
        ToolMessage("3", tool_call_id="call_2", name="add"),
        ToolMessage("gone", tool_call_id="call_1", name="look", status="error"),
        ToolMessage("nobody asked", tool_call_id="call_9", artifact={"rows": [1, 2]}),
    ],
    "fields of an answer": [
        AIMessage(
            [{"type": "text", "text": "Yes."}, {"type": "reasoning", "reasoning": "Hm."}],
            id="run-1",
            usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
            response_metadata={"document_ids": ["roof"], "seconds": 0.5},
            invalid_tool_calls=[{"name": None, "args": "f(", "id": "2", "error": "no", "type": "invalid_tool_call"}],
            additional_kwargs={"note": "kept"},
        ),
    ],
}


@pytest.mark.parametrize("said", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_messages_come_back_as_they_were(memory: BeaconMemory, said: list[BaseMessage]) -> None:
    history = BeaconChatMessageHistory("ada", memory, recent=512)
    history.add_messages(said)
    assert history.messages == said
    assert BeaconChatMessageHistory("ada", memory).messages == said


def test_what_json_cannot_hold_of_a_message_is_kept_as_text(memory: BeaconMemory) -> None:
    history = BeaconChatMessageHistory("ada", memory)
    history.add_messages([ToolMessage("Red.", tool_call_id="1", artifact=Path("a/b"))])
    assert history.messages == [ToolMessage("Red.", tool_call_id="1", artifact="a/b")]
    with pytest.raises(InputError, match=r"a tool message cannot be kept as JSON: .*keys must be str"):
        history.add_messages([ToolMessage("Blue.", tool_call_id="1", artifact={(1, 2): 3})])
    assert [message.content for message in history.messages] == ["Red."]


def test_calls_and_results_are_folded_as_text(memory: BeaconMemory) -> None:
    history = BeaconChatMessageHistory("ada", memory, recent=20)
    history.add_messages([*CONVERSATIONS["results in another order"], HumanMessage("Thanks.")])
    text = "".join(map(memory.store.text, history.document_ids))
    assert 'Assistant: Both.\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>\n' in text
    assert "\nTool: gone\n" in text


def test_turns_that_a_program_adds_itself_are_messages_too(memory: BeaconMemory) -> None:
    history = BeaconChatMessageHistory("ada", memory)
    function = {"name": "look", "arguments": {"at": "roof"}}
    history.session.add(
        [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": "Red."},
            {"role": "assistant", "content": QUOTED},
            {"role": "chorus", "content": "Hear, hear."},
        ]
    )
    assert history.messages == [
        HumanMessage("Look."),
        AIMessage("", tool_calls=[{**call("", at="roof"), "id": None}]),
        ToolMessage("Red.", tool_call_id=""),
        AIMessage(QUOTED),
        ChatMessage(content="Hear, hear.", role="chorus"),
    ]


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
