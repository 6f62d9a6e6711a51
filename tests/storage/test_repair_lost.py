"""Catalogs that were lost, that cannot be used, and those of yesterday."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from catalog_samples import LONG_AGO
from kv_samples import same, sample
from store_samples import change, files, labels, put
from upkeep_samples import (
    LABEL,
    LONG,
    everything,
    file,
    flip,
    kinds,
    leave_catalog,
    replaced_file,
    stale_label,
)

from beacon_memory.documents import Label, Text
from beacon_memory.errors import CorruptFileError, StoreError
from beacon_memory.storage import leftovers
from beacon_memory.storage import repair as module
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.files.access import Files
from beacon_memory.storage.files.kv_file import stage_kv_file
from beacon_memory.storage.files.marks import lay_mark
from beacon_memory.storage.files.names import file_stem
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.settings import Settings
from beacon_memory.storage.store import MemoryStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store") as store:
        yield store


def copy_of_catalog(store: MemoryStore) -> bytes:
    return leave_catalog(store).read_bytes()


def test_a_lost_catalog_comes_back_with_all_but_times_of_use(store: MemoryStore) -> None:
    store.put(*sample("a", LONG), LONG, LABEL, created_at=LONG_AGO)
    for id in ("b/ü 🚀\0", "c"):
        put(store, id, n=1)
    store.update("c", expires_at=LONG_AGO)
    settings = store.configure(quota=10**6, precision="float32")
    before, identity = everything(store), store.parts.catalog().properties.get("identity")
    leave_catalog(store).unlink()
    assert store.list() == []
    assert kinds(repair(store)) == [("lost-row", id) for id in sorted(["a", "b/ü 🚀\0", "c"], key=file_stem)]
    assert all(content.stands(store) for content in before)
    assert [row.id for row in store.list()] == ["a", "b/ü 🚀\0"]
    assert store.expire() == ["c"]
    assert (store.settings, store.parts.catalog().properties.get("identity")) == (settings, identity)
    assert verify(store) == []


def test_what_a_killed_writer_left_after_the_files_were_listed_is_no_lost_row(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "kept")
    listed = leftovers.suspected_files

    def overtaken(catalog: Catalog, files: Files) -> set[str]:
        monkeypatch.setattr(module, "suspected_files", listed)
        found = listed(catalog, files)
        lay_mark(files, (name := f"{file_stem('new')}-{catalog.file_names.take_number():012x}.safetensors"))
        files.publish(stage_kv_file(files.make_staging(), *sample("new", LONG), Text(LONG)).path, name)
        return found

    monkeypatch.setattr(module, "suspected_files", overtaken)
    repair(store)
    assert verify(store) == []
    assert [row.id for row in store.list()] == ["kept"]
    assert len(files(store)) == 1


def test_a_lost_row_without_a_label_comes_back_without_one(store: MemoryStore) -> None:
    kv = put(store, a=1)
    made = store.get("doc").header.created_at
    leave_catalog(store).unlink()
    labels(store)[0].unlink()
    assert kinds(repair(store)) == [("lost-row", "doc")]
    assert same(store.get("doc").kv, kv)
    assert (store.row("doc").label, store.row("doc").created_at) == (Label(), made)
    assert verify(store) == []


def test_a_lost_row_does_not_take_the_label_of_another(store: MemoryStore) -> None:
    put(store)
    made = store.get("doc").header.created_at
    stale_label(store, id="other")
    leave_catalog(store).unlink()
    assert kinds(repair(store)) == [("lost-row", "doc")]
    assert (store.row("doc").label, store.row("doc").created_at) == (Label(), made)
    assert verify(store) == []


def test_of_several_files_of_a_lost_row_the_last_whole_one_counts(store: MemoryStore) -> None:
    put(store, text="the first text", n=1)
    replaced_file(store)
    put(store, "other")
    first, second = sorted(file(store).parent.glob("*.safetensors"))
    leave_catalog(store).unlink()
    flip(second, -5)
    assert kinds(repair(store)) == [("lost-row", "doc"), ("lost-row", "other")]
    assert file(store) == first
    assert store.text("doc") == "the first text"
    assert store.row("doc").metadata == {"n": 1}
    for _ in range(2):  # the damaged one is the only copy of what was said last
        (problem,) = repair(store)
        assert (problem.kind, problem.document, problem.mended) == ("lost-row", "doc", False)
    assert len(files(store)) == 3


def test_a_lost_row_whose_file_is_damaged_is_kept_and_reported(store: MemoryStore) -> None:
    put(store)
    flip(file(store), -5)
    leave_catalog(store).unlink()
    for look in (verify, repair, repair):
        (problem,) = look(store)
        assert (problem.kind, problem.document, problem.mended) == ("lost-row", "doc", False)
    assert len(files(store)) == len(labels(store)) == 1


def test_a_label_alone_is_kept_and_reported(store: MemoryStore) -> None:
    put(store)
    file(store).unlink()
    leave_catalog(store).unlink()
    for look in (verify, repair, repair):
        (problem,) = look(store)
        assert (problem.kind, problem.mended) == ("orphan-file", False)
        assert "is a label without K/V" in problem.message
    assert len(labels(store)) == 1


def test_a_document_that_was_added_again_is_not_replaced_by_its_lost_file(store: MemoryStore) -> None:
    put(store, text="the old text")
    leave_catalog(store).unlink()
    put(store, text="the new text")
    assert {problem.kind for problem in repair(store)} == {"orphan-file"}
    assert store.text("doc") == "the new text"
    assert len(files(store)) == len(labels(store)) == 1
    assert verify(store) == []


def test_a_catalog_of_yesterday_finds_what_came_later(store: MemoryStore) -> None:
    for id in ("deleted", "kept", "replaced", "renamed"):
        put(store, id, f"{id}, as it was yesterday")
    yesterday = copy_of_catalog(store)
    put(store, "replaced", "replaced, as it is today", day="today")
    put(store, "new", "new, as it is today")
    store.rename("renamed", "with a new name")
    store.update("kept", tags=["today"])
    store.delete("deleted")
    today = everything(store)
    leave_catalog(store).write_bytes(yesterday)
    found = {problem.kind for problem in verify(store)}
    assert found == {"missing-file", "lost-row", "stale-label"}
    done = repair(store)
    unmended = [problem.document for problem in done if not problem.mended]
    assert unmended == ["deleted", "renamed"]  # their texts are there, and their K/V were removed
    for content in today:
        if content.row.id != "kept":  # of a label the catalog's counts
            assert content.stands(store)
    assert store.text("kept") == "kept, as it was yesterday"
    assert kinds(verify(store)) == [("missing-file", "deleted"), ("missing-file", "renamed")]
    for id in ("deleted", "renamed"):
        store.delete(id)
    assert verify(store) == []


def test_what_came_later_is_found_after_new_documents_too(store: MemoryStore) -> None:
    put(store, "replaced", "yesterday")
    yesterday = copy_of_catalog(store)
    put(store, "lost", "today")
    put(store, "replaced", "today")
    lost = everything(store)
    leave_catalog(store).write_bytes(yesterday)
    put(store, "new", "tomorrow")
    store.update("new", tags=["x"])
    put(store, "new", "the day after")
    done = repair(store)
    assert {problem.kind for problem in done} == {"missing-file", "stale-label", "lost-row"}
    assert all(problem.mended for problem in done)
    assert all(content.stands(store) for content in lost)
    assert store.text("new") == "the day after"
    assert verify(store) == []
    assert len(files(store)) == 3


def test_a_row_that_came_back_is_forgotten_again_by_the_next_delete(store: MemoryStore) -> None:
    yesterday = copy_of_catalog(store) if store.settings and put(store, "other") else b""
    put(store)
    leave_catalog(store).write_bytes(yesterday)
    repair(store)
    assert "doc" in store
    store.delete("doc")
    put(store)
    replaced_file(store)
    assert {problem.kind for problem in repair(store)} == {"orphan-file"}
    assert verify(store) == []


def test_new_files_come_after_those_that_came_back(store: MemoryStore) -> None:
    put(store)
    ahead = store.folder / f"{file_stem('doc')}-{2**47:012x}.safetensors"  # of a clock that went wrong
    file(store).rename(ahead)
    leave_catalog(store).unlink()
    repair(store)
    assert file(store) == ahead
    put(store, text="a later text")
    assert file(store).name > ahead.name
    leave_catalog(store).unlink()
    repair(store)
    assert store.text("doc") == "a later text"


def test_a_catalog_that_cannot_be_read_is_put_aside(store: MemoryStore) -> None:
    store.configure(quota=10**6, precision="bfloat16")
    kv = put(store)
    (store.folder / "settings.json").unlink()
    path = leave_catalog(store)
    path.write_bytes(broken := b"not a database " * 100)
    with pytest.raises(CorruptFileError, match="file is not a database; `beacon-memory repair` makes it anew"):
        store.list()
    (seen,) = verify(store)
    assert (seen.kind, seen.mended, seen.path) == ("damaged-catalog", False, str(path))
    assert path.read_bytes() == broken
    first, second = repair(store)
    assert (first.kind, first.mended, second.kind, second.mended) == ("damaged-catalog", True, "lost-row", True)
    (aside,) = store.folder.glob("damaged-*.sqlite3")
    assert aside.name in first.message
    assert "its settings could not be read" in first.message
    assert aside.read_bytes() == broken
    assert same(store.get("doc").kv, kv)
    assert verify(store) == []


def test_a_catalog_that_is_put_aside_leaves_its_settings_and_identity(store: MemoryStore) -> None:
    store.configure(quota=10**6, precision="float16")
    put(store)
    settings, identity = store.settings, store.parts.catalog().properties.get("identity")
    change(store, "DROP TABLE passages_fts_data")
    assert [problem.kind for problem in repair(store)] == ["damaged-catalog", "lost-row"]
    assert (store.settings, store.parts.catalog().properties.get("identity")) == (settings, identity)
    assert verify(store) == []


def _lose(store: MemoryStore, *names: str) -> None:
    for name in names:
        change(store, f"DELETE FROM properties WHERE name = '{name}'")


DAMAGE_TO_SETTINGS: dict[str, Callable[[MemoryStore], object]] = {
    "a quota": lambda store: change(store, "UPDATE properties SET value = value / 1000 WHERE name = 'quota'"),
    "a type": lambda store: change(store, "UPDATE properties SET value = CAST(value AS TEXT) WHERE name = 'quota'"),
    "a precision": lambda store: change(store, "UPDATE properties SET value = 'int4' WHERE name = 'precision'"),
    "an identity": lambda store: change(store, "UPDATE properties SET value = replace(value, 'a', 'b') || '' || 'c'"),
    "a name": lambda store: change(store, "UPDATE properties SET name = 'quotb' WHERE name = 'quota'"),
    "a name that is no text": lambda store: change(
        store, "UPDATE properties SET name = CAST(x'71ff' AS TEXT) WHERE name = 'quota'"
    ),
    "a seal": lambda store: change(store, "UPDATE properties SET checksum = '' WHERE name = 'cache_bytes'"),
    "an identity gone": lambda store: _lose(store, "identity"),
}


@pytest.mark.parametrize("name", DAMAGE_TO_SETTINGS)
def test_damaged_settings_are_refused_and_come_back_from_their_copy(store: MemoryStore, name: str) -> None:
    settings = store.configure(quota=10**6, precision="bfloat16")
    kv, identity = put(store), store.parts.catalog().properties.get("identity")
    DAMAGE_TO_SETTINGS[name](store)
    if "gone" not in name:
        for use in (lambda: store.settings, lambda: put(store, "new"), lambda: store.configure(quota=7)):
            with pytest.raises(CorruptFileError, match=r"is damaged; `beacon-memory repair` mends it"):
                use()
    assert [problem.kind for problem in verify(store)][:1] == ["damaged-catalog"]
    assert all(problem.mended for problem in repair(store))
    assert (store.settings, store.parts.catalog().properties.get("identity")) == (settings, identity)
    assert same(store.get("doc").kv, kv)
    assert verify(store) == []


@pytest.mark.parametrize("name", [name for name in DAMAGE_TO_SETTINGS if "gone" not in name])
def test_what_damaged_settings_do_not_keep_from_being_removed_is_gone(store: MemoryStore, name: str) -> None:
    store.configure(quota=10**6, precision="bfloat16")
    put(store)
    kv = put(store, "other")
    DAMAGE_TO_SETTINGS[name](store)
    store.delete("doc")  # no error: it is removed, its file left to repair
    assert "doc" not in store
    assert all(problem.mended for problem in repair(store))
    assert [row.id for row in store.list()] == ["other"]
    assert same(store.get("other").kv, kv)
    assert len(files(store)) == 1
    assert verify(store) == []


def test_damaged_settings_without_a_copy_are_those_of_a_new_store(store: MemoryStore) -> None:
    store.configure(quota=10**6, precision="bfloat16")
    kv = put(store)
    (store.folder / "settings.json").write_text("{}")
    assert kinds(verify(store)) == [("stale-label", None)]
    change(store, "UPDATE properties SET value = 7 WHERE name = 'quota'")
    assert [problem.mended for problem in repair(store)] == [True, True]
    assert store.settings == Settings(precision="bfloat16")
    assert same(store.get("doc").kv, kv)
    assert verify(store) == []


def test_a_lost_catalog_of_remote_files_knows_where_they_are(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store", "somebody") as store:
        store.configure(files=(tmp_path / "elsewhere").as_uri())
        kv = put(store)
        leave_catalog(store).unlink()
        assert kinds(repair(store)) == [("lost-row", "doc")]
        assert same(store.get("doc").kv, kv)
        assert store.namespaces() == ["somebody"]
        assert verify(store) == []


def test_another_process_goes_on_with_the_new_catalog(store: MemoryStore) -> None:
    put(store)
    with MemoryStore(store.folder) as other:
        assert len(other.list()) == 1
        leave_catalog(store)
        change(store, "DROP TABLE passages_fts_data")
        repair(store)
        put(other, "new")
        assert [row.id for row in store.list()] == ["doc", "new"]
    assert verify(store) == []


def test_a_newer_catalog_is_left_alone(store: MemoryStore) -> None:
    put(store)
    change(store, "INSERT INTO _sqlite_migrations (migration_set, name) VALUES ('beacon_memory', 'm999_future')")
    store.close()
    for look in (verify, repair):
        with pytest.raises(StoreError, match="upgrade beacon_memory") as caught:
            look(store)
        assert not isinstance(caught.value, CorruptFileError)
    assert not list(store.folder.glob("damaged-*"))
