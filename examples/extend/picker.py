"""A picker by likeness: the mean of the model's own input embeddings, of each passage and of the question.

It needs no word in common. A package of your own makes it known by an entry point:

    [project.entry-points."beacon_memory.pickers"]
    embeddings = "picker:ByEmbeddings"
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from beacon_memory import Passage, Query


class ByEmbeddings:
    """Score all passages of a store by cosine similarity; the vectors of a document are kept while the program runs."""

    def __init__(self) -> None:
        self.known: dict[str, list[tuple[int, int, Tensor]]] = {}  # by the hash of a document's text

    def __call__(self, query: Query) -> Iterator[Passage]:
        """Return every passage with its likeness to the question."""
        table = query.model.base.get_input_embeddings().weight
        centre = table.mean(0, dtype=torch.float32)  # what all tokens have in common says nothing

        def embed(text: str) -> Tensor:
            ids = query.model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            return table[ids.to(table.device)].float().mean(0) - centre

        asked = embed(query.text)
        for row in query.documents():
            if row.content_hash not in self.known:
                self.known[row.content_hash] = [(a, b, embed(text)) for a, b, text in query.passages(row.id)]
            for start, stop, vector in self.known[row.content_hash]:
                yield Passage(row.id, start, stop, float(cosine_similarity(asked, vector, dim=0)))
