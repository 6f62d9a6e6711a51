"""LlamaIndex on compressed memory: a conversation that stays small, and a query engine that stuffs no text.

    python examples/03_llama_index_memory.py

Somebody tells the beginning of Treasure Island by Robert Louis Stevenson (1883, public domain). What the Memory has no
room for any more is folded into keys and values, behind which the model answers. Then the whole first chapter goes
through an ingestion pipeline, and a query engine answers from what is kept of it.
"""

import argparse
import tempfile
from pathlib import Path

from llama_index.core import Document
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.memory import Memory
from llama_index_beacon_memory import (
    BeaconCompressionTransform,
    BeaconMemoryBlock,
    BeaconMemoryLLM,
    BeaconQueryEngine,
)

CHAPTER = Path(__file__).with_name("treasure_island_chapter_1.txt")
TOLD = slice(5, 14)  # lines of the chapter
SESSION = "evening"


def converse(llm: BeaconMemoryLLM, text: str) -> None:
    """Tell a story to a Memory of 300 tokens, and ask about what it had to flush."""
    tokenizer = llm.memory.model.tokenizer
    block = BeaconMemoryBlock(llm=llm)
    block.clear(SESSION)  # of an earlier run on the same store
    memory = Memory.from_defaults(
        session_id=SESSION,
        memory_blocks=[block],
        token_limit=300,
        token_flush_size=100,
        tokenizer_fn=lambda text: tokenizer(text, verbose=False)["input_ids"],
    )
    print("--- a conversation")
    for told in text.splitlines()[TOLD]:
        memory.put_messages([ChatMessage(told), ChatMessage("Go on.", role="assistant")])
        kept = [message for message in memory.get() if message.content]
        print(f"user: {told.strip():.60}...")
        print(f"  {len(kept)} messages as they are; folded: {folded(llm, block)}")
    for question in (
        "What did he drink?",
        "What song did the captain sing?",
        "How many gold pieces did he throw down?",
        "What colour was the captain's coat?",
    ):
        asked = [*memory.get(), ChatMessage(question)]
        without = [message for message in asked if message.content]  # without the handle of what was folded
        print(f"\nQ: {question}")
        print(f"with what was folded  {llm.chat(asked).message.content}")
        print(f"recent messages only  {llm.chat(without).message.content}")


def folded(llm: BeaconMemoryLLM, block: BeaconMemoryBlock) -> str:
    """What was folded of the conversation."""
    return ", ".join(sizes(llm, id) for id in block.session(SESSION).ids) or "nothing"


def sizes(llm: BeaconMemoryLLM, id: str) -> str:
    """How much a document takes, against the K/V of all of its tokens."""
    row = llm.memory.show(id)
    kept, raw = row.bytes, row.tokens * llm.memory.model.slot_bytes
    return f"{row.tokens:,} tokens in {row.slots:,} slots, K/V of {kept / 1e6:.1f} MB instead of {raw / 1e6:.1f} MB"


def query(llm: BeaconMemoryLLM, text: str) -> None:
    """Compress the chapter in a pipeline, and answer from that."""
    print("\n--- a query engine")
    transform = BeaconCompressionTransform(memory=llm.memory, ratio=4)
    chapter = Document(id_=CHAPTER.stem, text=text, metadata={"author": "Stevenson"})
    (node,) = IngestionPipeline(transformations=[transform]).run(documents=[chapter])
    print(f"{node.node_id}: {sizes(llm, node.node_id)}")
    engine = BeaconQueryEngine.from_llm(llm, streaming=True)
    for question in ("How much was the boy promised each month?", "What song did the captain sing?"):
        response = engine.query(question)
        print(f"\nQ: {question}\n{response}")
        print(f"  from {', '.join(source.node.node_id for source in response.source_nodes)}")


def main() -> None:
    """Converse, then query, in one store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="folder of the store (default: a temporary one)")
    arguments = parser.parse_args()
    text = CHAPTER.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        llm = BeaconMemoryLLM(arguments.store or temporary, max_tokens=24)
        converse(llm, text)
        query(llm, text)
        llm.memory.close()


if __name__ == "__main__":
    main()
