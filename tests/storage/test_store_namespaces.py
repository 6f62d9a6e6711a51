from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_samples import TEXT, same
from store_samples import BYTES, files, put

from beacon_memory.errors import DocumentNotFoundError, InputError
from beacon_memory.storage.catalog.rows import Totals
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

EVIL = [
    "../../up",
    "/etc/passwd",
    "a\0b",
    ".",
    "..",
    "kv",
    "namespaces",
    "a" * 10_000,
    "\u202e",
    " ",
    "CON",
    "ü/🚀",
    "A",
    "a",
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store") as store:
        yield store


def test_nothing_of_one_namespace_is_seen_in_another(store: MemoryStore) -> None:
    spaces = {name: store.within(name) for name in ("", "one", "two")}
    kept = {name: put(space, "doc", f"{TEXT} It is in {name or 'none'}.", space=name) for name, space in spaces.items()}
    put(spaces["one"], "only", "Something else about zebras.")
    spaces["one"].update("only", tags=["x"])
    for name, space in spaces.items():
        others = ["only"] * (name == "one")
        assert [row.id for row in space.list()] == ["doc", *others]
        assert [row.id for row in space.list(metadata={"space": name})] == ["doc"]
        assert [row.id for row in space.list(tags=["x"])] == others
        assert [row.id for row in space.list(prefix="on")] == others
        assert [hit.document for hit in space.search("zebras")] == others
        assert ("only" in space) == (name == "one")
        assert space.text("doc").endswith(f" It is in {name or 'none'}.")
        assert same(space.get("doc").kv, kept[name])
        assert space.totals() == Totals(1 + len(others), (1 + len(others)) * BYTES)
        assert verify(space) == []
    for name in ("", "two"):
        for use in (spaces[name].get, spaces[name].text, spaces[name].delete, spaces[name].update):
            with pytest.raises(DocumentNotFoundError, match=r"no document 'only' is stored; list\(\) shows"):
                use("only")


def test_what_is_done_in_one_namespace_leaves_the_others(store: MemoryStore) -> None:
    one, two = store.within("one"), store.within("two")
    kept = {space: put(space) for space in (store, one, two)}
    one.rename("doc", "new")
    two.delete("doc")
    assert "doc" in store
    assert [row.id for row in one.list()] == ["new"]
    assert two.list() == []
    assert same(store.get("doc").kv, kept[store])
    put(two, text="quite another text")
    assert same(store.get("doc").kv, kept[store])
    assert store.text("doc") == TEXT
    store.delete("doc")
    assert same(one.get("new").kv, kept[one])
    assert two.text("doc") == "quite another text"
    for space in (store, one, two):
        assert repair(space) == []


@pytest.mark.parametrize("name", EVIL)
def test_any_text_names_a_namespace_and_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    with MemoryStore(tmp_path / "store") as store:
        put(store)
        inner = store.within(name)
        kv = put(inner, "inside")
        assert [row.id for row in store.list()] == ["doc"]
        assert same(MemoryStore(tmp_path / "store", name).get("inside").kv, kv)
        assert store.namespaces() == inner.namespaces() == ["", name]
        assert verify(store) == verify(inner) == []
        assert inner.folder.parent == store.folder / "namespaces"
        assert inner.folder.name.isalnum()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


@given(names=st.sets(st.text(min_size=1), max_size=3), data=st.data())
@settings(max_examples=10, deadline=None)
def test_namespaces_are_told_apart_by_every_character(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], data: st.DataObject
) -> None:
    with MemoryStore(tmp_path_factory.mktemp("any") / "store") as store:
        for name in names:
            put(store.within(name), name)
        assert store.namespaces() == sorted(names)
        for name in names:
            assert [row.id for row in store.within(name).list()] == [name]
        assert store.list() == []


@pytest.mark.parametrize("name", ["\ud800", 3, None, b"a"])
def test_what_is_no_text_is_no_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"must be a str|surrogate"):
        MemoryStore(tmp_path / "store", name)
    with pytest.raises(InputError, match=r"must be a str|surrogate"):
        MemoryStore(tmp_path / "store").within(name)


def test_reading_a_namespace_that_is_not_there_leaves_nothing(store: MemoryStore) -> None:
    inner = store.within("inner")
    assert [*inner.list(), *inner.search("boat"), *verify(inner), *repair(inner), *inner.namespaces()] == []
    assert "doc" not in inner
    assert not store.folder.exists()
    put(store)
    assert "doc" not in inner
    assert inner.totals() == Totals(0, 0)
    assert store.namespaces() == [""]
    assert not inner.folder.exists()
    assert sorted(path.name for path in store.folder.iterdir() if path.is_dir()) == ["kv"]


def test_a_namespace_is_a_store_without_the_one_around_it(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store", "inner") as inner:
        put(inner)
        assert inner.namespaces() == ["inner"]
        assert inner.within("inner") is inner
        assert inner.within("").list() == []
        assert inner.within("other").within("inner").row("doc") == inner.row("doc")
        assert len(files(inner)) == 1
        assert files(inner.within("")) == []


def test_verify_and_repair_look_at_one_namespace(store: MemoryStore) -> None:
    inner = store.within("inner")
    for space in (store, inner):
        put(space)
        files(space)[0].unlink()
    assert [(problem.kind, problem.document) for problem in verify(inner)] == [("missing-file", "doc")]
    put(inner)
    assert verify(inner) == []
    assert [problem.kind for problem in verify(store)] == ["missing-file"]


def test_a_namespace_whose_catalog_is_lost_keeps_its_name_and_documents(store: MemoryStore) -> None:
    store.configure(quota=10 * BYTES)
    inner = store.within("inner")
    kv = put(inner, a=1)
    inner.close()
    (inner.folder / "catalog.sqlite3").unlink()
    assert [problem.mended for problem in repair(inner)] == [True]
    assert inner.namespaces() == ["", "inner"]
    assert same(inner.get("doc").kv, kv)
    assert inner.settings.quota == 10 * BYTES


def test_a_broken_catalog_of_one_namespace_hides_no_other(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store") as store:
        for name in ("alice", "bob"):
            with store.within(name) as part:
                put(part)
        (store.within("bob").folder / "catalog.sqlite3").write_bytes(b"not a database " * 100)
        assert store.namespaces() == ["alice", "bob"]
        (store.within("bob").folder / "settings.json").unlink()
        assert store.namespaces() == ["alice"]
