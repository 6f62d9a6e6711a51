"""Conversations that fold: nothing is lost on the way, and they stay within their bounds."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory import BeaconMemory, CorruptFileError, DocumentNotFoundError, InputError, Session
from beacon_memory.compression.work import Work
from beacon_memory.config import BeaconConfig
from beacon_memory.modeling.model import BeaconModel


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    config = BeaconConfig(beacon_window=32)
    return tiny_model("llama", config, tokenizer=tiny_tokenizer(), max_position_embeddings=2048)


@pytest.fixture
def memory(model: BeaconModel, tmp_path: Path) -> Iterator[BeaconMemory]:
    with BeaconMemory(tmp_path / "store", model, reserve=100) as memory:
        yield memory


def exchange(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]


def line(turn: dict[str, str]) -> str:
    return f"{turn['role'].capitalize()}: {turn['content']}\n"


def whole(session: Session) -> str:
    """The conversation from its first turn on."""
    return "".join([*map(session.memory.store.text, session.ids), *map(line, session.turns)])


def test_old_turns_fold_and_nothing_is_lost(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=120)
    said = []
    for n in range(12):
        session.add(exchange(n))
        said += exchange(n)
        assert whole(session) == "".join(map(line, said))
        assert sum(len(line(turn)) for turn in session.turns) <= 120
        assert session.turns[0]["role"] == "user"
    assert session.ids == [f"chat/{part}" for part in range(1, len(session.ids) + 1)]
    assert len(session.ids) > 2
    for row in map(memory.show, session.ids):
        assert row.tags == ("session",)
        assert row.tokens < 32 + 120  # a document ends with the fold that makes it as long as a window
    assert memory.verify() == []


def test_turns_come_back_with_all_of_their_fields_until_they_are_folded(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=400)
    called = {"type": "function", "id": "7", "function": {"name": "look", "arguments": {"at": "</tool_call>"}}}
    turns = [
        {"role": "user", "content": "Look.", "name": "ada"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "Red.", "tool_call_id": "7", "seen": [1, None]},
    ]
    session.add(turns)
    assert session.turns == turns
    assert Session(memory, "chat").turns == turns
    session.recent = 20
    session.add(exchange(1))
    assert memory.store.text("chat/1") == (
        'User: Look.\nAssistant: <tool_call>\n{"name": "look", "arguments": {"at": "</tool_call>"}}\n</tool_call>\n'
        "Tool: Red.\n" + "".join(map(line, exchange(1)))
    )


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user"},
        {"role": "user", "content": None},
        {"content": "x"},
        {"role": 1, "content": "x"},
        {"role": "user", "content": "x", "seen": object()},
        {"role": "user", "content": "x", "seen": {(1, 2): 3}},
        {"role": "assistant", "content": "", "tool_calls": ["look"]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]},
        "x",
        None,
    ],
)
def test_turn_that_cannot_be_kept_is_refused_and_changes_nothing(memory: BeaconMemory, turn: Any) -> None:
    session = Session(memory, "chat")
    session.add(exchange(1))
    with pytest.raises(InputError, match="a turn must have the texts 'role' and 'content'"):
        session.add([*exchange(2), turn])
    assert session.turns == exchange(1)


def test_a_fold_reads_no_more_in_a_long_conversation_than_in_a_short_one(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(memory, "chat", recent=64, slots=60)
    read: list[int] = []
    compress = memory.compressor.compress

    def reading(work: Iterable[tuple[Any, Work]], *args: Any, **options: Any) -> Any:
        given = list(work)
        read.append(sum(len(one.ids) for _, one in given))
        return compress(given, *args, **options)

    monkeypatch.setattr(memory.compressor, "compress", reading)
    took = []
    for n in range(200):
        session.add(exchange(1000 + n))
        took.append(sum(read))
        read.clear()
        assert sum(memory.show(id).slots for id in session.ids) <= 60
    assert 0 < max(took[100:]) <= max(took[:100])
    assert sum(took[150:]) == pytest.approx(sum(took[100:150]), rel=0.2)


def test_conversation_outlives_the_process(memory: BeaconMemory, model: BeaconModel, tmp_path: Path) -> None:
    Session(memory, "chat", recent=100).add([*exchange(1), *exchange(2), *exchange(3)])
    memory.close()
    with BeaconMemory(tmp_path / "store", model, reserve=100) as again:
        session = Session(again, "chat", recent=100)
        assert session.turns == exchange(3)
        assert session.ids == ["chat/1"]
        assert Session(again, "another").turns == []
        assert Session(again.within("alice"), "chat").turns == []


@pytest.mark.parametrize("step", range(1, 5))
def test_fold_that_was_interrupted_is_neither_lost_nor_doubled(
    memory: BeaconMemory, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(memory, "chat", recent=60)
    session.add(exchange(0))
    steps = 0

    def dying(work: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step:
                raise KeyboardInterrupt
            return work(*args, **options)

        return wrapped

    with monkeypatch.context() as patched:
        patched.setattr(Session, "_write", dying(Session._write))
        patched.setattr(memory, "add_many", dying(memory.add_many))
        with pytest.raises(KeyboardInterrupt):
            session.add([*exchange(1), *exchange(2)])
    said = exchange(0) if step == 1 else [*exchange(0), *exchange(1), *exchange(2)]
    assert whole(session) == "".join(map(line, said))
    session.add(exchange(3))
    assert whole(session) == "".join(map(line, [*said, *exchange(3)]))


def test_memory_stays_within_its_slots(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=64, slots=80)
    seen: set[int] = set()
    for n in range(60):
        session.add(exchange(n))
        rows = [memory.show(id) for id in session.ids]
        assert sum(row.slots for row in rows) <= 80
        ratios = [max(row.ratios) for row in rows]
        assert ratios == sorted(ratios, reverse=True)  # the older, the stronger
        seen |= {*ratios}
    assert seen == {2, 4, 8, 16, 32}
    assert len(rows) > 4
    assert whole(session).endswith("".join(map(line, [*exchange(58), *exchange(59)])))
    assert "question 0\n" not in whole(session)  # at the strongest ratio the oldest is forgotten


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


def test_threads_may_take_part_in_one_session(memory: BeaconMemory) -> None:
    def talk(name: int) -> None:
        for n in range(4):
            Session(memory, "chat", recent=80).add(exchange(100 * name + n))

    threads = [threading.Thread(target=talk, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = whole(Session(memory, "chat"))
    for name in range(4):
        for n in range(4):
            assert text.count("".join(map(line, exchange(100 * name + n)))) == 1


def test_clearing_forgets_everything(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=60)
    session.add([*exchange(1), *exchange(2)])
    session.clear()
    assert (session.turns, session.ids, memory.list()) == ([], [], [])
    session.clear()


@pytest.mark.parametrize("turn", [{"role": "user", "content": "a \ud800"}, {"role": "\ud800", "content": "a"}])
def test_turn_without_utf8_form_is_refused_and_the_session_goes_on(memory: BeaconMemory, turn: dict[str, str]) -> None:
    session = Session(memory, "chat", recent=60)
    session.add(exchange(1))
    with pytest.raises(InputError, match=r"the turn.*holds the lone surrogate"):
        session.add([*exchange(2), turn])
    with pytest.raises(InputError, match="lone surrogate"):
        session.ask("\udfff", max_new_tokens=2)
    assert session.turns == exchange(1)
    session.add(exchange(3))
    assert whole(session) == "".join(map(line, [*exchange(1), *exchange(3)]))


def test_what_is_no_conversation_is_refused(memory: BeaconMemory) -> None:
    session = Session(memory, "chat")
    with pytest.raises(InputError, match="'role' and 'content'"):
        session.add([{"role": "user"}])
    with pytest.raises(InputError, match="recent=0"):
        Session(memory, "chat", recent=0)
    session.add(exchange(1))
    (path,) = (memory.store.folder / "sessions").glob("*.json")
    path.write_text(path.read_text().replace("answer 1", "answer 2"))
    with pytest.raises(CorruptFileError, match="is no session"):
        session.turns  # noqa: B018


def test_sessions_and_documents_of_like_ids_keep_apart(memory: BeaconMemory) -> None:
    memory.add("chat/1", "a document of the same id", ratio=2)
    sessions = [Session(memory, id, recent=20) for id in ("chat", "chat/1", "chat/2", "chat/1/2")]
    for _ in range(4):
        for number, session in enumerate(sessions):
            session.add(exchange(number))
    for number, session in enumerate(sessions):
        assert len(session.ids) > 1
        assert whole(session) == "".join(map(line, exchange(number))) * 4
    sessions[0].clear()
    assert whole(sessions[0]) == ""
    for number, session in enumerate(sessions[1:], 1):
        assert whole(session) == "".join(map(line, exchange(number))) * 4
    assert memory.store.text("chat/1") == "a document of the same id"


def test_a_damaged_session_can_be_cleared(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=20)
    session.add(exchange(1))
    (path,) = (memory.store.folder / "sessions").glob("*.json")
    path.write_text("{}")
    with pytest.raises(CorruptFileError, match=r"is no session .*call clear\(\)"):
        session.add(exchange(2))
    session.clear()
    assert (session.turns, session.ids, memory.list()) == ([], [], [])
