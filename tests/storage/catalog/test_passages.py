from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_memory.storage.catalog.passages import PASSAGE_LENGTH, split_passages


@given(
    st.lists(
        st.sampled_from(["word ", "End. ", "\n\n", "\r\n \r\n", "x" * 700, "漢字。", "\n", "é", " " * 300]), max_size=80
    )
)
@settings(max_examples=150, deadline=None)
def test_passages_cover_the_text_without_gap(parts: list[str]) -> None:
    text = "".join(parts)
    passages = split_passages(text)
    assert "".join(text[start:stop] for start, stop in passages) == text
    assert [0, *(stop for _, stop in passages)][:-1] == [start for start, _ in passages]
    for start, stop in passages:
        assert stop - start <= 1.25 * PASSAGE_LENGTH
        assert stop - start >= 0.25 * PASSAGE_LENGTH or len(passages) == 1
    for start, _ in passages:  # whatever follows, all but the last passage stay; and cutting can begin at any of them
        assert split_passages(text, start) == [one for one in passages if one[0] >= start]
        before = split_passages(text[: start + PASSAGE_LENGTH // 2])[:-1]
        assert before == passages[: len(before)]


def test_passages_end_at_paragraphs_then_sentences_then_words() -> None:
    paragraph = "All of this belongs together. " * 20 + "\n\n"
    assert all(text.endswith(".") for text in _passages(paragraph * 5))
    sentences = _passages("This is the end of a sentence. " * 100)
    assert all(text.endswith("sentence.") for text in sentences)
    assert all(text.endswith("word") for text in _passages("word " * 1000))
    assert [len(text) for text in _passages("x" * 800)] == [300, 300, 200]
    assert _passages("") == []
    assert _passages("short\n\ntext") == ["short\n\ntext"]
    assert _passages("Heading\n\n" + "One sentence of many. " * 60)[0].startswith("Heading\n\nOne sentence")


def test_each_exchange_of_a_conversation_is_a_passage() -> None:
    turns = [
        "User: The well is deep.\nAssistant: I see.\n",
        "User: Yes.\n",
        "User: A long story. " + "And so on. " * 60,
    ]
    passages = _passages("System: Be brief.\n" + "".join(turns))
    assert passages[:3] == ["System: Be brief.", turns[0].rstrip(), "User: Yes."]
    assert passages[3].startswith("User: A long story.")
    assert 1 < len(passages[3:]) < 4
    assert all(len(text) <= 1.25 * PASSAGE_LENGTH for text in passages)
    assert _passages("The user said: User: no.") == ["The user said: User: no."]


def _passages(text: str) -> list[str]:
    return [text[start:stop].rstrip() for start, stop in split_passages(text)]
