"""The LlamaIndex components on the embedded default model, and the code of their page."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.memory import Memory
from llama_index_beacon_memory import BeaconMemoryBlock, BeaconMemoryLLM, BeaconQueryEngine
from repository import ROOT

from beacon_memory import InputError

KEEPER = "The lighthouse keeper of the island is called Josiah Tavershaw. He has two goats and a barometer."
FERRY = "The ferry that comes every morning is called the Ombrelline. She carries the post, flour and paraffin."
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BeaconMemoryLLM]:
    llm = BeaconMemoryLLM(tmp_path_factory.mktemp("store"), max_tokens=16)
    yield llm
    llm.memory.close()


def test_metadata_is_that_of_the_default_model(llm: BeaconMemoryLLM) -> None:
    metadata = llm.metadata
    assert (metadata.context_window, metadata.is_chat_model) == (8192, True)
    assert not metadata.is_function_calling_model
    assert "smollm2" in metadata.model_name.lower()
    with pytest.raises(InputError, match="no place for tools"):
        llm.chat([ChatMessage("Add 2 and 3.")], tools=[{"type": "function", "function": {"name": "add"}}])


def test_folded_conversation_is_remembered(llm: BeaconMemoryLLM) -> None:
    tokenizer = llm.memory.model.tokenizer
    memory = Memory.from_defaults(
        session_id="island",
        memory_blocks=[BeaconMemoryBlock(llm=llm)],
        token_limit=60,
        token_flush_size=20,
        tokenizer_fn=lambda text: tokenizer(text, verbose=False)["input_ids"],
    )
    for text in (KEEPER, FERRY):
        memory.put_messages([ChatMessage(text), ChatMessage("I see.", role="assistant")])
    messages = memory.get()
    assert not any("Tavershaw" in (message.content or "") for message in messages)
    question = ChatMessage("What is the name of the lighthouse keeper?")
    assert "Tavershaw" in (llm.chat([*messages, question]).message.content or "")
    recent = [message for message in messages if message.content]
    assert "Tavershaw" not in (llm.chat([*recent, question]).message.content or "")


def test_query_engine_answers_from_compressed_documents(llm: BeaconMemoryLLM) -> None:
    library = llm.within("library")
    library.memory.add_many([("keeper", KEEPER), ("ferry", FERRY)], ratio=2)
    engine = BeaconQueryEngine.from_llm(library, streaming=True)
    response: Any = asyncio.run(engine.aquery("What is the name of the ferry?"))
    assert [source.node.node_id for source in response.source_nodes] == ["ferry"]
    assert "Ombrelline" in str(engine.query("What is the name of the ferry?"))


def test_code_of_the_page_runs(llm: BeaconMemoryLLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import llama_index_beacon_memory

    def on_loaded_model(store: str, **fields: Any) -> BeaconMemoryLLM:
        memory = type(llm.memory)(tmp_path / store, llm.memory.model)
        return BeaconMemoryLLM(memory=memory, **fields)

    monkeypatch.setattr(llama_index_beacon_memory, "BeaconMemoryLLM", on_loaded_model)
    page = (ROOT / "docs" / "llama-index.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    printed: list[str] = []
    names["print"] = lambda *values: printed.append(" ".join(map(str, values)))
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "llama-index.md", "exec"), names)  # noqa: S102  # our own document
    assert "Ada Flint" in printed[0]
    assert "Ada Flint" in printed[1]
    assert "Ombrelline" in printed[2]
    assert "hayloft" in printed[3]
    assert "['owls']" in printed[3]


def test_example_tells_what_the_page_says(llm: BeaconMemoryLLM, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import runpy

    example = runpy.run_path(str(ROOT / "examples" / "03_llama_index_memory.py"))
    text = example["CHAPTER"].read_text(encoding="utf-8")
    example["converse"](llm.within("example"), text)
    example["query"](llm.within("example"), text)
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "llama-index.md").read_text(encoding="utf-8")
    assert "631 tokens in 316 slots" in printed
    assert printed.count("\nQ: ") == 6
    for line in re.findall(r"^    (user: .*|  \d+ messages.*|treasure_.*)$", page, re.MULTILINE):
        assert line in printed
