"""Conversations that fold: nothing is lost on the way, and they stay within their bounds."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from session_samples import exchange, line, make_model, whole
from store_samples import change

from beacon_memory import BeaconMemory, CapacityError, CorruptFileError, InputError, QuotaError, Session
from beacon_memory.compression.work import Work
from beacon_memory.conversation import Conversation
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.storage.archive import copy_documents, export_documents, import_documents
from beacon_memory.storage.files.names import hash_id


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    return make_model()


@pytest.fixture
def memory(model: BeaconModel, tmp_path: Path) -> Iterator[BeaconMemory]:
    with BeaconMemory(tmp_path / "store", model, reserve=100) as memory:
        yield memory


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


def test_the_last_exchange_stays_text_if_it_fits(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=100)
    long = {"role": "assistant", "content": "red " * 15}
    for n in range(3):
        session.add([*exchange(n)[:1], long])
        assert 50 < sum(len(line(turn)) for turn in [*exchange(n)[:1], long]) <= 100
        assert session.turns == [*exchange(n)[:1], long]
    assert whole(session) == "".join(line(turn) for n in range(3) for turn in [*exchange(n)[:1], long])
    session.add([*exchange(3)[:1], {"role": "assistant", "content": "red " * 30}])
    assert session.turns == []


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


def before_each_step(session: Session, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `act` called before each step of a fold."""

    def watched(step: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            act()
            return step(*args, **options)

        return wrapped

    kept = session.memory.store.conversations
    for name in ("put", "remove"):
        monkeypatch.setattr(kept, name, watched(getattr(kept, name)))
    for name in ("add_many", "append", "remove"):
        monkeypatch.setattr(session.memory, name, watched(getattr(session.memory, name)))


ADDED = pytest.mark.parametrize(
    ("words", "slots"),
    [(1, 100), (40, 100), (40, 20)],
    ids=["a document grows", "new documents", "new documents, and others have to go"],
)


@ADDED
def test_killed_fold_is_neither_lost_nor_doubled(
    memory: BeaconMemory, model: BeaconModel, tmp_path: Path, words: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(memory, "chat", recent=60, slots=slots)
    for n in range(4):
        session.add(exchange(n))
    before = whole(session)
    new = [{"role": "user", "content": "word " * words}, *exchange(6), *exchange(7)]
    added = "".join(map(line, new))
    killed: list[Path] = []

    def photograph() -> None:
        killed.append(tmp_path / f"killed {len(killed)}")
        shutil.copytree(memory.store.root, killed[-1])

    with monkeypatch.context() as patched:
        before_each_step(session, photograph, patched)
        session.add(new)
    assert (before + added).endswith(whole(session))
    complete = []
    for folder in killed:
        with BeaconMemory(folder, model, reserve=100) as again:
            found = Session(again, "chat", recent=60, slots=slots)
            text = whole(found)
            complete.append(text.endswith(added))
            assert text == before or (before + added).endswith(text)
            assert sum(again.show(id).slots for id in found.ids) <= slots
            found.add([*exchange(8), *exchange(9), *exchange(10)])
            assert (text + "".join(map(line, [*exchange(8), *exchange(9), *exchange(10)]))).endswith(whole(found))
            assert [row.id for row in again.list()] == sorted(found.ids)
    assert complete == sorted(complete)
    assert {*complete} == {False, True}


@ADDED
def test_fold_that_fails_leaves_the_conversation_as_it_was(
    memory: BeaconMemory, words: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(memory, "chat", recent=60, slots=slots)
    for n in range(4):
        session.add(exchange(n))
    new = [{"role": "user", "content": "word " * words}, *exchange(6), *exchange(7)]

    def kept() -> Any:
        return session.turns, session.ids, {row.id: memory.store.text(row.id) for row in memory.list()}

    before, said = kept(), whole(session)
    for number in itertools.count():
        calls = itertools.count()

        def fail(calls: Iterator[int] = calls, number: int = number) -> None:
            if next(calls) == number:
                raise (QuotaError("full"), KeyboardInterrupt())[number % 2]

        with monkeypatch.context() as patched:
            before_each_step(session, fail, patched)
            with contextlib.suppress(QuotaError, KeyboardInterrupt):
                session.add(new)
        if kept() != before:
            break
    assert number >= 2  # written, and stored: only now is it too late for the conversation to stay as it was
    said += "".join(map(line, new))
    assert said.endswith(whole(session))
    session.add(exchange(8))
    assert (said + "".join(map(line, exchange(8)))).endswith(whole(session))


def test_first_turns_that_cannot_be_folded_leave_nothing_behind(model: BeaconModel, tmp_path: Path) -> None:
    with BeaconMemory(tmp_path, model, reserve=2048) as memory:
        session = Session(memory, "chat", recent=20)
        with pytest.raises(CapacityError, match="2048 positions, and reserve=2048 leaves too few of them"):
            session.add(exchange(1))
        assert (session.turns, session.ids, memory.list()) == ([], [], [])
        assert memory.store.conversations.ids() == []
        assert [*(memory.store.folder / "sessions").iterdir()] == []


def test_long_message_becomes_several_documents(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=64, slots=240)
    session.add(exchange(0))
    words = " ".join(f"word{n}" for n in range(600))
    with pytest.raises(CapacityError):
        memory.add("whole", words, ratio=2, compression="beacon")
    session.add([{"role": "user", "content": words}, {"role": "assistant", "content": "Done."}])
    assert whole(session) == "".join(
        map(line, [*exchange(0), {"role": "user", "content": words}, {"role": "assistant", "content": "Done."}])
    )
    rows = [memory.show(id) for id in session.ids]
    assert sum(row.slots for row in rows) <= 240
    assert max(row.tokens for row in rows) <= 32
    assert [max(row.ratios) for row in rows] == sorted((max(row.ratios) for row in rows), reverse=True)
    assert all(memory.store.text(row.id)[-1].isspace() for row in rows)  # no word is cut
    assert session.ask("What?", max_new_tokens=2).ids == tuple(session.ids)
    session.add(exchange(1))
    assert "Assistant: Done.\nUser: What?" in whole(session)


def test_of_a_message_that_is_longer_than_all_slots_the_end_is_kept(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=64, slots=20)
    session.add([*exchange(0), {"role": "user", "content": "x" * 1500 + "y" * 300}])
    assert sum(memory.show(id).slots for id in session.ids) <= 20
    text = whole(session)
    assert 310 < len(text) < 700
    assert text.endswith("y" * 300 + "\n")


def test_conversation_goes_on_with_a_model_of_few_positions(tmp_path: Path) -> None:
    with BeaconMemory(tmp_path, make_model(512), reserve=80) as memory:
        session = Session(memory, "chat")
        for n in range(8):
            session.ask(f"question {n}", max_new_tokens=4)
            session.add([{"role": "user", "content": "word " * 20 * n}, *exchange(n)])
        assert len(session.ids) > 1


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def test_system_turns_stay_in_force(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=60)
    session.add([system("Be brief."), *exchange(0)])
    for n in range(1, 8):
        session.add(exchange(n))
        assert session.turns[0] == system("Be brief.")
    session.add([system("Speak French."), *exchange(8)])
    for n in range(9, 14):
        session.add([system("Be brief."), *exchange(n)])  # said again and again, it stands there once
    assert session.turns[:2] == [system("Speak French."), system("Be brief.")]
    assert all(turn["role"] != "system" for turn in session.turns[2:])
    folded = "".join(map(memory.store.text, session.ids))
    assert "System" not in folded
    assert all(f"question {n}\n" in whole(session) for n in range(14))
    asked = [*session.turns, {"role": "user", "content": "Who?"}]
    expected = memory.ask(asked, session.ids, max_new_tokens=4).text
    assert session.ask("Who?", max_new_tokens=4).text == expected


def test_system_turn_that_is_said_again_with_other_fields_stands_there_once(memory: BeaconMemory) -> None:
    session = Session(memory, "chat", recent=60)
    for n in range(6):
        session.add([{**system("Be brief."), "message": {"id": str(n)}}, *exchange(n)])
    assert [turn["content"] for turn in session.turns if turn["role"] == "system"].count("Be brief.") == 1
    assert "System" not in "".join(map(memory.store.text, session.ids))


@pytest.mark.parametrize("recent", [1, 60])
def test_system_turns_that_do_not_fit_beside_newer_ones_are_folded(memory: BeaconMemory, recent: int) -> None:
    session = Session(memory, "chat", recent=recent, system=40)
    session.add([system("old " * 8), *exchange(0), system("new " * 4), *exchange(1), *exchange(2), *exchange(3)])
    assert session.turns[0] == system("new " * 4)
    assert [turn["role"] for turn in session.turns].count("system") == 1
    assert "System: old old" in memory.store.text("chat/1")
    session.add([system("long " * 100)])
    session.add([*exchange(4), *exchange(5)])
    assert session.turns[0] == system("new " * 4)
    assert "System: long" in whole(session)
    for n in range(20):
        session.add([system(f"It is {n} o'clock.")])
    assert sum(len(line(turn)) for turn in session.turns) <= 40 + recent
    assert session.turns[-1] == system("It is 19 o'clock.")
    none = Session(memory, "none", recent=1, system=0)
    none.add([system("Be brief."), *exchange(0)])
    assert none.turns == []
    assert "System: Be brief." in memory.store.text("none/1")


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
    with pytest.raises(InputError, match="lone surrogate"):
        session.add([{"role": "user", "content": "half a \ud83d"}])
    with pytest.raises(InputError, match="recent=0"):
        Session(memory, "chat", recent=0)
    with pytest.raises(InputError, match="system=-1"):
        Session(memory, "chat", system=-1)


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
    session.add(exchange(2), fold=False)
    change(memory.store, "UPDATE conversations SET turns = replace(turns, 'answer 2', 'answer 3')")
    for read in (lambda: session.turns, lambda: session.ids, lambda: session.add(exchange(2))):
        with pytest.raises(CorruptFileError, match=r"row of the conversation 'chat' is damaged .*clear\(\) removes it"):
            read()
    session.clear()
    assert (session.turns, session.ids, memory.list()) == ([], [], [])
    assert memory.verify() == []


def test_turns_that_no_session_keeps_are_refused_where_they_are_read(memory: BeaconMemory) -> None:
    memory.store.conversations.put(Conversation("chat", [{"role": "assistant", "content": "", "tool_calls": [7]}]))
    session = Session(memory, "chat")
    with pytest.raises(CorruptFileError, match=r"the session 'chat' cannot be read .*call clear\(\)"):
        session.turns  # noqa: B018
    session.clear()
    assert session.turns == []


def test_a_conversation_goes_on_when_the_catalog_was_lost(memory: BeaconMemory, model: BeaconModel) -> None:
    session = Session(memory, "chat", recent=60)
    for n in range(5):
        session.add(exchange(n))
    before = whole(session)
    memory.close()
    (memory.store.folder / "catalog.sqlite3").unlink()
    with BeaconMemory(memory.store.root, model, reserve=100) as again:
        again.repair()
        found = Session(again, "chat", recent=60)
        assert whole(found) == before
        found.add(exchange(5))
        assert whole(found) == before + "".join(map(line, exchange(5)))
        assert again.verify() == []


@pytest.mark.parametrize("way", ["export", "copy"])
def test_a_conversation_goes_on_where_it_was_taken(memory: BeaconMemory, tmp_path: Path, way: str) -> None:
    session = Session(memory, "chat", recent=60)
    for n in range(5):
        session.add(exchange(n))
    other = memory.within("other")
    if way == "export":
        export_documents(memory.store, tmp_path / "a.tar")
        import_documents(other.store, tmp_path / "a.tar")
    else:
        copy_documents(memory.store, other.store)
    taken = Session(other, "chat", recent=60)
    assert (taken.turns, taken.ids, whole(taken)) == (session.turns, session.ids, whole(session))
    taken.add([*exchange(5), *exchange(6)])
    assert whole(taken) == whole(session) + "".join(map(line, [*exchange(5), *exchange(6)]))
    assert other.verify() == memory.verify() == []


def test_what_is_exported_while_turns_are_folded_is_whole(
    memory: BeaconMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(memory, "chat", recent=60)
    for n in range(4):
        session.add(exchange(n))
    before = whole(session)
    new = [{"role": "user", "content": "word " * 40}, *exchange(6), *exchange(7)]
    taken: list[str] = []

    def take() -> None:
        path, into = tmp_path / f"{len(taken)}.tar", memory.within(f"taken {len(taken)}")
        export_documents(memory.store, path)
        import_documents(into.store, path)
        taken.append(whole(Session(into, "chat")))

    with monkeypatch.context() as patched:
        before_each_step(session, take, patched)
        session.add(new)
    take()
    assert {*taken} == {before, before + "".join(map(line, new))}


def test_nothing_is_found_of_a_conversation_that_was_cleared_and_erased(memory: BeaconMemory) -> None:
    words = ("quicksilver", "Jabberwock", "zymurgy")
    for id in ("Ytterbium", "kept"):
        session = Session(memory, id, recent=60)
        for word in words:
            session.add([{"role": "user", "content": f"{word} {id} " * 10}])
        session.add([{"role": "user", "content": f"{words[0]} {id}"}])
    assert b"Ytterbium" in (memory.store.folder / "sessions" / f"{hash_id('Ytterbium')}.json").read_bytes()
    (memory.store.folder / "sessions" / ".tmp-0123456789abcdef").write_text("Ytterbium of a killed process")
    kept = whole(session)
    Session(memory, "Ytterbium").clear()
    memory.erase()
    for path in memory.store.root.rglob("*"):
        if path.is_file():
            assert b"ytterbium" not in path.read_bytes().lower(), path
            assert hash_id("Ytterbium") not in path.name
    assert whole(session) == kept
    assert memory.verify() == []


@pytest.mark.parametrize("bounds", [{"recent": 0}, {"slots": 0}, {"budget": 0}, {"system": -1}])
def test_bounds_that_leave_no_room_are_refused(memory: BeaconMemory, bounds: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"must be at least 1, and system=-?\d+ at least 0"):
        Session(memory, "chat", **bounds)
