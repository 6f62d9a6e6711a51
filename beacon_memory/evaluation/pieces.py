"""Texts as token ids, and the ways in which baselines cut them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from beacon_memory.modeling.text_tokens import text_tokens
from beacon_memory.zoom import chunks

__all__ = ["Passages", "cut_middle", "passage_ids", "split_documents", "token_ids"]

Passages = Sequence[Sequence[int]]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, none of them a special one."""
    return text_tokens(tokenizer, text)[0]


def passage_ids(tokenizer: PreTrainedTokenizerBase, context: Sequence[str]) -> list[list[int]]:
    """Return the token ids of passages. Each except the first begins with a line end, so that they join to a text."""
    return [token_ids(tokenizer, "\n" * bool(number) + passage) for number, passage in enumerate(context)]


def cut_middle(ids: Sequence[int], most: int) -> list[int]:
    """Keep the first and the last `most` / 2 tokens of a longer text, as LongBench does (arXiv 2308.14508)."""
    if len(ids) <= most:
        return list(ids)
    return [*ids[: most - most // 2], *ids[len(ids) - most // 2 :]]


def split_documents(passages: Passages, count: int) -> list[list[int]]:
    """Split passages into `count` documents of about equal length, at the ends of passages if there are enough.

    A text with fewer pieces than `count` gives fewer documents.
    """
    pieces = passages if len(passages) >= count else [chunk for passage in passages for chunk in chunks(passage)]
    total = sum(map(len, pieces))
    documents: list[list[int]] = [[] for _ in range(count)]
    starts = accumulate(map(len, pieces), initial=0)
    for piece, start in zip(pieces, starts, strict=False):  # the last of `starts` is the end
        documents[(start + len(piece) // 2) * count // total].extend(piece)
    return [document for document in documents if document]
