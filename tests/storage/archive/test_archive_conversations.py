"""Conversations are moved with all documents, each with its own, and read as if they came from an enemy."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from damage import sealed
from kv_samples import sample

from beacon_memory.conversation import Conversation
from beacon_memory.documents import SESSION_TAG, Label
from beacon_memory.errors import CorruptFileError, InputError, StoreError
from beacon_memory.storage.archive import copy_documents, export_documents, import_documents
from beacon_memory.storage.repair import verify
from beacon_memory.storage.store import MemoryStore

IDS = ("../../a", "ü" * 500)


def said(*words: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": word, "seen": [1, None]} for word in words]


def put_part(store: MemoryStore, id: str, text: str) -> None:
    store.put(*sample(id, text), text, Label(tags=[SESSION_TAG]))


@pytest.fixture
def source(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "source") as store:
        for id in IDS:
            for number in (1, 2):
                put_part(store, f"{id}/{number}", f"Part {number} of it.")
            store.conversations.put(Conversation(id, said("hello", "bye"), (1, 2), ([1], (1, 3), "0" * 64)))
        store.put(*sample("doc", "Of nobody."), "Of nobody.")
        yield store


@pytest.fixture
def target(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "target") as store:
        yield store


def talks(store: MemoryStore) -> dict[str, Conversation | None]:
    found = {id: store.conversations.get(id) for id in store.conversations.ids()}
    return {id: one and replace(one, updated_at="") for id, one in found.items()}


def move(source: MemoryStore, target: MemoryStore, way: str, ids: list[str] | None = None, **options: Any) -> int:
    if way == "copy":
        return copy_documents(source, target, ids, **options)
    path = target.root.with_name("archive.tar")
    path.unlink(missing_ok=True)
    export_documents(source, path, ids)
    return import_documents(target, path, **options)


ways = pytest.mark.parametrize("way", ["export", "copy"])


@ways
def test_conversations_move_with_all_documents(source: MemoryStore, target: MemoryStore, way: str) -> None:
    assert move(source, target, way) == 5
    assert talks(target) == talks(source)
    assert [row.id for row in target.list()] == [row.id for row in source.list()]
    assert verify(target) == verify(source) == []


@ways
def test_with_single_documents_go_no_conversations(source: MemoryStore, target: MemoryStore, way: str) -> None:
    assert move(source, target, way, ["doc", f"{IDS[0]}/1"]) == 2
    assert talks(target) == {}


@ways
def test_a_conversation_is_replaced_only_if_that_is_allowed(source: MemoryStore, target: MemoryStore, way: str) -> None:
    kept = target.conversations.put(Conversation(IDS[1], said("mine")))
    with pytest.raises(InputError, match="would replace stored conversations: allow that with replace"):
        move(source, target, way)
    assert (target.conversations.get(IDS[1]), target.list()) == (kept, [])
    assert move(source, target, way, replace=True) == 5
    found = target.conversations.get(IDS[1])
    assert found is not None
    assert (found.turns, found.created_at) == (said("hello", "bye"), kept.created_at)
    assert verify(target) == []


@ways
def test_one_that_is_stored_meanwhile_is_not_replaced(source: MemoryStore, target: MemoryStore, way: str) -> None:
    def begin(_: str) -> None:
        if not target.conversations.ids():
            with MemoryStore(target.root) as other:
                other.conversations.put(Conversation(IDS[0], said("mine")))

    with pytest.raises(InputError, match="would replace stored conversations"):
        move(source, target, way, on_document=begin)
    assert target.conversations.get(IDS[0]).turns == said("mine")  # type: ignore[union-attr]
    assert verify(target) == []


@ways
def test_what_changes_while_it_is_read_is_read_again(
    source: MemoryStore, target: MemoryStore, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, again = source.read, [IDS[0]]

    def changing(document: str, *rest: Any) -> Any:
        found = read(document, *rest)
        if document == f"{IDS[0]}/2" and again:
            again.pop()
            put_part(source, f"{IDS[0]}/1", "A new part.")
            source.conversations.put(Conversation(IDS[0], said("new"), (1, 2)))
        return found

    monkeypatch.setattr(source, "read", changing)
    move(source, target, way)
    assert target.text(f"{IDS[0]}/1") == "A new part."
    assert talks(target)[IDS[0]].turns == said("new")  # type: ignore[union-attr]

    again += [IDS[0]] * 100
    target.root.with_name("archive.tar").unlink(missing_ok=True)
    with pytest.raises(StoreError, match=r"was changed 5 times while it was read; try again"):
        move(source, target, way, replace=True)


Members = list[tuple[str, bytes]]


def members_of(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(one.name, tar.extractfile(one).read()) for one in tar]  # type: ignore[union-attr]  # all files


def write(path: Path, members: Members) -> None:
    """Write members with a manifest that fits them, as somebody would write it to do harm."""
    listed = [[name, len(data), hashlib.sha256(data).hexdigest()] for name, data in members[1:]]
    manifest = {"files": listed, "sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest()}
    with tarfile.open(path, "w") as tar:
        for name, data in [*members, ("manifest.json", json.dumps(manifest).encode())]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def fields(**changed: object) -> bytes:
    given = {"format": 1, "id": "x", "turns": said("hello"), "parts": [1, 0], "folding": None}
    return json.dumps(sealed({**given, "created_at": "", "updated_at": "", **changed})).encode()


EVIL: dict[str, bytes] = {
    "no JSON": b"{",
    "deep JSON": b"[" * 100_000,
    "deep turns": fields(turns=None).replace(b"null", b"[" * 500 + b"]" * 500),
    "another hash": fields().replace(b"hello", b"hallo"),
    "no id": fields(id=""),
    "no text": fields(turns=[{"role": "user", "content": "\ud800"}]),
    "no turns": fields(turns=7),
    "too many parts": fields(parts=[1, 10**15]),
    "negative parts": fields(parts=[-5, 7]),
    "turns that are not there": fields(folding=[[1], [1, 1], ""]),
    "more fields": fields(more=1),
    "no time": fields(updated_at="soon"),
}


@pytest.mark.parametrize("kind", EVIL)
def test_a_conversation_that_no_export_writes_is_refused(
    source: MemoryStore, target: MemoryStore, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "a.tar"
    export_documents(source, path)
    write(path, [*members_of(path)[:-1], ("conversations/000000002.json", EVIL[kind])])
    with pytest.raises(CorruptFileError, match=r"cannot be imported: conversations/000000002.json cannot be read"):
        import_documents(target, path)
    assert (target.list(), talks(target), verify(target)) == ([], {}, [])


CHANGES: dict[str, Callable[[Members], Members]] = {
    "as it was": lambda m: m,
    "in another place": lambda m: [m[0], *[one for one in m if one[0].startswith("conv")], *_documents(m)],
    "twice": lambda m: [*m, ("conversations/000000002.json", dict(m)["conversations/000000000.json"])],
    "first missing": lambda m: [one for one in m if one[0] != "conversations/000000000.json"],
    "in another order": lambda m: [m[0], *_documents(m), *[one for one in m if one[0].startswith("conv")][::-1]],
    "of another name": lambda m: [*m, ("conversations/x.json", fields())],
    "a K/V file": lambda m: [*m, ("conversations/000000002.safetensors", fields())],
}


def _documents(members: Members) -> Members:
    return [one for one in members if one[0].startswith("documents/")]


@pytest.mark.parametrize("kind", CHANGES)
def test_members_in_another_order_or_of_another_name_are_refused(
    source: MemoryStore, target: MemoryStore, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "a.tar"
    export_documents(source, path)
    write(path, CHANGES[kind](members_of(path)[:-1]))
    if kind in ("as it was", "in another place"):  # documents and conversations may stand side by side
        assert import_documents(target, path) == 5
        assert talks(target) == talks(source)
        return
    with pytest.raises(CorruptFileError, match="cannot be imported"):
        import_documents(target, path)
    assert (target.list(), talks(target), verify(target)) == ([], {}, [])
