"""All that changes a store, each with a store to do it to, and what is there before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import workload
from crashing import copied, everything
from workload import document, label

from beacon_memory.conversation import Conversation
from beacon_memory.storage.erasing import erase
from beacon_memory.storage.repair import verify
from beacon_memory.storage.store import MemoryStore

Act = Callable[[MemoryStore], object]


def put(id: str, version: str, **options: object) -> Act:
    def act(store: MemoryStore) -> None:
        store.put(*document(id, version), label(version), created_at="2026-01-01T00:00:00.000+00:00", **options)

    return act


def append(store: MemoryStore) -> None:
    assert workload.append(store, "doc", "2")


def appended(times: int) -> Act:
    """Let a document have grown so many times."""

    def act(store: MemoryStore) -> None:
        two(store)
        for _ in range(times):
            append(store)

    return act


def recompress(store: MemoryStore) -> None:
    header, kv, text = document("doc", "1")
    store.put(replace(header, fingerprint=replace(header.fingerprint, base="another")), kv, text, keep_version=True)


def two(store: MemoryStore) -> None:
    put("kept", "0")(store)
    put("doc", "1")(store)


def full(store: MemoryStore) -> None:
    two(store)
    recompress(store)
    store.update("kept", pinned=True)
    put("used", "2")(store)
    store.configure(quota=store.totals().bytes)
    store.parts.catalog().documents.touch({"used": 2**40})


def expired(store: MemoryStore) -> None:
    two(store)
    store.update("doc", expires_at="2020-01-01T00:00:00Z")


def recompressed(store: MemoryStore) -> None:
    two(store)
    recompress(store)


def say(*words: str) -> Act:
    """Let the conversation `talk` have these turns."""
    turns = [{"role": "user", "content": word} for word in words]
    created_at = "2026-01-01T00:00:00.000+00:00"
    return lambda store: store.conversations.put(Conversation("talk", turns, created_at=created_at))


def talking(store: MemoryStore) -> None:
    two(store)
    say("hello")(store)


@dataclass(frozen=True)
class Change:
    """What is done to a store, what makes that store, and the problems that may be left of it where one call fails."""

    prepare: Act
    act: Act
    excused: frozenset[str] = frozenset()


COPY = frozenset({"stale-label"})  # of a conversation that is stored already

CHANGES = {
    "first put": Change(lambda _: None, put("doc", "1")),
    "put": Change(two, put("new", "2")),
    "replacement": Change(two, put("doc", "2")),
    "append": Change(two, append),
    "append that takes in a segment": Change(appended(1), append),
    "append that makes one file of all": Change(appended(3), append),
    "replacement of segments": Change(appended(3), put("doc", "2")),
    "delete of segments": Change(appended(3), lambda store: store.delete("doc")),
    "recompression": Change(two, recompress),
    "eviction": Change(full, put("new", "3")),
    "put in place of an expired one": Change(expired, put("doc", "2")),
    "put into a new namespace": Change(two, lambda store: put("doc", "2")(store.within("other"))),
    "update": Change(two, lambda store: store.update("doc", tags=["new"], pinned=True)),
    "rename": Change(recompressed, lambda store: store.rename("doc", "renamed")),
    "float16": Change(two, lambda store: store.convert("doc", "float16")),
    "int8": Change(two, lambda store: store.convert("doc", "int8")),
    "delete": Change(recompressed, lambda store: store.delete("doc")),
    "expire": Change(expired, MemoryStore.expire),
    "drop_versions": Change(recompressed, MemoryStore.drop_versions),
    "first turn": Change(two, say("hello"), COPY),
    "next turn": Change(talking, say("hello", "bye"), COPY),
    "conversation removed": Change(talking, lambda store: store.conversations.remove("talk"), COPY | {"stale-temp"}),
}

# If erasing fails, the documents may be gone all the same; after a crash they are there or gone.
CRASHING = {**CHANGES, "erase": Change(recompressed, lambda store: erase(store, ["doc"]))}


@dataclass(frozen=True)
class Prepared:
    """A store to copy, what is done to it, what it holds before and after, and what is excused; see `Change`."""

    template: Path
    act: Act
    before: object
    after: object
    excused: frozenset[str]


def prepare(folder: Path, name: str) -> Prepared:
    """One of CRASHING, prepared in a folder."""
    change = CRASHING[name]
    template, done = folder / "template", folder / "done"
    with MemoryStore(template) as store:
        change.prepare(store)
    before = everything(template)
    with MemoryStore(copied(template, done)) as store:
        change.act(store)
        assert verify(store) == []
    return Prepared(template, change.act, before, everything(done), change.excused)
