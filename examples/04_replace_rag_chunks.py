"""A LangChain chain that pastes retrieved chunks into the prompt, and the one line that replaces it.

    python examples/04_replace_rag_chunks.py

Both chains find the same chunks with the same vector store and ask the same model. One puts their texts into the
prompt, where they are read for every question; the other loads the keys and values that were kept when they were added.
The chunks are of the first chapter of Treasure Island by Robert Louis Stevenson (1883, public domain). Needs the extra
`langchain`.
"""

import argparse
import math
import re
import tempfile
from collections import Counter
from pathlib import Path

from langchain_beacon_memory import ChatBeaconMemory, create_memory_chain
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore

from beacon_memory import BeaconMemory

CHAPTER = Path(__file__).with_name("treasure_island_chapter_1.txt")
QUESTIONS = (
    "What is the name of the inn?",
    "What song did the captain sing?",
    "What would the captain pay for watching out for a seafaring man with one leg?",
)


class RareWords(Embeddings):
    """One dimension for each word of some texts, the rarer the longer: enough to find a passage, and needs no model."""

    def __init__(self, texts: list[str]) -> None:
        held = Counter(word for text in texts for word in set(self.words(text)))
        self.weights = {word: math.log(1 + len(texts) / count) for word, count in sorted(held.items())}

    @staticmethod
    def words(text: str) -> list[str]:
        """Words in lower case."""
        return re.findall(r"[a-z]+", text.lower())

    def embed_query(self, text: str) -> list[float]:
        """A vector of length 1."""
        counts = Counter(self.words(text))
        vector = [weight * math.sqrt(counts[word]) for word, weight in self.weights.items()]
        length = math.hypot(*vector) or 1.0
        return [value / length for value in vector]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector for each text."""
        return [self.embed_query(text) for text in texts]


def chunks_of(text: str, size: int = 1200) -> list[Document]:
    """Whole paragraphs, about `size` characters together, each with an id."""
    texts = [""]
    for paragraph in text.splitlines(keepends=True):
        if len(texts[-1]) > size:
            texts.append("")
        texts[-1] += paragraph
    return [Document(text, metadata={"document_id": f"chapter 1, part {n}"}) for n, text in enumerate(texts, 1)]


def main() -> None:
    """Add the chunks, then ask both chains the same questions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="folder of the store (default: a temporary one)")
    parser.add_argument("--ratio", type=int, default=4, help="tokens for each memory slot (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, BeaconMemory(arguments.store or temporary) as memory:
        chunks = chunks_of(CHAPTER.read_text(encoding="utf-8"))
        model = ChatBeaconMemory(memory=memory, max_tokens=24, temperature=0)
        vectors = InMemoryVectorStore(RareWords([chunk.page_content for chunk in chunks]))
        vectors.add_documents(chunks)
        retriever = vectors.as_retriever(search_kwargs={"k": 3})

        def texts(found: list[Document]) -> str:
            return "\n".join(document.page_content for document in found)

        prompt = ChatPromptTemplate.from_template("{context}\n{question}")
        stuffing = {"context": retriever | texts, "question": RunnablePassthrough()} | prompt | model

        for added in memory.add_many(
            [(chunk.metadata["document_id"], chunk.page_content) for chunk in chunks], ratio=arguments.ratio
        ):
            print(f"{added.id}: {added.tokens} tokens in {added.slots} slots")
        loading = create_memory_chain(model, retriever)  # this line replaces the chain above

        for question in QUESTIONS:
            print(f"\n{question}\n              prompt tokens   K/V MB   first token   answer")
            for name, chain in (("chunk texts", stuffing), ("chunk ids", loading)):
                answer = chain.invoke(question)
                print(f"{name:12} {row(answer, memory.model.slot_bytes)}")


def row(answer: AIMessage, slot_bytes: int) -> str:
    """What an answer took; loaded slots count as cached tokens."""
    usage = answer.usage_metadata
    prompt = usage["input_tokens"] - usage["input_token_details"]["cache_read"]
    cached = (usage["input_tokens"] + usage["output_tokens"]) * slot_bytes
    first = answer.response_metadata["time_to_first_token"]
    return f"{prompt:14} {cached / 1e6:8.1f} {first:11.2f} s   {answer.text!r}"


if __name__ == "__main__":
    main()
