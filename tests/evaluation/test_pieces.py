from __future__ import annotations

import pytest
from tiny_models import tiny_tokenizer

from beacon_memory.evaluation.pieces import cut_middle, passage_ids, split_documents
from beacon_memory.zoom import chunks


def numbers(*sizes: int) -> list[list[int]]:
    """Passages of these sizes, whose tokens are counted through."""
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def test_passages_are_together_the_text_joined_by_line_ends() -> None:
    tokenizer = tiny_tokenizer()  # it sets a bos in front of a text
    passages = passage_ids(tokenizer, ("One.", "Two.", "Three."))
    assert tokenizer.decode([id for passage in passages for id in passage]) == "One.\nTwo.\nThree."
    assert [len(passage) for passage in passages] == [4, 5, 7]


@pytest.mark.parametrize(("most", "kept"), [(9, range(9)), (7, [0, 1, 2, 3, 6, 7, 8]), (4, [0, 1, 7, 8]), (1, [0])])
def test_a_cut_text_keeps_beginning_and_end(most: int, kept: list[int]) -> None:
    assert cut_middle(range(9), most) == list(kept)


@pytest.mark.parametrize(("size", "sizes"), [(1, [1]), (95, [95]), (97, [48, 49]), (200, [66, 67, 67])])
def test_pieces_of_a_passage_have_about_one_size(size: int, sizes: list[int]) -> None:
    pieces = chunks(range(size))
    assert [len(piece) for piece in pieces] == sizes
    assert [token for piece in pieces for token in piece] == list(range(size))


@pytest.mark.parametrize(
    ("sizes", "count", "cut"),
    [
        ((10, 10, 10, 10), 2, [20, 20]),
        ((10, 10, 10), 1, [30]),
        ((30, 5, 5), 2, [30, 10]),
        ((1, 1, 38), 2, [2, 38]),
        ((100, 100), 3, [50, 100, 50]),  # too few passages: in pieces of about 64 tokens
        ((5,), 3, [5]),
    ],
)
def test_documents_are_of_about_one_length(sizes: tuple[int, ...], count: int, cut: list[int]) -> None:
    documents = split_documents(numbers(*sizes), count)
    assert [len(document) for document in documents] == cut
    assert [token for document in documents for token in document] == list(range(sum(sizes)))
