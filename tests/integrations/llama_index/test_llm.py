"""BeaconMemoryLLM: the answers of BeaconMemory.ask, in every way in which LlamaIndex asks for one."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llama_index_beacon_memory
import pytest
from event_loop import awake_during
from llama_index.core.agent.react.formatter import ReActChatFormatter
from llama_index.core.agent.react.types import ActionReasoningStep, ObservationReasoningStep
from llama_index.core.base.llms.types import (
    ChatMessage,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms import LLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index_beacon_memory import BeaconMemoryLLM, BeaconSynthesizer
from llama_index_beacon_memory.messages import to_turns
from llama_index_samples import ROOF, WELL, make_llm, model, saying
from tiny_models import tiny_base, tiny_checkpoint, tiny_model, tiny_tokenizer

from beacon_memory import BeaconMemory, DocumentNotFoundError, InputError
from beacon_memory.config import BeaconConfig

QUESTION = [ChatMessage("Who mended the roof?")]


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[BeaconMemoryLLM]:
    llm = make_llm(tmp_path / "store")
    llm.memory.add("roof", ROOF, ratio=2)
    llm.memory.add("well", WELL, ratio=2)
    yield llm
    llm.memory.close()


def generating(llm: BeaconMemoryLLM) -> list[Any]:
    """The requests that the model would go on with."""
    loop = llm.memory._loop
    return [row for row in (*loop._rows, *loop._waiting) if not row.ticket.done]


# --- conventions


def test_package_has_the_names_it_says_and_no_others() -> None:
    assert llama_index_beacon_memory.__all__ == [
        "BeaconCompressionTransform",
        "BeaconMemoryBlock",
        "BeaconMemoryLLM",
        "BeaconQueryEngine",
        "BeaconRetriever",
        "BeaconSynthesizer",
    ]
    assert all(hasattr(llama_index_beacon_memory, name) for name in llama_index_beacon_memory.__all__)


def test_class() -> None:
    bases = [base.__name__ for base in BeaconMemoryLLM.__mro__]
    assert FunctionCallingLLM.__name__ in bases
    assert LLM.__name__ in bases
    assert BeaconMemoryLLM.class_name() == "BeaconMemoryLLM"


def test_written_form_makes_the_same_model_again(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", tiny_base("llama", max_position_embeddings=4096))
    llm = BeaconMemoryLLM(
        tmp_path / "store", model=str(folder), namespace="alice", document_ids=["roof"], max_tokens=6, stop=["."]
    )
    llm.memory.add("roof", ROOF, ratio=2)
    written = json.loads(json.dumps(llm.to_dict()))
    assert written["class_name"] == "BeaconMemoryLLM"
    for again in (BeaconMemoryLLM.from_dict(written), pickle.loads(pickle.dumps(llm))):  # noqa: S301  # our own
        assert again.to_dict() == llm.to_dict()
        assert again.memory.store.namespace == "alice"
        assert again.chat(QUESTION).message == llm.chat(QUESTION).message


def test_written_form_names_the_model_of_a_memory_that_was_given(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", tiny_base("llama", max_position_embeddings=4096))
    llm = BeaconMemoryLLM(memory=BeaconMemory(tmp_path / "store", folder), max_tokens=6)
    assert llm.to_dict()["model"] == str(folder)
    again = BeaconMemoryLLM.from_dict(llm.to_dict())
    assert again.chat(QUESTION).message == llm.chat(QUESTION).message


def test_a_model_without_a_name_is_not_replaced_by_another_in_silence(llm: BeaconMemoryLLM) -> None:
    with pytest.raises(InputError, match="made with a model that has no name; give it memory="):
        BeaconMemoryLLM.from_dict(llm.to_dict())
    again = BeaconMemoryLLM.from_dict(llm.to_dict(), memory=llm.memory)
    assert again.chat(QUESTION).message == llm.chat(QUESTION).message


def test_store_or_memory_is_needed_and_they_must_not_differ(llm: BeaconMemoryLLM, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="BeaconMemoryLLM needs a store, the folder of the documents, or a memory"):
        BeaconMemoryLLM()
    with pytest.raises(InputError, match="is not the store of the memory"):
        BeaconMemoryLLM(tmp_path / "another", memory=llm.memory)


def test_a_budget_bounds_what_is_loaded_and_sources_say_what_that_was(llm: BeaconMemoryLLM) -> None:
    ids = ["roof", "well"]
    whole, part = (
        llm.memory.ask("Who mended the roof?", ids, budget=budget, max_new_tokens=8) for budget in (None, "x8")
    )
    assert part.usage.slots < whole.usage.slots
    with_budget = BeaconMemoryLLM(memory=llm.memory, max_tokens=8, budget="x8")
    for response, answer in (
        (llm.chat(QUESTION, document_ids=ids), whole),
        (llm.chat(QUESTION, document_ids=ids, budget="x8"), part),
        (with_budget.chat(QUESTION, document_ids=ids), part),
        (with_budget.complete(str(QUESTION[0].content), document_ids=ids), part),
    ):
        assert response.raw["sources"] == [asdict(source) for source in answer.sources]
        assert response.raw["usage"]["memory_slots"] == answer.usage.slots
    with pytest.raises(InputError, match="budget='much' must be"):
        llm.chat(QUESTION, document_ids=ids, budget="much")


def test_metadata_is_that_of_the_model(llm: BeaconMemoryLLM, tmp_path: Path) -> None:
    metadata = llm.metadata
    assert (metadata.context_window, metadata.num_output) == (4096, 8)
    assert (metadata.is_chat_model, metadata.is_function_calling_model) == (True, False)
    assert metadata.model_name == "BeaconMemoryLLM"  # the tiny model has no name
    with_tools = make_llm(tmp_path / "tools", tools=True)
    assert with_tools.metadata.is_function_calling_model
    folder = tiny_checkpoint(tmp_path / "model", tiny_base("llama"))
    assert BeaconMemoryLLM(tmp_path / "named", model=str(folder)).metadata.model_name == str(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% if tools %}{{ raise_exception('no tools, please') }}{% endif %}{{ messages[0].content }}",
        "{% if tools %}{{ tools | tojson }} as [TOOL_CALLS]{% endif %}{{ messages[0].content }}",
        "{% for tool in tools or [] %}{{ tool.function.parameters.properties | items | list }}{% endfor %}",
    ],
)
def test_models_that_write_calls_in_another_way_are_not_offered_to_agents(template: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    settings = BeaconConfig(beacon_window=32)
    odd = BeaconMemoryLLM(memory=BeaconMemory(tmp_path, tiny_model("llama", settings, tokenizer=tokenizer)))
    assert not odd.metadata.is_function_calling_model


def test_events_do_not_load_the_model(tmp_path: Path) -> None:
    llm = BeaconMemoryLLM(tmp_path, model="no such model")
    assert llm.to_payload()["model"] == "no such model"


# --- answers


def test_every_way_to_ask_gives_the_answer_of_the_memory(llm: BeaconMemoryLLM) -> None:
    question = "Who mended the roof?"
    expected = llm.memory.ask(question, ["roof"], max_new_tokens=8)
    asked: dict[str, Any] = {"document_ids": ["roof"]}

    async def answers() -> dict[str, Any]:
        return {
            "achat": (await llm.achat(QUESTION, **asked)).message.content,
            "acomplete": (await llm.acomplete(question, **asked)).text,
            "astream_chat": [r async for r in await llm.astream_chat(QUESTION, **asked)],
            "astream_complete": [r async for r in await llm.astream_complete(question, **asked)],
        }

    given = asyncio.run(answers())
    assert llm.chat(QUESTION, **asked).message.content == expected.text
    assert llm.complete(question, **asked).text == expected.text
    assert given["achat"] == given["acomplete"] == expected.text
    for chats in (list(llm.stream_chat(QUESTION, **asked)), given["astream_chat"]):
        assert chats[-1].message.content == expected.text
        assert "".join(chat.delta for chat in chats).strip() == expected.text
        assert chats[-1].raw["document_ids"] == ["roof"]
    for completions in (list(llm.stream_complete(question, **asked)), given["astream_complete"]):
        assert completions[-1].text == expected.text
        assert "".join(one.delta for one in completions).strip() == expected.text


def test_answer_says_what_it_rests_on(llm: BeaconMemoryLLM) -> None:
    response = llm.chat(QUESTION, document_ids=["well", "roof"])
    expected = llm.memory.ask("Who mended the roof?", ["well", "roof"], max_new_tokens=8)
    assert response.message.role == MessageRole.ASSISTANT
    assert response.raw["document_ids"] == ["well", "roof"]
    assert response.raw["usage"]["memory_slots"] == expected.usage.slots
    assert response.raw["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert response.additional_kwargs["completion_tokens"] == expected.usage.generated_tokens
    assert llm.complete("Who?").raw["document_ids"] == []


def test_documents_are_a_field_and_may_be_given_with_a_call(llm: BeaconMemoryLLM) -> None:
    of_well = make_llm(llm.memory.store.root, document_ids=["well"])
    assert of_well.chat(QUESTION).raw["document_ids"] == ["well"]
    assert of_well.chat(QUESTION, document_ids=["roof"]).raw["document_ids"] == ["roof"]
    assert of_well.chat(QUESTION, document_ids=[]).raw["document_ids"] == []
    texts = {tuple(ids): llm.chat(QUESTION, document_ids=ids).message.content for ids in ([], ["roof"], ["well"])}
    assert len(set(texts.values())) == 3  # what is loaded matters
    with pytest.raises(DocumentNotFoundError):
        llm.chat(QUESTION, document_ids=["rood"])
    assert of_well.chat(QUESTION, namespace=None, temperature=None, seed=None).raw["document_ids"] == ["well"]
    with pytest.raises(InputError, match=r"document_ids='roof' must be a list of ids; write \['roof'\]"):
        llm.chat(QUESTION, document_ids="roof")


def test_documents_are_picked_by_the_last_question_if_asked_for(llm: BeaconMemoryLLM) -> None:
    messages = [ChatMessage("Is the well deep?"), ChatMessage("Yes.", role="assistant"), *QUESTION]
    assert llm.chat(messages, document_ids=None).raw["document_ids"] == ["roof"]
    assert llm.chat([ChatMessage("What is the time?")], document_ids=None).raw["document_ids"] == []


def test_result_of_a_tool_is_not_taken_for_the_question(llm: BeaconMemoryLLM) -> None:
    result = "The well behind the mill is forty feet deep."
    call = ActionReasoningStep(thought="I look.", action="look_up", action_input={"place": "barn"})
    reasoning = [call, ObservationReasoningStep(observation=result)]
    reacting = ReActChatFormatter().format([], QUESTION, [*reasoning, *reasoning])
    assert (reacting[-1].role, reacting[-1].content) == ("user", f"Observation: {result}")
    block = ToolCallBlock(tool_call_id="1", tool_name="look_up", tool_kwargs={"place": "barn"})
    calling = [*QUESTION, ChatMessage(role="assistant", blocks=[block]), ChatMessage(result, role="tool")]
    for messages in (reacting, calling):
        assert llm.chat(messages, document_ids=None).raw["document_ids"] == ["roof"]
    said = [*QUESTION, ChatMessage("Ada.", role="assistant"), ChatMessage(f"Observation: {result}")]
    assert llm.chat(said, document_ids=None).raw["document_ids"] == ["well"]  # the user's own words


def test_namespace_is_a_field_and_may_be_given_with_a_call(llm: BeaconMemoryLLM) -> None:
    alice = llm.within("alice")
    alice.memory.add("roof", WELL, ratio=2)  # the same id, another text
    expected = alice.memory.ask("Who mended the roof?", ["roof"], max_new_tokens=8).text
    assert llm.memory.ask("Who mended the roof?", ["roof"], max_new_tokens=8).text != expected
    assert alice.chat(QUESTION, document_ids=["roof"]).message.content == expected
    assert llm.chat(QUESTION, document_ids=["roof"], namespace="alice").message.content == expected
    streamed = list(llm.stream_chat(QUESTION, document_ids=["roof"], namespace="alice"))
    assert streamed[-1].message.content == expected
    assert llm.namespace == llm.memory.store.namespace == ""
    with pytest.raises(DocumentNotFoundError):
        llm.chat(QUESTION, document_ids=["well"], namespace="alice")


@pytest.mark.parametrize("role", list(MessageRole))
def test_nothing_in_a_message_names_a_document_or_a_namespace(llm: BeaconMemoryLLM, role: MessageRole) -> None:
    llm.within("alice").memory.add("diary", ROOF, ratio=2)
    text = '{"namespace": "alice", "document_ids": ["diary"]} namespace=alice diary'
    claims = {"namespace": "alice", "document_ids": ["diary"], "session_id": "diary", "ids": ["diary"]}
    plain = llm.chat([ChatMessage(text, role=role), *QUESTION])
    claimed = llm.chat([ChatMessage(text, role=role, additional_kwargs=claims), *QUESTION])
    assert claimed.message == plain.message
    assert claimed.raw["document_ids"] == []
    found = llm.chat([ChatMessage(text, role=role, additional_kwargs=claims), *QUESTION], document_ids=None)
    assert found.raw["document_ids"] == ["roof"]


def test_sampling_follows_temperature_and_seed(llm: BeaconMemoryLLM) -> None:
    def texts(**options: Any) -> set[str | None]:
        return {llm.chat(QUESTION, max_tokens=12, **options).message.content for _ in range(3)}

    assert len(texts()) == 1  # greedy
    assert len(texts(temperature=5.0)) == 3
    assert len(texts(temperature=5.0, seed=7)) == 1
    assert texts(temperature=5.0, seed=7) != texts(temperature=5.0, seed=8)
    seeded = make_llm(llm.memory.store.root, temperature=5.0, seed=7, max_tokens=12)
    assert {seeded.chat(QUESTION).message.content} == texts(temperature=5.0, seed=7)


def test_max_tokens_and_stop_end_an_answer(llm: BeaconMemoryLLM) -> None:
    assert llm.chat(QUESTION, max_tokens=3).raw["usage"]["completion_tokens"] == 3
    says = make_llm(llm.memory.store.root, **saying("one, two, three"))
    assert says.chat(QUESTION).message.content == "one, two, three"
    assert says.chat(QUESTION, stop=[", three"]).message.content == "one, two"
    stopping = make_llm(llm.memory.store.root, stop=[", t"], **saying("one, two, three"))
    assert stopping.complete("Count.").text == "one"


def test_stream_comes_in_pieces_that_add_up(llm: BeaconMemoryLLM) -> None:
    says = make_llm(llm.memory.store.root, **saying("one, two, three"))
    responses = list(says.stream_chat(QUESTION))
    assert [response.delta for response in responses] == ["one, ", "two, ", "three", ""]
    assert [response.message.content for response in responses[1:-1]] == ["one, two, ", "one, two, three"]
    assert responses[-1].message.content == "one, two, three"
    assert "".join(response.delta for response in says.stream_chat(QUESTION, stop=[", th"])) == "one, two"
    assert [response.raw is None for response in responses] == [True, True, True, False]


def test_beams_are_not_streamed_but_asked_for_in_one_piece(llm: BeaconMemoryLLM) -> None:
    expected = llm.memory.ask("Who mended the roof?", ["roof"], max_new_tokens=8, num_beams=3).text
    options: dict[str, Any] = {"document_ids": ["roof"], "num_beams": 3}
    assert llm.chat(QUESTION, **options).message.content == expected
    assert asyncio.run(llm.achat(QUESTION, **options)).message.content == expected
    with pytest.raises(InputError, match="num_beams=3 cannot be streamed"):
        llm.stream_chat(QUESTION, **options)


def test_option_that_there_is_not_is_refused(llm: BeaconMemoryLLM) -> None:
    with pytest.raises(InputError, match="unknown generation options: top_q=1"):
        llm.chat(QUESTION, top_q=1)


def test_arguments_of_the_chat_template_come_from_constructor_or_call(llm: BeaconMemoryLLM) -> None:
    own = BeaconMemoryLLM(memory=llm.memory, generate_kwargs={"chat_template_kwargs": {"absent": 1}})
    nodes = [NodeWithScore(node=TextNode(id_="roof", text=ROOF))]
    for ask in (
        lambda: llm.chat(QUESTION, chat_template_kwargs={"absent": 1}),
        lambda: own.chat(QUESTION),
        lambda: BeaconSynthesizer(own).synthesize("Who?", nodes),
    ):
        with pytest.raises(InputError, match="absent=1 is not known to the model's chat template"):
            ask()


def test_system_prompt_and_completion_to_prompt_are_used(llm: BeaconMemoryLLM) -> None:
    formal = make_llm(llm.memory.store.root, system_prompt="Be formal.")
    assert (
        formal.predict(PromptTemplate("Who?"))
        == formal.chat([ChatMessage("Be formal.", role="system"), ChatMessage("Who?")]).message.content
    )
    polite = make_llm(llm.memory.store.root, completion_to_prompt=lambda prompt: f"Please: {prompt}")
    assert polite.complete("Who?").text == llm.complete("Please: Who?").text
    assert polite.complete("Who?", formatted=True).text == llm.complete("Who?").text


def test_token_counter_hears_of_the_models_own_tokens(llm: BeaconMemoryLLM) -> None:
    counter = TokenCountingHandler()
    counted = make_llm(llm.memory.store.root, callback_manager=CallbackManager([counter]))
    usage = counted.chat(QUESTION, document_ids=["roof"]).raw["usage"]
    (event,) = counter.llm_token_counts
    assert (event.prompt_token_count, event.completion_token_count) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )


# --- messages


def test_messages_become_turns_of_a_chat_template() -> None:
    call = ToolCallBlock(tool_call_id="1", tool_name="add", tool_kwargs='{"a": 2}')
    turns = to_turns(
        [
            ChatMessage("Be brief.", role="developer"),
            ChatMessage(role="user", blocks=[TextBlock(text="one"), TextBlock(text="two")]),
            ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm"), call]),
            ChatMessage("2", role="tool", additional_kwargs={"tool_call_id": "1"}),
            ChatMessage(role="model", blocks=[]),
        ]
    )
    function = {"name": "add", "arguments": {"a": 2}}
    assert turns == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "1", "function": function}]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": ""},
    ]


def test_calls_of_a_history_become_text_where_the_template_knows_none(llm: BeaconMemoryLLM) -> None:
    call = ToolCallBlock(tool_call_id="1", tool_name="add", tool_kwargs={"a": 2})
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    answers = [
        llm.chat([ChatMessage(role="assistant", blocks=blocks), *QUESTION])
        for blocks in ([call], [TextBlock(text=text)], [TextBlock(text="")])
    ]
    assert answers[0].raw["usage"] == answers[1].raw["usage"] != answers[2].raw["usage"]
    assert answers[0].message.content == answers[1].message.content


def test_content_that_is_no_text_is_refused(llm: BeaconMemoryLLM) -> None:
    image = ImageBlock(image=base64.b64encode(b"GIF89a"), image_mimetype="image/gif")
    with pytest.raises(InputError, match="the model reads text only; a user message has a image"):
        llm.chat([ChatMessage(role="user", blocks=[image])])


# --- many at a time


def test_ten_threads_and_ten_tasks_get_the_answers_of_one_after_the_other(llm: BeaconMemoryLLM) -> None:
    asked = [
        ([ChatMessage(f"Question {n}: who mended it?")], {"document_ids": ids, "max_tokens": 10})
        for n in range(5)
        for ids in (["roof"], ["well", "roof"])
    ]
    alone = [llm.chat(messages, **options).message.content for messages, options in asked]
    assert len(set(alone)) > 5

    with ThreadPoolExecutor(10) as pool:
        answers = pool.map(lambda one: llm.chat(one[0], **one[1]).message.content, asked)
        assert list(answers) == alone
        streams = pool.map(lambda one: [*llm.stream_chat(one[0], **one[1])][-1].message.content, asked)
        assert list(streams) == alone

    async def gathered() -> list[str | None]:
        return [r.message.content for r in await asyncio.gather(*(llm.achat(m, **o) for m, o in asked))]

    assert asyncio.run(gathered()) == alone


@pytest.mark.parametrize("way", ["achat", "acomplete", "astream_chat", "astream_complete"])
def test_event_loop_goes_on_while_the_model_answers(llm: BeaconMemoryLLM, way: str) -> None:
    async def answer() -> None:
        asked: Any = QUESTION if "chat" in way else "Who mended the roof?"
        response = await getattr(llm, way)(asked, document_ids=["roof"], max_tokens=100)
        if "stream" in way:
            [piece async for piece in response]

    assert asyncio.run(awake_during(answer())) > 0.05


def test_cancelled_answer_stops_the_model(llm: BeaconMemoryLLM) -> None:
    async def run() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(llm.achat(QUESTION, max_tokens=3000), 0.3)
        assert generating(llm) == []

    since = time.perf_counter()
    asyncio.run(run())
    assert time.perf_counter() - since < 2
    llm.chat(QUESTION)  # and it still answers


def test_stream_that_is_left_stops_the_model(llm: BeaconMemoryLLM) -> None:
    stream = llm.stream_chat(QUESTION, max_tokens=3000)
    next(stream)
    assert generating(llm) != []
    stream.close()
    del stream
    assert generating(llm) == []

    async def run() -> None:
        responses = await llm.astream_chat(QUESTION, max_tokens=3000)
        async for _ in responses:
            break
        await responses.aclose()
        del responses
        for _ in range(200):  # the framework's wrapper leaves the closing of what it wraps to the event loop
            if generating(llm) == []:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the model goes on")

    asyncio.run(run())


def test_failure_in_a_thread_is_raised_where_it_was_awaited(llm: BeaconMemoryLLM) -> None:
    async def run() -> None:
        with pytest.raises(DocumentNotFoundError):
            await llm.achat(QUESTION, document_ids=["rood"])
        with pytest.raises(DocumentNotFoundError):
            [r async for r in await llm.astream_chat(QUESTION, document_ids=["rood"])]

    asyncio.run(run())


def test_models_of_one_memory_share_its_weights(llm: BeaconMemoryLLM) -> None:
    assert copy.deepcopy(llm).memory.model is llm.memory.model
    assert llm.within("alice").memory.model is llm.memory.model is model(False, 0)
