"""Finding documents, and the chain that hands their ids to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_beacon_memory import (
    BeaconChatMessageHistory,
    BeaconMemoryMiddleware,
    BeaconMemoryRetriever,
    ChatBeaconMemory,
    create_memory_chain,
)
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_samples import OWLS, ROOF, WELL, babbling_model, filled_memory

from beacon_memory import BeaconMemory, DocumentNotFoundError, InputError, Passage, Query

MILL = "The mill stands by the brook. " * 20 + "Its wheel is of oak.\n\n" + "The miller is Tom. " * 20


class Fixed(BaseRetriever):
    """An index whose answer is known; what a developer's own retriever, or somebody who writes into it, may return."""

    documents: list[Document]

    def _get_relevant_documents(self, *_: Any, **__: Any) -> list[Document]:
        return self.documents


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> BeaconMemory:
    memory = filled_memory(tmp_path_factory.mktemp("store"), babbling_model())
    memory.add("mill", MILL, {"owner": "Tom", "document_id": "roof", "score": "high"}, ratio=8)
    memory.within("bob").add("diary", "Bob keeps the key to the cellar under the blue stone.", ratio=2)
    memory.within("alice").add("roof", "The roof of Alice's house is blue.", ratio=2)
    return memory


@pytest.fixture
def model(memory: BeaconMemory) -> ChatBeaconMemory:
    return ChatBeaconMemory(memory=memory, max_tokens=12, temperature=0)


def test_each_document_comes_once_as_its_best_passage_with_id_score_and_metadata(memory: BeaconMemory) -> None:
    retriever = BeaconMemoryRetriever(memory=memory)
    found = retriever.invoke("Of what is the wheel of the mill?")
    assert retriever.ids(found[:1]) == ["mill"]
    best = memory.store.search("Of what is the wheel of the mill?")[0]
    assert found[0].page_content == best.text == MILL[best.start : best.stop]
    place = {"start": best.start, "stop": best.stop, "score": best.score}
    assert found[0].metadata == {"owner": "Tom", "document_id": "mill"} | place
    assert retriever.ids(found) == list(dict.fromkeys(retriever.ids(found)))
    assert retriever.invoke("Zebras?") == []


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_number_of_documents_is_bounded(memory: BeaconMemory, asynchronous: bool) -> None:
    async def count(retriever: BeaconMemoryRetriever, **options: Any) -> int:
        asked = "roof, well, owls, mill?"
        return len(await retriever.ainvoke(asked, **options) if asynchronous else retriever.invoke(asked, **options))

    def scored(query: Query) -> list[Passage]:
        return [Passage(id, 0, 9, 1.0) for id in ("roof", "well", "owls", "mill")]

    memory = BeaconMemory(memory.store.root, memory.model, picker=scored)

    vectors = InMemoryVectorStore(DeterministicFakeEmbedding(size=16))
    vectors.add_texts([ROOF, WELL, OWLS, MILL], [{"document_id": id} for id in ("roof", "well", "owls", "mill")])
    for inner in (None, vectors.as_retriever(search_kwargs={"k": 4})):
        assert await count(BeaconMemoryRetriever(memory=memory, inner=inner)) == 3
        assert await count(BeaconMemoryRetriever(memory=memory, inner=inner, k=2)) == 2
        assert await count(BeaconMemoryRetriever(memory=memory, inner=inner, k=2), k=4) == 4
        with pytest.raises(InputError, match="k=0"):
            await count(BeaconMemoryRetriever(memory=memory, inner=inner), k=0)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        BeaconMemoryRetriever(memory=memory, k=0)


async def test_chunks_of_an_index_lead_to_their_documents_each_once(memory: BeaconMemory) -> None:
    chunks = [
        Document("first", metadata={"source": "mill", "page": 2}),
        Document("second", metadata={"source": "roof"}),
        Document("third", metadata={"source": "mill", "page": 1}),
    ]
    retriever = BeaconMemoryRetriever(memory=memory, inner=Fixed(documents=chunks), id_key="source")
    assert retriever.invoke("?") == chunks[:2] == await retriever.ainvoke("?")
    assert retriever.ids(chunks[:2]) == ["mill", "roof"]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_chunk_that_names_no_stored_document_is_an_error(memory: BeaconMemory, asynchronous: bool) -> None:
    for metadata, error in (
        ({}, InputError),
        ({"document_id": 7}, InputError),
        ({"document_id": ["roof"]}, InputError),
        ({"document_id": "attic"}, DocumentNotFoundError),
    ):
        retriever = BeaconMemoryRetriever(memory=memory, inner=Fixed(documents=[Document("x", metadata=metadata)]))
        with pytest.raises(error):
            await retriever.ainvoke("?") if asynchronous else retriever.invoke("?")


@pytest.mark.parametrize("namespace", [None, "alice"])
@pytest.mark.parametrize("id", ["diary", "bob/diary", "bob\0diary", "../bob/diary", "namespaces/bob/diary"])
def test_nothing_that_an_index_holds_leads_to_another_namespace(
    memory: BeaconMemory, model: ChatBeaconMemory, namespace: str | None, id: str
) -> None:
    planted = Document("x", id=id, metadata={"document_id": id, "namespace": "bob", "memory": {"namespace": "bob"}})
    retriever = BeaconMemoryRetriever(memory=memory, namespace=namespace, inner=Fixed(documents=[planted]))
    with pytest.raises(DocumentNotFoundError):
        retriever.invoke("Where is the key?")
    with pytest.raises(DocumentNotFoundError):
        create_memory_chain(model, retriever).invoke("Where is the key?")


def test_search_stays_in_its_namespace(memory: BeaconMemory, model: ChatBeaconMemory) -> None:
    key = "Where is the key to the cellar?"
    for namespace in (None, "", "nobody"):
        assert BeaconMemoryRetriever(memory=memory, namespace=namespace).invoke(key) == []
    (only,) = BeaconMemoryRetriever(memory=memory, namespace="alice").invoke(key)  # the one document that she has
    assert (only.page_content, only.metadata["score"]) == ("The roof of Alice's house is blue.", 0.0)
    assert len(BeaconMemoryRetriever(memory=memory, namespace="bob").invoke(key)) == 1
    (found,) = BeaconMemoryRetriever(memory=memory, namespace="alice").invoke("Which roof?")
    assert found.page_content == "The roof of Alice's house is blue."
    expected = memory.within("alice").ask("Which roof?", ["roof"], max_new_tokens=12, temperature=0)
    chain = create_memory_chain(model, BeaconMemoryRetriever(memory=memory, namespace="alice"))
    assert chain.invoke("Which roof?").content == expected.text
    inside = ChatBeaconMemory(memory=memory, namespace="alice", max_tokens=12, temperature=0)
    assert create_memory_chain(inside).invoke("Which roof?").content == expected.text
    assert create_memory_chain(inside).invoke(key).response_metadata["document_ids"] == ["roof"]


def test_conversations_are_not_found(memory: BeaconMemory) -> None:
    history = BeaconChatMessageHistory("ada", memory, recent=10)
    history.add_messages([HumanMessage("The password of the attic is swordfish."), AIMessage("I see.")])
    assert history.document_ids != []
    assert [hit.document for hit in memory.store.search("swordfish")] == history.document_ids
    assert BeaconMemoryRetriever(memory=memory).invoke("swordfish") == []
    history.clear()


@pytest.mark.parametrize("own", [False, True])
async def test_chain_hands_ids_to_the_model_and_no_text(
    memory: BeaconMemory, model: ChatBeaconMemory, own: bool
) -> None:
    retriever = Fixed(documents=[Document(WELL, metadata={"document_id": "well"})]) if own else None
    chain = create_memory_chain(model, retriever)
    question = "How deep is the well?"
    expected = memory.ask(question, ["well"], max_new_tokens=12, temperature=0)
    for answer in (
        chain.invoke(question),
        chain.invoke([HumanMessage("Hello"), AIMessage("Yes?"), HumanMessage(question)][2:]),
        await chain.ainvoke(question),
    ):
        assert answer.content == expected.text
        assert answer.response_metadata["document_ids"] == ["well"]
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["input_tokens"] == expected.usage.slots + expected.usage.prompt_tokens
    assert "".join(str(chunk.content) for chunk in chain.stream(question)) == expected.text
    assert "".join([str(chunk.content) async for chunk in chain.astream(question)]) == expected.text
    assert chain.batch([question] * 3)[2].content == expected.text
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "{question}")])
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    brief = memory.ask(turns, ["well"], max_new_tokens=12, temperature=0).text
    assert (prompt | chain | StrOutputParser()).invoke({"question": question}) == brief


def test_chain_answers_without_documents_if_none_is_found(model: ChatBeaconMemory) -> None:
    assert create_memory_chain(model).invoke("Zebras?").response_metadata["document_ids"] == []
    assert create_memory_chain(model, Fixed(documents=[])).invoke("Well?").response_metadata["document_ids"] == []


def test_chain_searches_with_what_was_asked_last(memory: BeaconMemory, model: ChatBeaconMemory) -> None:
    conversation: list[BaseMessage] = [
        HumanMessage("Tell me of the owls."),
        AIMessage("Of the roof?"),
        HumanMessage("No, of the well."),
    ]
    call: Any = {"name": "look_up", "args": {}, "id": "1", "type": "tool_call"}
    looked_up = [AIMessage("", tool_calls=[call]), ToolMessage("The roof has larch boards.", tool_call_id="1")]
    picking = ChatBeaconMemory(memory=memory, max_tokens=4, document_ids=None)
    for asked in (conversation, [*conversation, *looked_up]):
        for answering in (create_memory_chain(model), picking):
            assert answering.invoke(asked).response_metadata["document_ids"] == ["well"]


def crowded(folder: Path) -> BeaconMemory:
    """Four documents that match one question, more or less, and do not all fit the model together."""
    memory = BeaconMemory(folder, babbling_model(max_position_embeddings=512), reserve=60)
    texts = {"one": "owl " * 170, "two": "owl " * 140 + "hen " * 20, "three": "owl and owl"}
    memory.add_many([*texts.items(), ("bees", "bees " * 60 + "owl " + "bees " * 13)], ratio=2)
    memory.add("hens", "hens, ducks and geese " * 10, ratio=2)
    return memory


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_retriever_and_chain_load_what_ask_loads(tmp_path: Path, asynchronous: bool) -> None:
    memory = crowded(tmp_path)
    slots = {row.id: row.slots for row in memory.list()}
    model = ChatBeaconMemory(memory=memory, max_tokens=8, temperature=0)
    asked = "Which owl?"
    scores = {pick.id: pick.best.score for pick in memory.pick(asked, 4)}
    hits = {hit.document: hit.score for hit in memory.store.search(asked)}
    assert hits.keys() - scores.keys() == {"bees"}  # too weak
    assert sum(slots[id] for id in scores) > memory.model.max_positions  # and the others do not fit together
    retriever = BeaconMemoryRetriever(memory=memory, k=4)
    assert retriever.ids(retriever.invoke(asked)) == list(scores)
    expected = memory.ask(asked, limit=4, max_new_tokens=8, temperature=0)
    assert list(expected.ids) == list(scores)
    chain = create_memory_chain(model, retriever)
    answer = await chain.ainvoke(asked) if asynchronous else chain.invoke(asked)
    assert (answer.response_metadata["document_ids"], answer.content) == (list(expected.ids), expected.text)
    named = model.invoke(asked, document_ids=list(scores))
    assert named.response_metadata["document_ids"] == list(scores)


def test_of_documents_that_do_not_all_fit_every_way_loads_what_ask_loads(tmp_path: Path) -> None:
    memory = BeaconMemory(tmp_path, babbling_model(max_position_embeddings=512), reserve=60)
    memory.add_many([(f"owls {n}", f"The owls number {n}. " + "owl " * 102) for n in range(4)], ratio=2)
    assert all(200 < row.slots < 256 for row in memory.list())
    model = ChatBeaconMemory(memory=memory, max_tokens=6, temperature=0)
    for k in (2, 3, 4):
        expected = list(memory.ask("Which owl?", limit=k, max_new_tokens=6).ids)
        assert len(expected) == k
        retriever = BeaconMemoryRetriever(memory=memory, k=k)
        chained = create_memory_chain(model, retriever).invoke("Which owl?")
        agent: Any = create_agent(model, middleware=[BeaconMemoryMiddleware(retriever)])
        state = agent.invoke({"messages": [HumanMessage("Which owl?")]})
        picking = ChatBeaconMemory(
            memory=memory, max_tokens=6, temperature=0, document_ids=None, model_kwargs={"limit": k}
        )
        for answer in (chained, state["messages"][-1], picking.invoke("Which owl?")):
            assert answer.response_metadata["document_ids"] == expected


def test_documents_of_an_index_are_left_out_that_do_not_fit_into_the_slots_of_the_retriever(tmp_path: Path) -> None:
    memory = crowded(tmp_path)
    model = ChatBeaconMemory(memory=memory, max_tokens=8, temperature=0)
    found = [Document("x", metadata={"document_id": id}) for id in ("one", "two", "three")]
    inner = Fixed(documents=found)
    assert create_memory_chain(model, inner).invoke("?").response_metadata["document_ids"] == ["one", "two", "three"]
    bound = memory.show("one").slots + memory.show("three").slots
    assert BeaconMemoryRetriever(memory=memory, inner=inner, max_slots=bound).invoke("?") == [found[0], found[2]]
    assert BeaconMemoryRetriever(memory=memory, inner=inner).invoke("?") == found
    own = BeaconMemoryRetriever(memory=memory, max_slots=0)
    assert own.ids(own.invoke("Which owl?")) == [memory.pick("Which owl?")[0].id]
