"""Documents go into archives, out of them, and from store to store, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from archive_samples import CREATED, IDS, assert_empty, assert_same
from damage import FORMS, file_of
from kv_samples import TEXT, same
from store_samples import put

from beacon_memory.documents import Label
from beacon_memory.errors import BeaconMemoryError, CorruptFileError, DocumentNotFoundError, InputError, QuotaError
from beacon_memory.storage.archive import copy_documents, export_documents, import_documents
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore


def test_documents_go_into_an_archive_and_out_of_it_bit_for_bit(
    source: MemoryStore, target: MemoryStore, tmp_path: Path
) -> None:
    exported: list[str] = []
    imported: list[str] = []
    assert export_documents(source, tmp_path / "new" / "a.tar", on_document=exported.append) == 3
    assert import_documents(target, tmp_path / "new" / "a.tar", on_document=imported.append) == 3
    assert exported == imported == [row.id for row in source.list()]
    assert_same(source, target)
    assert {row.created_at for row in target.list()} == {CREATED}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.tar"]


def test_files_of_any_format_go_into_an_archive(target: MemoryStore, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "old") as old:
        for form in FORMS:
            data, header, kv = file_of(form, form)
            row = old.put(header, kv, TEXT, Label({"form": form}), precision="as-is")
            (old.folder / row.file).write_bytes(data)
        export_documents(old, tmp_path / "a.tar")
        assert import_documents(target, tmp_path / "a.tar") == len(FORMS)
        assert_same(old, target, FORMS)
    for path in target.folder.glob("catalog*"):
        path.unlink()
    repair(target)
    assert [(row.id, target.text(row.id)) for row in target.list()] == [(form, TEXT) for form in sorted(FORMS)]


def test_only_the_documents_that_were_named_are_exported_each_once(
    source: MemoryStore, target: MemoryStore, tmp_path: Path
) -> None:
    assert export_documents(source, tmp_path / "a.tar", [IDS[2], IDS[0], IDS[2]]) == 2
    assert import_documents(target, tmp_path / "a.tar") == 2
    assert {row.id for row in target.list()} == {IDS[0], IDS[2]}
    assert_same(source, target, (IDS[0], IDS[2]))


def test_an_empty_store_makes_an_archive_of_nothing(target: MemoryStore, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "nothing") as store:
        assert export_documents(store, tmp_path / "a.tar") == 0
    assert import_documents(target, tmp_path / "a.tar") == 0
    assert_empty(target)


def test_an_expired_document_is_not_exported(changing: MemoryStore, tmp_path: Path) -> None:
    changing.update(IDS[0], expires_at="2020-01-01T00:00:00Z")
    assert export_documents(changing, tmp_path / "a.tar") == 2


def test_an_export_replaces_nothing(source: MemoryStore, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (path, tmp_path / "link", tmp_path):
        with pytest.raises(InputError, match="exists; remove it"):
            export_documents(source, taken)
    assert path.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("flaw", ["unknown", "damaged", "interrupted"])
def test_an_export_that_fails_leaves_nothing(changing: MemoryStore, tmp_path: Path, flaw: str) -> None:
    def interrupt(id: str) -> None:
        raise KeyboardInterrupt

    path = changing.folder / changing.row(IDS[1]).file
    if flaw == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    error = {"unknown": DocumentNotFoundError, "damaged": CorruptFileError, "interrupted": KeyboardInterrupt}[flaw]
    with pytest.raises(error):
        export_documents(
            changing,
            tmp_path / "new" / "a.tar",
            [IDS[0], "nobody"] if flaw == "unknown" else None,
            on_document=interrupt if flaw == "interrupted" else lambda _: None,
        )
    assert not list((tmp_path / "new").glob("*"))


def test_stored_documents_are_replaced_only_if_that_is_allowed(
    source: MemoryStore, target: MemoryStore, archive: Path
) -> None:
    kv = put(target, IDS[1], "another text")
    with pytest.raises(InputError, match=r"would replace stored documents: allow that with replace"):
        import_documents(target, archive)
    assert [row.id for row in target.list()] == [IDS[1]]
    assert same(target.get(IDS[1]).kv, kv)
    created = target.row(IDS[1]).created_at
    assert import_documents(target, archive, replace=True) == 3
    assert target.row(IDS[1]).created_at == created
    assert target.text(IDS[1]) == source.text(IDS[1])
    assert target.row(IDS[1]).label == source.row(IDS[1]).label
    assert same(target.get(IDS[1]).kv, source.get(IDS[1]).kv)
    assert_same(source, target, (IDS[0], IDS[2]))


def test_an_archive_goes_into_another_namespace(source: MemoryStore, changing: MemoryStore, archive: Path) -> None:
    with changing.within("other") as other:
        assert import_documents(other, archive) == 3
        assert_same(source, other)


def once(act: Callable[[], object]) -> Callable[[str], None]:
    """Something to be told of each document, that acts when it is told of the first one."""
    told: list[str] = []

    def tell(id: str) -> None:
        told.append(id)
        if len(told) == 1:
            act()

    return tell


@pytest.mark.parametrize("way", ["import", "copy"])
def test_a_document_that_is_stored_meanwhile_is_not_replaced(
    source: MemoryStore, target: MemoryStore, archive: Path, way: str
) -> None:
    with MemoryStore(target.root) as other:
        beside = once(lambda: put(other, IDS[1], "another text"))
        move = (
            partial(import_documents, target, archive) if way == "import" else partial(copy_documents, source, target)
        )
        with pytest.raises(InputError, match=r"would replace stored documents: allow that with replace"):
            move(on_document=beside)
    assert [row.id for row in target.list()] == [IDS[0], IDS[1]]
    assert target.text(IDS[1]) == "another text"
    assert_same(source, target, IDS[:1])
    assert not list(target.folder.rglob(".tmp*"))


@pytest.mark.parametrize("way", ["export", "copy"])
@pytest.mark.parametrize("named", [False, True])
def test_documents_may_be_removed_and_renamed_before_their_turn(
    changing: MemoryStore, target: MemoryStore, tmp_path: Path, way: str, named: bool
) -> None:
    def change() -> None:
        with MemoryStore(changing.root) as other:
            other.rename(IDS[1], "renamed")
            other.delete(IDS[2])
            put(other, "new")

    gone: list[str] = []
    chosen = IDS if named else None
    if way == "export":
        count = export_documents(changing, tmp_path / "a.tar", chosen, on_document=once(change), on_gone=gone.append)
        assert import_documents(target, tmp_path / "a.tar") == count
    else:
        count = copy_documents(changing, target, chosen, on_document=once(change), on_gone=gone.append)
    assert (count, gone) == (2, [IDS[2]])
    assert {row.id for row in target.list()} == {IDS[0], "renamed"}
    assert_same(changing, target, (IDS[0], "renamed"))


def test_a_document_that_is_replaced_while_it_is_exported_is_whole(
    changing: MemoryStore, target: MemoryStore, tmp_path: Path
) -> None:
    with MemoryStore(changing.root) as other:
        export_documents(changing, tmp_path / "a.tar", on_document=once(lambda: put(other, IDS[1], "another text")))
    import_documents(target, tmp_path / "a.tar")
    assert target.text(IDS[1]) == "another text"
    assert_same(changing, target)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_import_leaves_whole_documents_only(
    source: MemoryStore, target: MemoryStore, archive: Path, after: int
) -> None:
    seen: list[str] = []

    def interrupt(id: str) -> None:
        seen.append(id)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_documents(target, archive, on_document=interrupt)
    assert [row.id for row in target.list()] == seen
    assert_same(source, target, tuple(seen))
    assert not list(target.folder.rglob(".tmp*"))
    assert import_documents(target, archive, replace=True) == 3
    assert_same(source, target)


def test_an_import_that_runs_out_of_room_leaves_whole_documents_only(
    source: MemoryStore, target: MemoryStore, archive: Path
) -> None:
    target.configure(quota=source.row(IDS[1]).bytes)
    with pytest.raises(QuotaError):  # the second one is pinned, and leaves too little for the third
        import_documents(target, archive)
    assert [row.id for row in target.list()] == [IDS[1]]
    assert_same(source, target, IDS[1:2])
    assert not list(target.folder.rglob(".tmp*"))


def test_documents_are_copied_bit_for_bit(source: MemoryStore, target: MemoryStore) -> None:
    copied: list[str] = []
    assert copy_documents(source, target, on_document=copied.append) == 3
    assert copied == [row.id for row in source.list()]
    assert_same(source, target)
    other = target.within("other")
    assert copy_documents(target, other, [IDS[1], IDS[1]]) == 1
    assert_same(target, other, IDS[1:2])
    assert [row.id for row in other.list()] == [IDS[1]]


def test_a_store_is_not_copied_into_itself(
    changing: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(changing.root)
    monkeypatch.chdir(tmp_path)
    for path in (changing.root, Path("changing"), tmp_path / "link", tmp_path / "x" / ".." / "changing"):
        with pytest.raises(InputError, match="cannot be copied into itself"):
            copy_documents(changing, MemoryStore(path), replace=True)
    named = changing.within("name")
    with pytest.raises(InputError, match="cannot be copied into itself"):
        copy_documents(named, MemoryStore(changing.root, "name"))


def test_a_copy_replaces_only_if_that_is_allowed(source: MemoryStore, target: MemoryStore) -> None:
    put(target, IDS[2], "another text")
    with pytest.raises(InputError, match="would replace stored documents"):
        copy_documents(source, target)
    with pytest.raises(DocumentNotFoundError):
        copy_documents(source, target, [IDS[0], "nobody"])
    assert [row.id for row in target.list()] == [IDS[2]]
    assert copy_documents(source, target, replace=True) == 3
    assert target.text(IDS[2]) == source.text(IDS[2])
    assert_same(source, target, IDS[:2])


def test_an_interrupted_copy_leaves_whole_documents_only(source: MemoryStore, target: MemoryStore) -> None:
    def interrupt(id: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_documents(source, target, on_document=interrupt)
    (row,) = target.list()
    assert_same(source, target, (row.id,))
    assert not list(target.folder.rglob(".tmp*"))


def test_a_damaged_document_ends_a_copy(changing: MemoryStore, target: MemoryStore) -> None:
    path = changing.folder / changing.list()[1].file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BeaconMemoryError, match=path.name):
        copy_documents(changing, target)
    assert [row.id for row in target.list()] == [changing.list()[0].id]
    assert verify(target) == []


def test_what_must_go_for_a_quota_is_told(source: MemoryStore, archive: Path, tmp_path: Path) -> None:
    room = sum(source.row(id).bytes for id in IDS)
    for number, bring in enumerate((lambda store, told: import_documents(store, archive, on_evicted=told),
                                    lambda store, told: copy_documents(source, store, on_evicted=told))):  # fmt: skip
        with MemoryStore(tmp_path / str(number)) as target:
            put(target, "old")
            target.configure(quota=room)
            gone: list[str] = []
            bring(target, lambda row, gone=gone: gone.append(row.id))
            assert gone == ["old"]
            assert [row.id for row in target.list()] == sorted(IDS)
