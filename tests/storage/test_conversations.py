"""Conversations in a store: kept as rows with copies, checked, mended and removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from crashing import fork, wait
from store_samples import IN_A_FOLDER, change, put

from beacon_memory.conversation import Conversation
from beacon_memory.errors import CorruptFileError, InputError, StoreError
from beacon_memory.storage.files import checked_json
from beacon_memory.storage.files.checked_json import stage_checked
from beacon_memory.storage.files.names import hash_id
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

FOLDING = ([0], (1, 2), "0" * 64)


@pytest.fixture
def store(open_store: Callable[[], MemoryStore]) -> MemoryStore:
    return open_store()


def talk(id: str = "talk", *words: str) -> Conversation:
    turns = [{"role": "user", "content": word, "seen": [1, None]} for word in words or ("hello", "bye")]
    return Conversation(id, turns, (2, 3), FOLDING)


def copy_of(store: MemoryStore, id: str = "talk") -> Path:
    return store.folder / "sessions" / f"{hash_id(id)}.json"


def problems(store: MemoryStore) -> list[tuple[str, str | None, str | None]]:
    return [(problem.kind, problem.document, problem.path) for problem in verify(store)]


def test_a_conversation_comes_back_as_it_was_written(store: MemoryStore) -> None:
    assert store.conversations.get("talk") is None
    first = store.conversations.put(talk())
    assert first.created_at == first.updated_at > ""
    assert replace(first, created_at="", updated_at="") == talk()
    for words in (["more"], ["\0", "\N{ROCKET}"]):
        second = store.conversations.put(talk("talk", *words))
        assert second.created_at == first.created_at < second.updated_at
        assert store.conversations.get("talk") == second
    store.conversations.put(talk("../../x\0"))
    assert store.conversations.ids() == ["../../x\0", "talk"]
    assert store.totals().conversations == 2
    store.close()
    assert store.conversations.get("talk") == second
    assert verify(store) == repair(store) == []


@IN_A_FOLDER
def test_nothing_but_the_copy_lies_beside_the_catalog_and_it_is_private(store: MemoryStore) -> None:
    with store.conversations.alone("talk"):
        store.conversations.put(talk())
    assert [*copy_of(store).parent.iterdir()] == [copy_of(store)]
    assert copy_of(store).stat().st_mode & 0o777 == 0o600
    assert copy_of(store).parent.stat().st_mode & 0o777 == 0o700
    with store.conversations.alone("talk"):
        store.conversations.remove("talk")
    assert [*copy_of(store).parent.iterdir()] == []
    assert store.conversations.get("talk") is None
    assert verify(store) == []


@IN_A_FOLDER
def test_a_namespace_has_conversations_of_its_own(store: MemoryStore, tmp_path: Path) -> None:
    far = MemoryStore(store.root, "far", files=(tmp_path / "backend").as_uri())
    for one, word in ((store, "here"), (store.within("near"), "near"), (far, "far")):
        one.conversations.put(talk("talk", word))
        found = one.conversations.get("talk")
        assert found is not None
        assert found.turns[0]["content"] == word
        assert verify(one) == []
    assert store.namespaces() == ["", "far", "near"]
    far.conversations.remove("talk")
    assert store.conversations.ids() == store.within("near").conversations.ids() == ["talk"]
    assert far.conversations.ids() == []
    assert not [path for path in (tmp_path / "backend").rglob("*") if "sessions" in str(path)]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"id": ""}, "must not be empty"),
        ({"turns": [{"role": "user"}]}, "'role' and 'content'"),
        ({"turns": "hello", "parts": [1, -5]}, r"parts=\[1, -5\]"),
        ({"turns": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"parts": (0, 1)}, r"parts=\(0, 1\)"),
        ({"parts": (3, 1)}, r"parts=\(3, 1\)"),
        ({"parts": (1, 10**12)}, "at most 100,000 of them"),
        ({"parts": "12"}, "parts='12'"),
        ({"folding": ([0, 7], (1, 1), "")}, "folding="),
        ({"folding": ([1, 0], (1, 1), "")}, "folding="),
        ({"folding": (2, 1, "")}, "folding="),
        ({"created_at": "then"}, "'then' is no time"),
        ({"updated_at": None}, "None is no time"),
    ],
)
def test_what_is_no_conversation_is_refused(fields: dict[str, object], named: str) -> None:
    given = {"id": "talk", "turns": talk().turns, **fields}
    with pytest.raises(InputError, match=named):
        Conversation(**given)  # type: ignore[arg-type]


@IN_A_FOLDER
def test_one_that_is_too_long_changes_nothing(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store.conversations.put(talk())
    monkeypatch.setattr(checked_json, "_LONGEST", 1000)
    with pytest.raises(InputError, match="the conversation 'talk' would take"):
        store.conversations.put(talk("talk", "x" * 1000))
    assert store.conversations.get("talk") == kept
    assert verify(store) == []


@IN_A_FOLDER
def test_processes_take_turns_and_lose_none(store: MemoryStore) -> None:
    def speak(name: str) -> None:
        with MemoryStore(store.root) as own:
            for number in range(20):
                with own.conversations.alone("talk"):
                    before = own.conversations.get("talk") or Conversation("talk")
                    said = {"role": "user", "content": f"{name} {number}"}
                    own.conversations.put(replace(before, turns=[*before.turns, said]))

    assert [wait(one) for one in [fork(partial(speak, name)) for name in "abc"]] == [0, 0, 0]
    found = store.conversations.get("talk")
    assert found is not None
    said = [turn["content"] for turn in found.turns]
    for name in "abc":
        assert [word for word in said if word[0] == name] == [f"{name} {number}" for number in range(20)]
    assert verify(store) == []
    assert [*copy_of(store).parent.iterdir()] == [copy_of(store)]


DAMAGES = ["turns = replace(turns, 'bye', 'lie')", "parts = '[1, 9]'", "folding = 'null'", "checksum = ''", "turns = 7"]


@IN_A_FOLDER
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_is_never_given_out_and_made_anew_from_its_copy(store: MemoryStore, damage: str) -> None:
    kept = store.conversations.put(talk())
    change(store, f"UPDATE conversations SET {damage}")
    for read in (store.conversations.get, lambda _: store.conversations.put(talk())):
        with pytest.raises(CorruptFileError, match="row of the conversation 'talk' is damaged"):
            read("talk")
    assert problems(store) == [("damaged-row", None, str(copy_of(store)))]
    assert [problem.mended for problem in repair(store)] == [True]
    assert store.conversations.get("talk") == kept
    assert verify(store) == []


@IN_A_FOLDER
def test_a_damaged_row_without_a_copy_is_named_and_can_be_removed(store: MemoryStore) -> None:
    store.conversations.put(talk())
    change(store, "UPDATE conversations SET turns = replace(turns, 'bye', 'lie')")
    copy_of(store).write_text("{}")
    for look in (verify, repair):
        (problem,) = look(store)
        assert (problem.kind, problem.mended) == ("damaged-row", False)
        assert "the conversation 'talk' is damaged" in problem.message
        assert f"its copy {copy_of(store)} is damaged" in problem.message
    assert store.conversations.ids() == ["talk"]
    store.conversations.remove("talk")
    assert verify(store) == []
    assert store.conversations.get("talk") is None


COPIES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "damaged": lambda path: path.write_text(path.read_text().replace("bye", "lie")),
    "older": lambda path: path.write_bytes(path.with_name("older").read_bytes()),
    "another": lambda path: path.write_bytes(path.with_name(f"{hash_id('other')}.json").read_bytes()),
}


@IN_A_FOLDER
@pytest.mark.parametrize("fate", COPIES)
def test_a_copy_that_is_not_its_rows_is_written_anew(store: MemoryStore, fate: str) -> None:
    store.conversations.put(talk("talk", "before"))
    older = copy_of(store).read_bytes()
    kept = store.conversations.put(talk())
    store.conversations.put(talk("other"))
    copy_of(store).with_name("older").write_bytes(older)
    COPIES[fate](copy_of(store))
    assert store.conversations.get("talk") == kept
    assert problems(store) == [("stale-label", None, str(copy_of(store)))]
    assert [problem.mended for problem in repair(store)] == [True]
    assert json.loads(copy_of(store).read_text())["turns"] == kept.turns
    assert verify(store) == []


def lose(store: MemoryStore) -> None:
    for path in store.folder.glob("catalog*"):
        path.unlink()


def damage(store: MemoryStore) -> None:
    lose(store)
    (store.folder / "catalog.sqlite3").write_bytes(b"no database" * 1000)


@IN_A_FOLDER
@pytest.mark.parametrize("fate", [lose, damage])
def test_a_lost_catalog_loses_no_conversation(store: MemoryStore, fate: Callable[[MemoryStore], None]) -> None:
    put(store)
    kept = store.conversations.put(talk())
    store.close()
    fate(store)
    assert {problem.mended for problem in repair(store)} == {True}
    assert store.conversations.ids() == ["talk"]
    assert store.conversations.get("talk") == kept
    assert verify(store) == []


@IN_A_FOLDER
def test_before_a_repair_a_conversation_is_read_from_its_copy(store: MemoryStore) -> None:
    kept = store.conversations.put(talk())
    store.close()
    lose(store)
    put(store)
    assert store.conversations.get("talk") == kept
    assert problems(store) == [("lost-row", None, str(copy_of(store)))]
    more = store.conversations.put(replace(kept, turns=[*kept.turns, {"role": "user", "content": "more"}]))
    assert more.created_at == kept.created_at < more.updated_at
    assert verify(store) == []


@IN_A_FOLDER
def test_a_copy_that_is_newer_than_an_older_catalog_is_taken(store: MemoryStore) -> None:
    store.conversations.put(talk("talk", "before"))
    store.close()
    older = (store.folder / "catalog.sqlite3").read_bytes()
    kept = store.conversations.put(talk())
    store.close()
    (store.folder / "catalog.sqlite3").write_bytes(older)
    (problem,) = verify(store)
    assert problem.kind == "stale-label"
    assert "is newer than the catalog" in problem.message
    assert [problem.mended for problem in repair(store)] == [True]
    assert store.conversations.get("talk") == kept
    assert verify(store) == []


@IN_A_FOLDER
def test_a_file_of_before_there_were_rows_is_found_and_taken_over(store: MemoryStore) -> None:
    put(store)
    store.parts.make_folder()
    fields = {"id": "talk", "turns": talk().turns, "parts": (2, 3), "folding": FOLDING}
    stage_checked(copy_of(store).parent, fields, "it").rename(copy_of(store))
    assert store.conversations.get("talk") == talk()
    (problem,) = verify(store)
    assert (problem.kind, problem.path) == ("lost-row", str(copy_of(store)))
    assert "the conversation 'talk' has no row" in problem.message
    assert [problem.mended for problem in repair(store)] == [True]
    assert store.conversations.ids() == ["talk"]
    store.conversations.put(talk())
    assert verify(store) == []


@IN_A_FOLDER
def test_a_damaged_copy_without_a_row_is_named_and_left(store: MemoryStore) -> None:
    store.conversations.put(talk())
    store.close()
    lose(store)
    copy_of(store).write_text("{}")
    put(store)
    with pytest.raises(CorruptFileError, match="is damaged"):
        store.conversations.get("talk")
    for look in (verify, repair):
        assert [(one.kind, one.path, one.mended) for one in look(store)] == [
            ("damaged-file", str(copy_of(store)), False)
        ]
    store.conversations.remove("talk")
    assert verify(store) == []


@IN_A_FOLDER
def test_no_conversation_is_read_or_written_behind_a_link(store: MemoryStore, tmp_path: Path) -> None:
    store.conversations.put(talk())
    folder, outside = copy_of(store).parent, tmp_path / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    (outside / ".tmp-0123456789abcdef").touch()
    before = {path: path.read_bytes() for path in outside.iterdir()}
    for write in (
        lambda: store.conversations.put(talk()),
        lambda: store.conversations.remove("talk"),
        lambda: store.conversations.alone("talk").__enter__(),
    ):
        with pytest.raises(StoreError, match="is a link, which would lead out of the store"):
            write()
    for look in (verify, repair):
        (problem,) = look(store)
        assert (problem.kind, problem.mended) == ("stale-label", False)
        assert "is a link" in problem.message
    assert {path: path.read_bytes() for path in outside.iterdir()} == before


def test_a_removal_that_fails_leaves_the_conversation(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store.conversations.put(talk())

    def fail(_: str) -> None:
        raise StoreError("full")

    with monkeypatch.context() as patched:
        patched.setattr(store.parts.catalog().conversations, "remove", fail)
        with pytest.raises(StoreError, match="full"):
            store.conversations.remove("talk")
    assert store.conversations.get("talk") == kept
    assert verify(store) == []


def test_a_copy_of_another_namespace_is_never_taken(tmp_path: Path) -> None:
    copies = {}
    for name in ("", "other"):
        with MemoryStore(tmp_path / "store", name) as store:
            store.conversations.put(Conversation("talk", [{"role": "user", "content": f"hello {name}"}]))
            (copies[name],) = (store.folder / "sessions").glob("*.json")
    shutil.copyfile(copies["other"], copies[""])  # it is the later one
    with MemoryStore(tmp_path / "store") as store:
        assert [(problem.kind, problem.mended) for problem in repair(store)] == [("stale-label", True)]
        assert store.conversations.get("talk").turns[0]["content"] == "hello "
        store.conversations.remove("talk")
        shutil.copyfile(copies["other"], copies[""])
        with pytest.raises(CorruptFileError, match="is of the namespace 'other'"):
            store.conversations.get("talk")
        assert [(problem.kind, problem.mended) for problem in repair(store)] == [("damaged-file", False)]
