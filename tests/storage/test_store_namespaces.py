from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_samples import TEXT, same, sample
from store_samples import BYTES, IN_A_FOLDER, files, labels, put

from beacon_memory.errors import DocumentNotFoundError, InputError, MismatchedFileError
from beacon_memory.storage.archive import copy_documents, export_documents, import_documents
from beacon_memory.storage.catalog.rows import Totals
from beacon_memory.storage.erasing import erase
from beacon_memory.storage.files.label_file import label_name, read_label
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
def store(open_store: Callable[[], MemoryStore]) -> MemoryStore:
    return open_store()


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


@IN_A_FOLDER
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


@IN_A_FOLDER
def test_verify_and_repair_look_at_one_namespace(store: MemoryStore) -> None:
    inner = store.within("inner")
    for space in (store, inner):
        put(space)
        files(space)[0].unlink()
    assert [(problem.kind, problem.document) for problem in verify(inner)] == [("missing-file", "doc")]
    put(inner)
    assert verify(inner) == []
    assert [problem.kind for problem in verify(store)] == ["missing-file"]


@IN_A_FOLDER
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


USES: dict[str, Callable[[MemoryStore], object]] = {
    "get": lambda space: space.get("doc"),
    "text": lambda space: space.text("doc"),
    "row": lambda space: space.row("doc"),
    "list": MemoryStore.list,
    "search": lambda space: space.search("boat"),
    "contains": lambda space: "doc" in space,
    "totals": MemoryStore.totals,
    "settings": lambda space: space.settings,
    "files": lambda space: space.files,
    "put": lambda space: space.put(*sample("new"), TEXT),
    "update": lambda space: space.update("doc", tags=["a"]),
    "rename": lambda space: space.rename("doc", "new"),
    "convert": lambda space: space.convert("doc", "int8"),
    "delete": lambda space: space.delete("doc"),
    "expire": MemoryStore.expire,
    "drop_versions": MemoryStore.drop_versions,
    "configure": lambda space: space.configure(quota=5),
    "erase": lambda space: erase(space, ["doc"]),
    "copy": lambda space: copy_documents(space, space.within("third")),
    "copy into": lambda space: copy_documents(space.within(""), space),
}


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the locks and what SQLite shares among processes."""
    kept = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in kept if not path.name.endswith(("-shm", "-wal"))
    }


def swapped(store: MemoryStore) -> tuple[MemoryStore, MemoryStore]:
    """Two namespaces whose folders somebody has swapped."""
    put(store)
    folders = []
    for name in ("one", "two"):
        with store.within(name) as space:
            put(space, "doc", f"{TEXT} It is in {name}.")
            folders.append(space.folder)
    folders[0].rename(store.root / "other")
    folders[1].rename(folders[0])
    (store.root / "other").rename(folders[1])
    return store.within("one"), store.within("two")


@IN_A_FOLDER
def test_swapped_namespaces_are_noticed_by_every_use_and_left_as_they_are(store: MemoryStore) -> None:
    spaces = swapped(store)
    before = contents(store.root)
    for space, other in zip(spaces, reversed(spaces), strict=True):
        message = (
            f"of the namespace '{other.namespace}', not of the namespace '{space.namespace}': folders were swapped"
        )
        for use in USES.values():
            with pytest.raises(MismatchedFileError, match=message):
                use(space)
        for look in (verify, repair):
            (problem,) = look(space)
            assert (problem.kind, problem.mended) == ("damaged-catalog", False)
            assert message in problem.message
            assert f"move each back to where it belongs (the namespace '{other.namespace}' lies in {other.folder}" in (
                problem.message
            )
    assert contents(store.root) == before
    assert verify(store) == []
    assert store.text("doc") == TEXT
    one, two = spaces
    one.folder.rename(store.root / "other")
    two.folder.rename(one.folder)
    (store.root / "other").rename(two.folder)
    for space in spaces:
        assert space.text("doc") == f"{TEXT} It is in {space.namespace}."
        assert verify(space) == []


@IN_A_FOLDER
def test_a_namespace_that_lies_where_the_store_itself_does_is_noticed(store: MemoryStore, tmp_path: Path) -> None:
    with store.within("one") as space:
        put(space)
    shutil.copytree(space.folder, tmp_path / "copy")
    moved = MemoryStore(tmp_path / "copy")
    with pytest.raises(MismatchedFileError, match="is of the namespace 'one', not of the store outside of all namesp"):
        moved.list()


@IN_A_FOLDER
def test_a_file_of_another_namespace_is_reported_and_never_adopted(store: MemoryStore) -> None:
    one, two = store.within("one"), store.within("two")
    put(one)
    put(two, "other")
    name = one.row("doc").file
    (two.folder / name).parent.mkdir(parents=True, exist_ok=True)
    for end in (name, label_name(name)):
        shutil.copy(one.folder / end, two.folder / end)
    copied = contents(two.folder / "kv")
    for catalog_is_lost in (False, True):
        if catalog_is_lost:
            two.close()
            for path in two.folder.glob("catalog.sqlite3*"):
                path.unlink()
            assert ("lost-row", "other", True) in [(p.kind, p.document, p.mended) for p in repair(two)]
        for look in (verify, repair):
            problems = [problem for problem in look(two) if problem.path == name]
            assert [(problem.kind, problem.mended) for problem in problems] == [("orphan-file", False)]
            assert "is of the namespace 'one': somebody moved or copied it; move it back, or remove" in (
                problems[0].message
            )
        assert [row.id for row in two.list()] == ["other"]
        assert copied.items() <= contents(two.folder / "kv").items() or catalog_is_lost
        assert (two.folder / name).exists()


@IN_A_FOLDER
def test_a_file_that_took_the_place_of_one_of_another_namespace_is_refused(store: MemoryStore) -> None:
    one, two = store.within("one"), store.within("two")
    put(one)
    two.put(one.get("doc").header, one.get("doc").kv, TEXT)
    shutil.copy(one.folder / one.row("doc").file, two.folder / two.row("doc").file)
    with pytest.raises(MismatchedFileError, match="disagrees with its row in the namespace, hash of the whole file"):
        two.get("doc")
    for look in (verify, repair):
        assert [(problem.kind, problem.mended) for problem in look(two)] == [("mismatched-file", False)]
    assert two.text("doc") == TEXT


@IN_A_FOLDER
def test_a_label_of_another_namespace_is_written_anew(store: MemoryStore) -> None:
    one, two = store.within("one"), store.within("two")
    for space in (one, two):
        put(space)
    one.update("doc", tags=["from one"])  # newer than the row of the other
    shutil.copy(labels(one)[0], labels(two)[0])
    assert [(problem.kind, problem.document) for problem in verify(two)] == [("stale-label", "doc")]
    assert [problem.mended for problem in repair(two)] == [True]
    assert two.row("doc").tags == ()
    assert read_label(labels(two)[0]).namespace == "two"
    shutil.copy(labels(one)[0], labels(two)[0])
    two.close()
    for path in two.folder.glob("catalog.sqlite3*"):
        path.unlink()
    repair(two)
    assert two.row("doc").tags == ()
    assert verify(two) == []


@IN_A_FOLDER
def test_settings_of_another_namespace_are_ignored(store: MemoryStore) -> None:
    one, two = store.within("one"), store.within("two")
    one.configure(quota=7 * BYTES)
    two.configure(quota=9 * BYTES)
    put(two)
    for damaged in (False, True):
        two.close()
        shutil.copy(one.folder / "settings.json", two.folder / "settings.json")
        path = two.folder / "catalog.sqlite3"
        if damaged:
            path.write_bytes(b"not a database " * 100)
        else:
            path.unlink()
        repair(two)
        assert two.settings.quota is None
        assert [row.id for row in two.list()] == ["doc"]
        assert verify(two) == []
        assert store.namespaces() == ["one", "two"]


def test_documents_go_from_one_namespace_to_another(store: MemoryStore, tmp_path: Path) -> None:
    one, two = store.within("one"), store.within("two")
    kv = put(one, n=1)
    copy_documents(one, two)
    export_documents(two, tmp_path / "archive")
    import_documents(store, tmp_path / "archive")
    for space in (one, two, store):
        row, file = space.read("doc")
        assert file.header.namespace == space.namespace
        assert read_label(labels(space)[0]).namespace == space.namespace
        assert row.metadata == {"n": 1}
        assert same(file.memory(), kv)
        assert verify(space) == []
    assert len({space.row("doc").root for space in (one, two, store)}) == 3
