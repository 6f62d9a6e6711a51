"""Questions to a conversation: what they are answered from, within which budget, and what is kept of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from session_samples import exchange, make_model, whole

from beacon_memory import Answer, BeaconMemory, DocumentNotFoundError, Session
from beacon_memory.modeling.model import BeaconModel


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    return make_model()


@pytest.fixture
def memory(model: BeaconModel, tmp_path: Path) -> Iterator[BeaconMemory]:
    with BeaconMemory(tmp_path / "store", model, reserve=100) as memory:
        yield memory


def test_answers_come_from_behind_the_conversation(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=64)
    memory.add("other", "another document", ratio=2)
    first = session.ask("Who?", max_new_tokens=4)
    assert (first.ids, first.text) == ((), session.turns[-1]["content"])
    session.add([*exchange(1), *exchange(2), *exchange(3)])
    asked = [*session.turns, {"role": "user", "content": "Where?"}]
    expected = memory.ask(asked, ["chat/1"], max_new_tokens=4)
    answer = session.ask("Where?", max_new_tokens=4)
    assert (answer.text, answer.ids) == (expected.text, ("chat/1",))
    assert "User: Where?\n" in whole(session)


def test_an_answer_is_streamed_and_kept_when_it_is_whole(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=200)
    expected = session.ask("Who?", keep=False, max_new_tokens=4)
    *pieces, answer = session.stream("Who?", max_new_tokens=4)
    assert isinstance(answer, Answer)
    assert "".join(map(str, pieces)) == answer.text == expected.text
    assert [turn["content"] for turn in session.turns] == ["Who?", answer.text]
    assert [*session.stream("And when?", keep=False, max_new_tokens=4)]
    with contextlib.closing(session.stream("And where?", max_new_tokens=400)) as broken_off:
        next(broken_off)
    assert len(session.turns) == 2


def test_other_documents_are_answered_from_beside_the_conversation(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=64)
    session.add([*exchange(1), *exchange(2), *exchange(3)])
    memory.add("letter", "The key of the mill is lost.", ratio=2)
    assert session.ask("Where is the key?", ["letter"], keep=False, max_new_tokens=2).ids == ("letter", "chat/1")
    *_, answer = session.stream("Where is the key?", ["letter"], keep=False, max_new_tokens=2)
    assert isinstance(answer, Answer)
    assert answer.ids == ("letter", "chat/1")


def test_question_without_ids_never_picks_a_conversation(memory: BeaconMemory) -> None:
    Session(memory, "chat", recent=30).add([{"role": "user", "content": "The key lies under the blue stone."}])
    assert Session(memory, "chat").ids == ["chat/1"]
    with pytest.raises(DocumentNotFoundError, match="stored"):
        memory.ask("Where is the key?", max_new_tokens=1)
    Session(memory, "chat", recent=30).add([{"role": "user", "content": "Or under the red one, said Ada."}])
    assert Session(memory, "chat").ids == ["chat/1", "chat/2"]
    memory.add("letter", "The key of the mill is lost.", ratio=2)
    assert memory.ask("Where is the key?", max_new_tokens=1).ids == ("letter",)
    assert memory.ask("What else?", max_new_tokens=1).ids == ("letter",)  # the only document


def told(session: Session, count: int) -> None:
    """Hold a conversation in which someone does something different in each exchange."""
    for n in range(count):
        said = f"On day {n} the visitor{n} brought a present{n} to us, and we were all very glad of it."
        session.add([{"role": "user", "content": said}, {"role": "assistant", "content": "I see."}])


def loaded(memory: BeaconMemory, answer: Answer) -> str:
    """The text of what an answer was given from."""
    return "".join(memory.store.text(source.document)[source.start : source.stop] for source in answer.sources)


def test_a_question_loads_what_it_is_about_and_no_more_than_its_budget(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=200, budget=120)
    told(session, 30)
    assert sum(memory.show(id).slots for id in session.ids) > 3 * 120
    assert {max(memory.show(id).ratios) for id in session.ids} == {2}
    for n in (0, 7, 20):
        answer = session.ask(f"What was it that visitor{n} brought?", keep=False, max_new_tokens=2)
        assert answer.usage.slots <= 121  # with the sink
        assert f"the visitor{n} brought a present{n} to us" in loaded(memory, answer)
        assert f"visitor{n + 1}" not in loaded(memory, answer)  # which is told in the same words


def test_a_question_that_asks_on_loads_what_the_turn_before_was_about(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=200, budget=120)
    told(session, 30)
    session.add([{"role": "user", "content": "Tell me of visitor7."}, {"role": "assistant", "content": "Yes?"}])
    answer = session.ask("Was that so?", keep=False, max_new_tokens=2)
    assert "the visitor7 brought a present7 to us" in loaded(memory, answer)


def test_a_question_that_is_not_kept_leaves_the_conversation_as_it_was(memory: BeaconMemory) -> None:
    session = Session(memory, "chat")
    session.add(exchange(1))
    kept = session.ask("Who?", keep=False, max_new_tokens=4)
    assert session.turns == exchange(1)
    assert session.ask("Who?", max_new_tokens=4).text == kept.text
    assert [turn["content"] for turn in session.turns[2:]] == ["Who?", kept.text]


def test_other_documents_are_loaded_whole_beside_a_conversation(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=200)
    told(session, 30)
    memory.add("letter", "The key of the mill is lost. " * 20, ratio=2)
    ids, own = ["letter", *session.ids], memory.show("letter").slots
    answer = memory.ask("What did visitor7 bring?", ids, session_budget=120, max_new_tokens=2)
    assert answer.ids == tuple(ids)
    assert own < answer.usage.slots <= 1 + own + 120
    assert {source.loaded for source in answer.sources if source.document == "letter"} == {0.5}
    found = memory.ask("What did visitor7 bring?", ids, session_budget=120, max_new_tokens=2)
    assert found.ids == answer.ids  # there is room for it beside what is loaded of the conversation
    whole = memory.ask("What did visitor7 bring?", ids, budget=100, max_new_tokens=2)
    assert whole.usage.slots <= 101
