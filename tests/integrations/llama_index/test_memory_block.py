"""BeaconMemoryBlock: what a Memory flushes is folded and answered from, and nobody reads another's conversation."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from event_loop import awake_during
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock, ToolCallBlock
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import BaseMemoryBlock, InsertMethod, Memory, StaticMemoryBlock
from llama_index_beacon_memory import BeaconMemoryBlock, BeaconMemoryLLM
from llama_index_beacon_memory.handles import KEY
from llama_index_beacon_memory.messages import to_session_turns
from llama_index_samples import OWLS, ROOF, WELL, make_llm, saying

from beacon_memory import DocumentNotFoundError, InputError, QuotaError

QUESTION = ChatMessage("Who mended the roof?")


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[BeaconMemoryLLM]:
    llm = make_llm(tmp_path / "store")
    yield llm
    llm.memory.close()


def make_memory(block: BeaconMemoryBlock, session_id: str = "monday", **settings: Any) -> Memory:
    """A memory that keeps about two messages as they are: each character is a token."""
    limits = {"token_limit": 200, "token_flush_size": 20, "chat_history_token_ratio": 0.7, "tokenizer_fn": list}
    return Memory.from_defaults(session_id=session_id, memory_blocks=[block], **(limits | settings))


def talk(memory: Memory, *texts: str) -> None:
    for text in texts:
        memory.put(ChatMessage(text))
        memory.put(ChatMessage("I see.", role="assistant"))


def folded(block: BeaconMemoryBlock, session_id: str = "monday") -> str:
    """The text of what was folded of a session."""
    return "".join(map(block.llm.memory.store.text, block.session(session_id).ids))


def handle_of(block: BeaconMemoryBlock, session_id: str = "monday") -> dict[str, str]:
    (message,) = asyncio.run(block.aget(session_id=session_id))
    handle: dict[str, str] = message.additional_kwargs[KEY]
    return handle


def with_handle(handle: Any, role: str = "system", content: str | None = None) -> list[ChatMessage]:
    return [ChatMessage(content, role=role, additional_kwargs={KEY: handle}), QUESTION]


# --- conventions


def test_class(llm: BeaconMemoryLLM) -> None:
    assert BaseMemoryBlock in BeaconMemoryBlock.__mro__
    block = BeaconMemoryBlock(llm=llm)
    assert (block.name, block.priority, block.accept_short_term_memory) == ("BeaconMemory", 0, True)


# --- folding and answering


def test_flushed_messages_are_folded_and_the_model_answers_behind_them(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm)
    memory = make_memory(block)
    talk(memory, ROOF, WELL)
    assert folded(block) == f"User: {ROOF}\nAssistant: I see.\n"
    memory.put(QUESTION)
    messages = memory.get()
    recent = [message.content for message in messages if message.content]
    assert recent == [WELL, "I see.", QUESTION.content]
    response = llm.chat(messages)
    assert response.raw["document_ids"] == ["BeaconMemory/monday/1"]
    turns = [{"role": message.role.value, "content": message.content} for message in messages[1:]]
    assert response.message.content == llm.memory.ask(turns, ["BeaconMemory/monday/1"], max_new_tokens=8).text
    assert response.message.content != llm.chat(messages[1:]).message.content


def test_memory_grows_by_what_is_flushed(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm)
    memory = make_memory(block)
    talk(memory, ROOF, WELL)
    before = llm.memory.show("BeaconMemory/monday/1")
    talk(memory, OWLS)
    after = [llm.memory.show(id) for id in block.session("monday").ids]
    assert folded(block) == f"User: {ROOF}\nAssistant: I see.\nUser: {WELL}\nAssistant: I see.\n"
    assert sum(row.slots for row in after) > before.slots
    assert after[0].created_at == before.created_at  # what was folded before is not made anew


def test_nothing_is_loaded_before_anything_was_folded(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm)
    memory = make_memory(block)
    memory.put(QUESTION)
    assert memory.get() == [QUESTION]
    assert llm.chat(memory.get()).raw["document_ids"] == []


def test_slots_bound_what_a_conversation_takes(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm, slots=40)
    memory = make_memory(block)
    talk(memory, ROOF, WELL, OWLS, ROOF, WELL, OWLS)
    rows = [llm.memory.show(id) for id in block.session("monday").ids]
    assert sum(row.slots for row in rows) <= 40
    assert max(max(row.ratios) for row in rows) > 2


def test_documents_of_the_model_come_with_the_conversation(llm: BeaconMemoryLLM) -> None:
    llm.memory.add("owls", OWLS, ratio=2)
    memory = make_memory(BeaconMemoryBlock(llm=llm))
    talk(memory, ROOF, WELL)
    memory.put(ChatMessage("When do owls leave?"))
    for ids in (["owls"], None):
        response = llm.chat(memory.get(), document_ids=ids)
        assert response.raw["document_ids"] == ["owls", "BeaconMemory/monday/1"]


def test_conversations_are_not_picked_as_documents(llm: BeaconMemoryLLM) -> None:
    talk(make_memory(BeaconMemoryBlock(llm=llm)), ROOF, WELL)
    assert llm.chat([QUESTION], document_ids=None).raw["document_ids"] == []


def test_conversation_survives_the_program(llm: BeaconMemoryLLM) -> None:
    talk(make_memory(BeaconMemoryBlock(llm=llm)), ROOF, WELL)
    again = make_llm(llm.memory.store.root)
    memory = make_memory(BeaconMemoryBlock(llm=again))
    memory.put(QUESTION)
    assert again.chat(memory.get()).raw["document_ids"] == ["BeaconMemory/monday/1"]


def test_messages_that_could_not_be_folded_are_given_as_they_are(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm, slots=1024)
    unfolded = block.session("monday")
    unfolded.recent = 1000
    unfolded.add([{"role": "user", "content": ROOF}])  # as after a crash between keeping and folding
    (message,) = asyncio.run(block.aget(session_id="monday"))
    assert (message.role, message.content) == (MessageRole.USER, ROOF)
    asyncio.run(block.aput([ChatMessage("I see.", role="assistant")], session_id="monday"))
    assert folded(block) == f"User: {ROOF}\nAssistant: I see.\n"


def test_messages_that_could_not_be_folded_keep_their_calls(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm, slots=1024)
    called = ToolCallBlock(tool_call_id="7", tool_name="add", tool_kwargs={"a": "</tool_call>"})
    quoting = ChatMessage('<tool_call>{"name": "add"}</tool_call> adds.', role="assistant")
    said = [
        ChatMessage(role="assistant", blocks=[TextBlock(text="So:"), called]),
        ChatMessage("5", role="tool", additional_kwargs={"tool_call_id": "7"}),
        quoting,
    ]
    unfolded = block.session("monday")
    unfolded.recent = 1000
    unfolded.add(to_session_turns(said))  # as after a crash between keeping and folding
    assert asyncio.run(block.aget(session_id="monday")) == said


def test_tool_calls_and_results_are_folded_as_text(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm)
    call = ToolCallBlock(tool_call_id="1", tool_name="add", tool_kwargs={"a": 2})
    messages = [
        ChatMessage(role="assistant", blocks=[call]),
        ChatMessage("5", role="tool"),
        ChatMessage(role="assistant", blocks=[]),
    ]
    asyncio.run(block.aput(messages, session_id="monday"))
    assert folded(block) == ('Assistant: <tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>\nTool: 5\n')


def test_long_message_is_folded_and_the_conversation_goes_on(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm, slots=400)
    memory = make_memory(block)
    words = " ".join(f"word{n}" for n in range(1200))
    talk(memory, words, ROOF, WELL)
    memory.put(QUESTION)
    assert folded(block) == f"User: {words}\nAssistant: I see.\nUser: {ROOF}\nAssistant: I see.\n"
    assert llm.chat(memory.get()).raw["document_ids"] == block.session("monday").ids


def test_system_message_stays_in_force(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm)
    memory = make_memory(block)
    memory.put(ChatMessage("Be brief.", role="system"))
    talk(memory, ROOF, WELL, OWLS)
    messages = memory.get()
    assert [message.content for message in messages if message.role == MessageRole.SYSTEM if message.blocks] == [
        "Be brief."
    ]
    assert "Be brief." not in folded(block)
    turns = [{"role": message.role.value, "content": message.content} for message in messages if message.blocks]
    ids = block.session("monday").ids
    assert llm.chat(messages).message.content == llm.memory.ask(turns, ids, max_new_tokens=8).text


def test_messages_whose_fold_fails_are_folded_with_the_next(
    llm: BeaconMemoryLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = BeaconMemoryBlock(llm=llm)
    memory = make_memory(block)
    llm.memory.store.configure(quota=1)
    with pytest.raises(QuotaError):
        talk(memory, ROOF, WELL)
    assert (block.session("monday").ids, llm.memory.list()) == ([], [])
    assert [message.content for message in memory.get()] == [ROOF, "I see.", WELL]
    llm.memory.store.configure(quota=None)
    talk(memory, OWLS)
    assert folded(block).startswith(f"User: {ROOF}\nAssistant: I see.\nUser: {WELL}")


def test_block_that_takes_no_flushed_messages_folds_only_what_is_put(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm, accept_short_term_memory=False)
    talk(make_memory(block), ROOF, WELL)
    assert block.session("monday").ids == []
    asyncio.run(block.aput([ChatMessage(ROOF)]))
    assert llm.memory.store.text("BeaconMemory/1") == f"User: {ROOF}\n"


def test_clear_forgets_what_was_folded(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm)
    memory = make_memory(block)
    talk(memory, ROOF, WELL)
    memory.reset()
    block.clear("monday")
    assert memory.get() == []
    assert llm.memory.list() == []


@pytest.mark.parametrize("insert_method", list(InsertMethod))
def test_other_blocks_keep_their_text(llm: BeaconMemoryLLM, insert_method: InsertMethod) -> None:
    block = BeaconMemoryBlock(llm=llm)
    memory = Memory.from_defaults(
        session_id="monday",
        memory_blocks=[StaticMemoryBlock(static_content="The user is a miller."), block],
        token_limit=400,
        token_flush_size=20,
        chat_history_token_ratio=0.4,
        tokenizer_fn=list,
        insert_method=insert_method,
    )
    talk(memory, ROOF, WELL, OWLS)
    for _ in range(2):  # what the framework writes into a message must not pile up
        messages = memory.get()
        contents = [message.content or "" for message in messages]
        assert sum("The user is a miller." in content for content in contents) == 1
        assert llm.chat(messages).raw["document_ids"] == ["BeaconMemory/monday/1"]


def test_chat_engine_answers_from_what_was_folded(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm)
    engine = SimpleChatEngine.from_defaults(llm=llm, memory=make_memory(block), system_prompt="Be brief.")
    for text in (ROOF, WELL, OWLS):
        engine.chat(text)
    assert ROOF in folded(block)
    prompt = [ChatMessage("Be brief.", role="system"), *engine._memory.get(), QUESTION]
    expected = llm.chat(prompt)
    assert expected.raw["document_ids"] == block.session("monday").ids != []
    stream = engine.stream_chat(QUESTION.content or "")
    assert "".join(stream.response_gen).strip() == expected.message.content

    async def asked() -> str:
        return str(await engine.achat("And the well?"))

    asyncio.run(asked())
    assert f"User: {WELL}" in folded(block)


def test_agent_answers_behind_what_was_folded(tmp_path: Path) -> None:
    llm = make_llm(tmp_path, tools=True, **saying("Ada."))
    memory = make_memory(BeaconMemoryBlock(llm=llm))
    talk(memory, ROOF, WELL)
    agent = FunctionAgent(tools=[], llm=llm, system_prompt="Be brief.", streaming=False)

    async def run() -> Any:
        return await agent.run(QUESTION.content, memory=memory)

    output = asyncio.run(run())
    assert str(output) == "Ada."
    assert output.raw["document_ids"] == ["BeaconMemory/monday/1"]


def test_messages_that_are_put_at_a_time_are_all_folded(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm)

    async def put() -> None:
        await asyncio.gather(*(block.aput([ChatMessage(f"Number {n}.")], session_id="monday") for n in range(10)))

    asyncio.run(put())
    assert sorted(folded(block).splitlines()) == [f"User: Number {n}." for n in range(10)]


def test_event_loop_goes_on_while_messages_are_folded(llm: BeaconMemoryLLM) -> None:
    folding = BeaconMemoryBlock(llm=llm).aput([ChatMessage(ROOF * 20)], session_id="monday")
    assert asyncio.run(awake_during(folding)) > 0.05


# --- whose memory


def test_forged_handles_are_refused(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm)
    talk(make_memory(block), ROOF, WELL)
    llm.memory.add("diary", OWLS, ratio=2)
    handle = handle_of(block)
    assert llm.chat(with_handle(handle)).raw["document_ids"] == ["BeaconMemory/monday/1"]
    forged = [
        {**handle, "id": "diary"},
        {**handle, "signature": "0" * len(handle["signature"])},
        {**handle, "signature": handle["signature"][:-1] + "é"},
        {**handle, "signature": ""},
    ]
    for one in forged:
        with pytest.raises(InputError, match="was not issued by this process for this store and namespace"):
            llm.chat(with_handle(one))
    malformed: list[Any] = ["diary", {"id": "diary"}, {"id": 1, "signature": handle["signature"]}, None, ["diary"]]
    for other in malformed:
        with pytest.raises(InputError, match="is no memory handle"):
            llm.chat(with_handle(other))


@pytest.mark.parametrize("role", [role for role in MessageRole if role != MessageRole.SYSTEM])
def test_handle_in_somebodys_message_is_ignored(
    llm: BeaconMemoryLLM, role: MessageRole, caplog: pytest.LogCaptureFixture
) -> None:
    block = BeaconMemoryBlock(llm=llm)
    talk(make_memory(block), ROOF, WELL)
    plain = llm.chat([ChatMessage("Hello.", role=role), QUESTION])
    with caplog.at_level(logging.WARNING):
        claimed = llm.chat(with_handle(handle_of(block), role.value, "Hello."))
    assert claimed.raw["document_ids"] == []
    assert claimed.message == plain.message
    assert f"a memory handle in a message of the role {role.value} was ignored" in caplog.text


@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_handle_in_a_text_is_only_text(llm: BeaconMemoryLLM, role: str) -> None:
    block = BeaconMemoryBlock(llm=llm)
    talk(make_memory(block), ROOF, WELL)
    handle = handle_of(block)
    for text in (json.dumps({KEY: handle}), str({"additional_kwargs": {KEY: handle}}), handle["signature"]):
        assert llm.chat([ChatMessage(text, role=role), QUESTION]).raw["document_ids"] == []
        assert llm.complete(text).raw["document_ids"] == []


def test_handle_in_a_message_that_is_folded_loads_nothing(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm)
    talk(make_memory(block), ROOF, WELL)
    tuesday = make_memory(block, "tuesday")
    tuesday.put(ChatMessage(WELL, additional_kwargs={KEY: handle_of(block)}))
    talk(tuesday, OWLS)
    tuesday.put(QUESTION)
    assert "roof" not in folded(block, "tuesday")
    assert llm.chat(tuesday.get()).raw["document_ids"] == ["BeaconMemory/tuesday/1"]


def test_handle_of_another_namespace_is_refused(llm: BeaconMemoryLLM) -> None:
    alice, bob = llm.within("alice"), llm.within("bob")
    of_alice, of_bob = BeaconMemoryBlock(llm=alice), BeaconMemoryBlock(llm=bob)
    talk(make_memory(of_alice), ROOF, WELL)
    talk(make_memory(of_bob), OWLS, WELL)  # the same session id, so the same document id
    handle = handle_of(of_alice)
    assert handle["id"] == handle_of(of_bob)["id"]
    assert alice.chat(with_handle(handle)).raw["document_ids"] == ["BeaconMemory/monday/1"]
    assert llm.chat(with_handle(handle), namespace="alice").raw["document_ids"] == ["BeaconMemory/monday/1"]
    for other in (bob, llm):
        with pytest.raises(InputError, match="was not issued by this process for this store and namespace"):
            other.chat(with_handle(handle))
    with pytest.raises(InputError, match="was not issued"):
        alice.chat(with_handle(handle), namespace="bob")
    with pytest.raises(InputError, match="was not issued"):
        list(alice.stream_chat(with_handle(handle), namespace="bob"))
    with pytest.raises(InputError, match="was not issued"):
        asyncio.run(alice.achat(with_handle(handle), namespace="bob"))


def test_handle_of_another_store_is_refused(llm: BeaconMemoryLLM, tmp_path: Path) -> None:
    block = BeaconMemoryBlock(llm=llm)
    talk(make_memory(block), ROOF, WELL)
    with pytest.raises(InputError, match="was not issued by this process for this store and namespace"):
        make_llm(tmp_path / "another").chat(with_handle(handle_of(block)))


def test_handle_of_a_conversation_that_is_gone_is_refused(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm)
    talk(make_memory(block), ROOF, WELL)
    handle = handle_of(block)
    block.clear("monday")
    with pytest.raises(DocumentNotFoundError):
        llm.chat(with_handle(handle))


def test_sessions_and_namespaces_are_kept_apart(llm: BeaconMemoryLLM) -> None:
    of_alice, of_bob = (BeaconMemoryBlock(llm=llm.within(name)) for name in ("alice", "bob"))
    talk(make_memory(of_alice, "monday"), ROOF, WELL)
    talk(make_memory(of_alice, "tuesday"), OWLS, WELL)
    assert "roof" in folded(of_alice, "monday")
    assert "roof" not in folded(of_alice, "tuesday")
    memory = make_memory(of_bob, "monday")
    memory.put(QUESTION)
    assert of_bob.llm.chat(memory.get()).raw["document_ids"] == []
    assert llm.memory.list() == []


def test_message_cannot_claim_to_be_of_another_session(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm)
    claims = {"session_id": "tuesday", "namespace": "bob", "name": "diary"}
    message = ChatMessage(ROOF, additional_kwargs=claims)
    asyncio.run(block.aput([message], session_id="monday"))
    asyncio.run(block.aput([message]))
    assert [row.id for row in llm.memory.list()] == ["BeaconMemory/1", "BeaconMemory/monday/1"]
    assert llm.within("bob").memory.list() == []


def test_session_id_cannot_name_a_document(llm: BeaconMemoryLLM) -> None:
    llm.memory.add("diary", OWLS, ratio=2)
    block = BeaconMemoryBlock(llm=llm)
    memory = make_memory(block, "diary")
    memory.put(QUESTION)
    assert llm.chat(memory.get()).raw["document_ids"] == []
    talk(memory, ROOF, WELL)
    assert llm.memory.store.text("diary") == OWLS
