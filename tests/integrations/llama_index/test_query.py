"""Ingestion, retrieval and answers from compressed documents, with their nodes kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from event_loop import awake_during
from llama_index.core import MockEmbedding, PromptTemplate, VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import (
    BaseNode,
    Document,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
    TransformComponent,
)
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index_beacon_memory import (
    BeaconCompressionTransform,
    BeaconMemoryBlock,
    BeaconMemoryLLM,
    BeaconQueryEngine,
    BeaconRetriever,
    BeaconSynthesizer,
)
from llama_index_beacon_memory.nodes import KEY, document_id
from llama_index_samples import OWLS, ROOF, WELL, make_llm
from tiny_models import tiny_base, tiny_checkpoint, tiny_model, tiny_tokenizer

from beacon_memory import BeaconMemory, ConfigError, DocumentNotFoundError, InputError, QuotaError
from beacon_memory.config import BeaconConfig

QUESTION = "Who mended the roof of the barn?"


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[BeaconMemoryLLM]:
    llm = make_llm(tmp_path / "store")
    yield llm
    llm.memory.close()


def documents() -> list[Document]:
    texts = {"roof": ROOF, "well": WELL, "owls": OWLS}
    return [Document(id_=id, text=text, metadata={"source": f"{id}.txt"}) for id, text in texts.items()]


def compress(llm: BeaconMemoryLLM, nodes: Sequence[BaseNode] = (), **settings: Any) -> list[BaseNode]:
    transform = BeaconCompressionTransform(memory=llm.memory, **{"ratio": 2, **settings})
    return list(transform(nodes or documents()))


def answer(llm: BeaconMemoryLLM, *ids: str, question: str = QUESTION) -> str:
    return llm.memory.ask(question, ids, max_new_tokens=8).text


class Fixed(BaseRetriever):
    """Finds the same nodes for every question."""

    def __init__(self, nodes: Sequence[BaseNode]) -> None:
        self.nodes = nodes
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:  # noqa: ARG002  # the same for every one
        return [NodeWithScore(node=node, score=1.0 - n / 10) for n, node in enumerate(self.nodes)]


# --- ingestion


def test_classes() -> None:
    assert TransformComponent in BeaconCompressionTransform.__mro__
    assert BeaconCompressionTransform.class_name() == "BeaconCompressionTransform"
    assert BaseRetriever in BeaconRetriever.__mro__
    assert BaseSynthesizer in BeaconSynthesizer.__mro__
    assert RetrieverQueryEngine in BeaconQueryEngine.__mro__


def test_pipeline_compresses_documents_and_nodes_say_where_they_are(llm: BeaconMemoryLLM) -> None:
    pipeline = IngestionPipeline(transformations=[BeaconCompressionTransform(memory=llm.memory, ratio=2)])
    nodes = pipeline.run(documents=documents())
    assert [(node.node_id, node.metadata[KEY]) for node in nodes] == [(id, id) for id in ("roof", "well", "owls")]
    assert nodes[0].get_content() == ROOF
    for mode in (MetadataMode.EMBED, MetadataMode.LLM):
        assert KEY not in nodes[0].get_content(mode)
    row = llm.memory.show("roof")
    assert (row.ratios, row.metadata, llm.memory.store.text("roof")) == ((2,), {"source": "roof.txt"}, ROOF)


def test_pipeline_compresses_without_blocking_the_event_loop(llm: BeaconMemoryLLM) -> None:
    pipeline = IngestionPipeline(transformations=[BeaconCompressionTransform(memory=llm.memory, ratio=2)])

    assert asyncio.run(awake_during(pipeline.arun(documents=[Document(id_="roof", text=ROOF * 20)]))) > 0.05
    assert llm.memory.show("roof").tokens == len(ROOF) * 20


def test_pieces_that_are_cut_from_a_document_lead_to_its_memory(llm: BeaconMemoryLLM) -> None:
    transform = BeaconCompressionTransform(memory=llm.memory, ratio=2)
    splitter = SentenceSplitter(chunk_size=16, chunk_overlap=0)
    whole = Document(id_="barn", text=f"{ROOF} {OWLS}")
    pieces = IngestionPipeline(transformations=[transform, splitter]).run(documents=[whole])
    assert len(pieces) > 1
    assert {piece.metadata[KEY] for piece in pieces} == {"barn"}
    assert [row.id for row in llm.memory.list()] == ["barn"]

    apart = IngestionPipeline(transformations=[splitter, transform]).run(documents=[whole])
    assert {piece.metadata[KEY] for piece in apart} == {piece.node_id for piece in apart}
    assert len(llm.memory.list()) == 1 + len(apart)


def test_metadata_becomes_part_of_the_text_if_asked_for(llm: BeaconMemoryLLM) -> None:
    compress(llm, documents()[:1], metadata_mode=MetadataMode.LLM)
    assert llm.memory.store.text("roof") == f"source: roof.txt\n\n{ROOF}"


def test_nodes_without_text_pass_through(llm: BeaconMemoryLLM) -> None:
    empty = TextNode(id_="empty", text=" \n")
    assert compress(llm, [empty, *documents()[:1]])[0] is empty
    assert KEY not in empty.metadata
    assert [row.id for row in llm.memory.list()] == ["roof"]


def test_document_that_is_too_long_is_left_out_and_the_others_go_on(
    llm: BeaconMemoryLLM, caplog: pytest.LogCaptureFixture
) -> None:
    texts = {"roof": ROOF, "long": "word " * 2000, "broken": "half a \ud83d", "owls": OWLS}
    documents = [Document(id_=id, text=text) for id, text in texts.items()]
    transform = BeaconCompressionTransform(memory=llm.memory, ratio=2, compression="beacon")
    nodes = IngestionPipeline(transformations=[transform], disable_cache=True).run(documents=documents)
    assert [node.node_id for node in nodes] == ["roof", "owls"]
    assert [row.id for row in llm.memory.list()] == ["owls", "roof"]
    assert "the node 'long' is left out: document 'long': 10000 tokens at ratio 2 need" in caplog.text
    assert "the node 'broken' is left out: " in caplog.text
    with pytest.raises(ConfigError, match="ratio"):  # no fault of one document
        BeaconCompressionTransform(memory=llm.memory, ratio=-1)(documents)
    llm.memory.store.configure(quota=1)
    with pytest.raises(QuotaError):
        transform([Document(id_="well", text=WELL)])


def test_metadata_that_json_cannot_hold_is_kept_as_text(llm: BeaconMemoryLLM) -> None:
    compress(llm, [TextNode(id_="roof", text=ROOF, metadata={"path": Path("a/b"), KEY: "well", "n": 1})])
    assert llm.memory.show("roof").metadata == {"path": "a/b", "n": 1}


def held(llm: BeaconMemoryLLM) -> dict[str, str]:
    """The texts in the store, by id."""
    return {row.id: llm.memory.store.text(row.id) for row in llm.memory.list()}


@pytest.mark.filterwarnings("ignore:docstore_strategy=.upserts. requires a vector store")
@pytest.mark.parametrize("splitting", [False, True])
@pytest.mark.parametrize("docstore", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_store_holds_what_the_last_run_was_given(
    llm: BeaconMemoryLLM, docstore: bool, splitting: bool, asynchronous: bool
) -> None:
    steps: list[TransformComponent] = [BeaconCompressionTransform(memory=llm.memory, ratio=2)]
    steps += [SentenceSplitter(chunk_size=16, chunk_overlap=0)] if splitting else []
    pipeline = IngestionPipeline(transformations=steps, docstore=SimpleDocumentStore() if docstore else None)

    def run(id: str, text: str) -> list[str]:
        given = [Document(id_=id, text=text)]
        nodes = asyncio.run(pipeline.arun(documents=given)) if asynchronous else pipeline.run(documents=given)
        return sorted({node.metadata[KEY] for node in nodes})

    for text in (ROOF, WELL, ROOF, ROOF + WELL, ROOF):  # each but the first was another before
        assert run("page", text) == ["page"]
        assert held(llm) == {"page": text}
    if not docstore:  # which takes the same text under another id for a duplicate
        assert run("copy", ROOF) == ["copy"]
        assert held(llm) == {"page": ROOF, "copy": ROOF}
        llm.memory.remove("copy")
        assert run("copy", ROOF) == ["copy"]
        assert held(llm) == {"page": ROOF, "copy": ROOF}


def test_text_that_is_stored_is_not_compressed_again(llm: BeaconMemoryLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    transform = BeaconCompressionTransform(memory=llm.memory, ratio=2)
    pipeline = IngestionPipeline(transformations=[transform])
    statuses: list[str] = []
    add_many = transform.memory.add_many

    def noting(*args: Any, **kwargs: Any) -> Any:
        done = add_many(*args, **kwargs)
        statuses.extend(one.status for one in done)
        return done

    monkeypatch.setattr(transform.memory, "add_many", noting)
    for _ in range(3):
        pipeline.run(documents=documents()[:1])
    assert statuses == ["added", "unchanged", "unchanged"]


def test_steps_behind_it_are_spared_by_the_cache(llm: BeaconMemoryLLM) -> None:
    splitter = SentenceSplitter(chunk_size=16, chunk_overlap=0)
    pipeline = IngestionPipeline(transformations=[BeaconCompressionTransform(memory=llm.memory, ratio=2), splitter])
    first, second = (pipeline.run(documents=documents()) for _ in range(2))
    assert [node.node_id for node in first] == [node.node_id for node in second]  # a splitter draws new ids


@pytest.mark.filterwarnings("ignore:docstore_strategy=.upserts. requires a vector store")
@pytest.mark.parametrize("vectors", [False, True])
def test_docstore_recognises_documents_that_it_has_seen(llm: BeaconMemoryLLM, vectors: bool) -> None:
    store = SimpleVectorStore() if vectors else None  # with one, changed documents take the place of old ones
    ours = [BeaconCompressionTransform(memory=llm.memory, ratio=2), MockEmbedding(embed_dim=4)]
    stock = [SentenceSplitter(), MockEmbedding(embed_dim=4)]
    runs = [
        [len(pipeline.run(documents=documents())) for _ in range(3)]
        for pipeline in (
            IngestionPipeline(transformations=steps, docstore=SimpleDocumentStore(), vector_store=store)
            for steps in (ours, stock)
        )
    ]
    assert runs == [[3, 0, 0], [3, 0, 0]]


def test_nodes_that_are_given_stay_as_they_are(llm: BeaconMemoryLLM) -> None:
    given = [*documents(), TextNode(id_="node", text=OWLS, metadata={KEY: "owls", "n": [1]})]
    before = [(node.model_dump(), node.hash) for node in given]
    marked = compress(llm, given)
    assert [(node.model_dump(), node.hash) for node in given] == before
    assert [node.metadata[KEY] for node in marked] == [node.node_id for node in given]


def test_written_form_makes_the_same_transform_again(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", tiny_base("llama", max_position_embeddings=4096))
    transform = BeaconCompressionTransform(
        tmp_path / "store", model=str(folder), namespace="alice", ratio=4, metadata_mode=MetadataMode.EMBED
    )
    written = json.loads(json.dumps(transform.to_dict()))
    again = BeaconCompressionTransform.from_dict(written)
    assert again.to_dict() | {"run": ""} == transform.to_dict() | {"run": ""}
    assert (again.ratio, again.metadata_mode, again.memory.store.namespace) == (4, MetadataMode.EMBED, "alice")
    again(documents()[:1])
    assert transform.memory.show("roof").ratios == (4,)


# --- retrieval


def test_retriever_finds_documents_by_the_words_of_their_passages(llm: BeaconMemoryLLM) -> None:
    compress(llm)
    retriever = BeaconRetriever(llm.memory)
    (found,) = retriever.retrieve(QUESTION)
    assert asyncio.run(retriever.aretrieve(QUESTION)) == [found]
    node = found.node
    assert (node.node_id, node.get_content(), node.metadata["source"]) == ("roof", ROOF, "roof.txt")
    assert (node.metadata[KEY], node.ref_doc_id) == ("roof", "roof")
    assert (node.start_char_idx, node.end_char_idx) == (0, len(ROOF))
    assert found.score == llm.memory.store.search(QUESTION)[0].score > 0
    assert retriever.retrieve("zebra") == []


def test_retriever_returns_the_best_documents_first_and_no_more_than_asked_for(llm: BeaconMemoryLLM) -> None:
    texts = [("one", "owls and mice"), ("two", "owls, owls and bats"), ("three", "owls and hens"), ("four", "bees")]
    compress(llm, [Document(id_=id, text=text) for id, text in texts])
    found = BeaconRetriever(llm.memory, 2).retrieve("owls bats")
    assert found[0].node.node_id == "two"
    assert len(found) <= 2
    found = BeaconRetriever(llm.memory, 3).retrieve("owls")
    assert sorted(one.node.node_id for one in found) == ["one", "three", "two"]
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    with pytest.raises(InputError, match="similarity_top_k=0 must be at least 1"):
        BeaconRetriever(llm.memory, 0)


def test_retriever_leaves_out_what_does_not_fit_beside_better_documents(llm: BeaconMemoryLLM) -> None:
    compress(llm, [Document(id_="best", text="owls owls owls"), Document(id_="long", text="owls, owls and so on " * 4)])
    compress(llm, [Document(id_="short", text="owls and so on")])
    slots = {row.id: row.slots for row in llm.memory.list()}
    found = BeaconRetriever(llm.memory, max_slots=slots["best"] + slots["short"]).retrieve("owls")
    assert sorted(one.node.node_id for one in found) == ["best", "short"]
    assert [one.node.node_id for one in BeaconRetriever(llm.memory).retrieve("owls")] == ["best", "long", "short"]
    inner = Fixed([TextNode(id_=id, text=id) for id in ("best", "long", "short")])
    found = BeaconRetriever(llm.memory, retriever=inner, max_slots=slots["best"] + slots["short"]).retrieve("owls")
    assert [one.node.node_id for one in found] == ["best", "short"]


def crowded(folder: Path) -> BeaconMemory:
    """Documents that match one question, more or less, and do not all fit the model together."""
    settings = BeaconConfig(beacon_window=32)
    small = tiny_model("llama", settings, tokenizer=tiny_tokenizer(), max_position_embeddings=512)
    memory = BeaconMemory(folder, small, reserve=60)
    texts = {"one": "owl " * 170, "two": "owl " * 140 + "hen " * 20, "three": "owl and owl"}
    memory.add_many([*texts.items(), ("bees", "bees " * 60 + "owl " + "bees " * 13)], ratio=2)
    memory.add("hens", "hens, ducks and geese " * 10, ratio=2)
    return memory


@pytest.mark.parametrize("streaming", [False, True])
def test_retriever_engine_and_model_load_what_ask_loads(tmp_path: Path, streaming: bool) -> None:
    memory = crowded(tmp_path)
    slots = {row.id: row.slots for row in memory.list()}
    llm = BeaconMemoryLLM(memory=memory, max_tokens=8)
    asked = "Which owl?"
    picks = memory.pick(asked, 4)
    ids = [pick.id for pick in picks]
    assert {hit.document for hit in memory.store.search(asked, 100)} - set(ids) == {"bees"}  # too weak
    assert sum(slots[id] for id in ids) > memory.model.max_positions  # and the others do not fit together
    found = BeaconRetriever(memory, 4).retrieve(asked)
    assert [(one.node.node_id, one.score) for one in found] == [(pick.id, pick.best.score) for pick in picks]
    expected = memory.ask(asked, limit=4, max_new_tokens=8, temperature=0)
    assert list(expected.ids) == ids
    engine = BeaconQueryEngine.from_llm(llm, similarity_top_k=4, streaming=streaming)
    for response in (engine.query(asked), asyncio.run(engine.aquery(asked)) if not streaming else engine.query(asked)):
        assert tuple(one.node.node_id for one in response.source_nodes) == expected.ids
        text = str(response.get_response()) if isinstance(response, StreamingResponse) else str(response)
        assert text.strip() == expected.text
    expected = memory.ask(asked, max_new_tokens=8, temperature=0)
    assert llm.chat([ChatMessage(asked)], document_ids=None).raw["document_ids"] == list(expected.ids)
    assert llm.chat([ChatMessage(asked)], document_ids=ids).raw["document_ids"] == ids


@pytest.mark.parametrize("streaming", [False, True])
def test_engine_with_a_budget_loads_a_part_of_all_that_was_found(tmp_path: Path, streaming: bool) -> None:
    memory = crowded(tmp_path)
    picks = [pick.id for pick in memory.pick("Which owl?", 4)]
    llm = BeaconMemoryLLM(memory=memory, max_tokens=8, budget="x8")
    response = BeaconQueryEngine.from_llm(llm, similarity_top_k=4, streaming=streaming).query("Which owl?")
    assert [one.node.node_id for one in response.source_nodes] == picks
    expected = memory.ask("Which owl?", limit=4, budget="x8", max_new_tokens=8, temperature=0)
    assert list(expected.ids) == picks
    text = str(response.get_response()) if isinstance(response, StreamingResponse) else str(response)
    assert text.strip() == expected.text


def test_found_documents_leave_room_for_the_conversation(tmp_path: Path) -> None:
    memory = crowded(tmp_path)
    llm = BeaconMemoryLLM(memory=memory, max_tokens=8)
    block = BeaconMemoryBlock(llm=llm, slots=200)
    block.session("monday").add([{"role": "user", "content": "hello " * 40}])
    messages = [*asyncio.run(block.aget(session_id="monday")), ChatMessage("Which owl?")]
    answer = llm.chat(messages, document_ids=None).raw
    assert answer["document_ids"] == [*(pick.id for pick in memory.pick("Which owl?")), "BeaconMemory/monday/1"]
    assert {source["document"] for source in answer["sources"]} >= {"BeaconMemory/monday/1"}


def test_conversations_are_not_found_as_documents(llm: BeaconMemoryLLM) -> None:
    block = BeaconMemoryBlock(llm=llm)
    compress(llm, documents()[:1])
    session = block.session("monday")
    session.add([{"role": "user", "content": ROOF}, {"role": "assistant", "content": "The roof of the barn, I see."}])
    assert {hit.document for hit in llm.memory.store.search(QUESTION)} == {"roof", "BeaconMemory/monday/1"}
    assert [one.node.node_id for one in BeaconRetriever(llm.memory).retrieve(QUESTION)] == ["roof"]


def test_nodes_of_another_retriever_lead_to_their_documents(llm: BeaconMemoryLLM) -> None:
    splitter = SentenceSplitter(chunk_size=16, chunk_overlap=0)
    transform = BeaconCompressionTransform(memory=llm.memory, ratio=2)
    nodes = IngestionPipeline(transformations=[transform, splitter]).run(documents=documents())
    index = VectorStoreIndex(nodes, embed_model=MockEmbedding(embed_dim=4))
    inner = index.as_retriever(similarity_top_k=len(nodes))
    retriever = BeaconRetriever(llm.memory, retriever=inner)
    found = retriever.retrieve(QUESTION)
    assert {one.node.node_id for one in found} == {node.node_id for node in nodes}
    assert {document_id(llm.memory, one.node) for one in found} == {"roof", "well", "owls"}
    assert {one.node.node_id for one in asyncio.run(retriever.aretrieve(QUESTION))} == {n.node_id for n in nodes}


def test_nodes_are_known_by_their_own_id_or_that_of_their_source(llm: BeaconMemoryLLM) -> None:
    compress(llm)
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="well")}
    nodes = [TextNode(id_="roof", text="x"), TextNode(id_="piece", text="x", relationships=source)]
    found = BeaconRetriever(llm.memory, retriever=Fixed(nodes)).retrieve(QUESTION)
    assert [(one.node.node_id, document_id(llm.memory, one.node)) for one in found] == [
        ("roof", "roof"),
        ("piece", "well"),
    ]


def test_nodes_without_a_memory_are_an_error_or_compressed(llm: BeaconMemoryLLM) -> None:
    inner = Fixed([TextNode(id_="new", text=ROOF)])
    with pytest.raises(DocumentNotFoundError, match="node 'new' has no memory in this store and namespace"):
        BeaconRetriever(llm.memory, retriever=inner).retrieve(QUESTION)
    transform = BeaconCompressionTransform(memory=llm.memory, ratio=4, compression="beacon")
    (found,) = BeaconRetriever(llm.memory, retriever=inner, transform=transform).retrieve(QUESTION)
    assert document_id(llm.memory, found.node) == "new"
    assert found.node.metadata == {}  # a node of somebody else's index stays as it is
    assert llm.memory.show("new").ratios == (4,)
    more = Fixed([TextNode(id_="long", text="word " * 8000), *inner.nodes])  # one that is too long is left out
    (found,) = BeaconRetriever(llm.memory, retriever=more, transform=transform).retrieve(QUESTION)
    assert found.node.node_id == "new"
    other = BeaconCompressionTransform(memory=llm.memory.within("alice"))
    with pytest.raises(InputError, match="compresses into another store or namespace"):
        BeaconRetriever(llm.memory, retriever=inner, transform=other)


# --- answers


def test_answer_comes_from_the_memory_of_the_nodes_and_keeps_them(llm: BeaconMemoryLLM) -> None:
    compress(llm)
    engine = BeaconQueryEngine.from_llm(llm)
    response = engine.query(QUESTION)
    assert isinstance(response, Response)
    assert response.response == answer(llm, "roof") != answer(llm)
    assert [one.node.node_id for one in response.source_nodes] == ["roof"]
    assert response.metadata is not None
    assert response.metadata["roof"]["source"] == "roof.txt"


def test_every_way_to_ask_gives_the_same_answer(llm: BeaconMemoryLLM) -> None:
    compress(llm)
    expected = answer(llm, "roof")

    async def ask() -> tuple[Any, Any, str]:
        plain = await BeaconQueryEngine.from_llm(llm).aquery(QUESTION)
        streamed = await BeaconQueryEngine.from_llm(llm, streaming=True).aquery(QUESTION)
        assert isinstance(streamed, AsyncStreamingResponse)
        return plain, streamed, "".join([piece async for piece in streamed.async_response_gen()])

    plain, streamed, text = asyncio.run(ask())
    assert plain.response == text.strip() == expected
    response = BeaconQueryEngine.from_llm(llm, streaming=True).query(QUESTION)
    assert isinstance(response, StreamingResponse)
    assert str(response.get_response()).strip() == expected
    for one in (plain, streamed, response):
        assert [source.node.node_id for source in one.source_nodes] == ["roof"]


def test_several_documents_are_loaded_once_each_in_the_order_of_their_nodes(llm: BeaconMemoryLLM) -> None:
    compress(llm)
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="well")}
    nodes = [TextNode(id_=str(n), text="x", relationships=source) for n in range(2)]
    found = [NodeWithScore(node=node) for node in (nodes[0], documents()[0], nodes[1])]
    extra = [NodeWithScore(node=documents()[2])]
    response = BeaconSynthesizer(llm).synthesize(QUESTION, found, extra)
    assert str(response) == answer(llm, "well", "roof")
    assert response.source_nodes == found + extra


def test_texts_of_nodes_do_not_reach_the_prompt(llm: BeaconMemoryLLM) -> None:
    compress(llm)
    lies = TextNode(id_="roof", text="The roof was mended by Josiah.")
    assert str(BeaconSynthesizer(llm).synthesize(QUESTION, [NodeWithScore(node=lies)])) == answer(llm, "roof")


def test_no_nodes_no_answer(llm: BeaconMemoryLLM) -> None:
    compress(llm)
    engine = BeaconQueryEngine.from_llm(llm)
    assert str(engine.query("zebra")) == "Empty Response"
    assert str(asyncio.run(engine.aquery("zebra"))) == "Empty Response"


def test_prompt_can_be_changed(llm: BeaconMemoryLLM) -> None:
    compress(llm)
    engine = BeaconQueryEngine.from_llm(llm)
    assert set(engine.get_prompts()) == {"response_synthesizer:text_qa_template"}
    engine.update_prompts({"response_synthesizer:text_qa_template": PromptTemplate("In one word: {query_str}")})
    assert str(engine.query(QUESTION)) == answer(llm, "roof", question=f"In one word: {QUESTION}")
    template = PromptTemplate("Say: {query_str}")
    expected = answer(llm, "roof", question=f"Say: {QUESTION}")
    assert str(BeaconQueryEngine.from_llm(llm, text_qa_template=template).query(QUESTION)) == expected


def test_postprocessors_decide_what_is_loaded(llm: BeaconMemoryLLM) -> None:
    compress(llm)
    inner = Fixed([documents()[1], documents()[0]])
    cutoff = SimilarityPostprocessor(similarity_cutoff=0.95)
    response = BeaconQueryEngine.from_llm(llm, retriever=inner, node_postprocessors=[cutoff]).query(QUESTION)
    assert [one.node.node_id for one in response.source_nodes] == ["well"]
    assert str(response) == answer(llm, "well")


def test_engine_compresses_what_another_retriever_finds(llm: BeaconMemoryLLM) -> None:
    transform = BeaconCompressionTransform(memory=llm.memory, ratio=2)
    engine = BeaconQueryEngine.from_llm(llm, retriever=Fixed(documents()[:1]), transform=transform)
    assert str(engine.query(QUESTION)) == answer(llm, "roof")


def test_synthesizer_needs_a_model_and_nodes_with_memories(llm: BeaconMemoryLLM) -> None:
    with pytest.raises(InputError, match="llm must be a BeaconMemoryLLM, which can load memories, got MockLLM"):
        BeaconSynthesizer(MockLLM())  # type: ignore[arg-type]
    synthesizer = BeaconSynthesizer(llm)
    with pytest.raises(InputError, match="texts alone have no memory"):
        synthesizer.get_response(QUESTION, [ROOF])
    unknown = [NodeWithScore(node=TextNode(id_="unknown", text=ROOF))]
    for ask in (synthesizer.synthesize, lambda *given: asyncio.run(synthesizer.asynthesize(*given))):
        with pytest.raises(DocumentNotFoundError, match="node 'unknown' has no memory in the store and namespace"):
            ask(QUESTION, unknown)


def test_ten_questions_at_a_time_get_the_answers_of_one_after_the_other(llm: BeaconMemoryLLM) -> None:
    compress(llm)
    engine = BeaconQueryEngine.from_llm(llm)
    questions = [f"{n}: {what}" for n in range(5) for what in (QUESTION, "How deep is the well?")]
    alone = [str(engine.query(question)) for question in questions]

    async def gathered() -> list[str]:
        return [str(response) for response in await asyncio.gather(*map(engine.aquery, questions))]

    assert asyncio.run(gathered()) == alone
    assert len(set(alone)) > 5


# --- whose documents


@pytest.mark.parametrize("claim", [KEY, "id", "source"])
def test_node_cannot_lead_to_another_namespace(llm: BeaconMemoryLLM, claim: str) -> None:
    alice = llm.within("alice")
    compress(alice, [Document(id_="diary", text=ROOF)])
    claims = {"namespace": "alice", "store": str(alice.memory.store.folder), "memory": "alice/diary"}
    node = TextNode(id_="mine", text=OWLS, metadata=claims)
    if claim == KEY:
        node.metadata[KEY] = "diary"
    elif claim == "id":
        node.id_ = "diary"
    else:
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id="diary")
    with pytest.raises(DocumentNotFoundError):
        BeaconRetriever(llm.memory, retriever=Fixed([node])).retrieve(QUESTION)
    with pytest.raises(DocumentNotFoundError):
        BeaconSynthesizer(llm).synthesize(QUESTION, [NodeWithScore(node=node)])
    assert BeaconRetriever(llm.memory).retrieve(QUESTION) == []
    compress(llm, [Document(id_="diary", text=WELL)])  # the same id in the namespace that is asked
    response = BeaconSynthesizer(llm).synthesize(QUESTION, [NodeWithScore(node=node)])
    assert str(response) == answer(llm, "diary") != answer(alice, "diary")


def test_metadata_cannot_lead_the_transform_to_another_namespace_or_document(llm: BeaconMemoryLLM) -> None:
    compress(llm, [Document(id_="diary", text=WELL)])
    claims = {"namespace": "alice", KEY: "diary", "id": "diary", "store": "elsewhere"}
    (node,) = compress(llm, [TextNode(id_="mine", text=ROOF, metadata=claims)])
    assert node.metadata[KEY] == "mine"
    assert llm.memory.store.namespaces() == [""]
    assert llm.memory.store.text("diary") == WELL


@pytest.mark.parametrize("question", ["namespace:alice roof", "alice/diary", 'document:"diary" OR roof', "../alice"])
def test_question_cannot_lead_to_another_namespace(llm: BeaconMemoryLLM, question: str) -> None:
    compress(llm.within("alice"), [Document(id_="diary", text=ROOF)])
    compress(llm, [Document(id_="well", text=WELL), Document(id_="owls", text=OWLS)])
    assert BeaconRetriever(llm.memory).retrieve(question) == []
    assert str(BeaconQueryEngine.from_llm(llm).query(question)) == "Empty Response"
