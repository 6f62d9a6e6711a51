from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from damage import FORMS, Damage, damages, file_of, parts, sealed, with_entry
from hypothesis import HealthCheck, given, settings
from kv_samples import TEXT, same, sample
from store_samples import put

from beacon_memory.documents import Label, Text
from beacon_memory.errors import (
    BeaconMemoryError,
    CorruptFileError,
    DocumentNotFoundError,
    InputError,
    QuotaError,
    StoreError,
)
from beacon_memory.storage.archive import copy_documents, export_documents, import_documents
from beacon_memory.storage.files.kv_file import stage_kv_file
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

CREATED = "2020-02-20T20:20:20.202+00:00"
IDS = ("../../a", "b\x00\u202e", "ü" * 500)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryStore]:
    """A store with three documents of different labels and precisions, which no test changes."""
    labels = (Label({"a": [1, {"b": None}]}), Label(tags=("x", "y"), pinned=True), Label(expires_at="2099-01-01T00Z"))
    with MemoryStore(tmp_path_factory.mktemp("stores") / "source") as store:
        for id, label, precision in zip(IDS, labels, ("auto", "int8", "int4"), strict=True):
            text = f"{TEXT} {id}"
            store.put(*sample(id, text), text, label, precision=precision, created_at=CREATED)
        yield store


@pytest.fixture(scope="module")
def exported(source: MemoryStore) -> bytes:
    path = source.root.with_name("archive.tar")
    assert export_documents(source, path) == 3
    return path.read_bytes()


@pytest.fixture
def archive(exported: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "archive.tar"
    path.write_bytes(exported)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "target") as store:
        yield store


@pytest.fixture
def changing(source: MemoryStore, tmp_path: Path) -> Iterator[MemoryStore]:
    """The same as `source`, for a test to change."""
    source.close()
    shutil.copytree(source.root, tmp_path / "changing")
    with MemoryStore(tmp_path / "changing") as store:
        yield store


def assert_same(ours: MemoryStore, theirs: MemoryStore, ids: tuple[str, ...] = IDS) -> None:
    """The documents are there bit for bit, with all that is known of them, and both stores are sound."""
    for id in ids:
        one, other = ours.get(id), theirs.get(id)
        assert same(one.kv, other.kv)
        assert replace(one.header, namespace=theirs.namespace) == other.header
        assert (one.row.root == other.row.root) == (ours.namespace == theirs.namespace)
        told = {"file": "", "updated_at": "", "used_at": 0, "root": ""}
        assert replace(one.row, **told) == replace(other.row, **told)
        assert ours.text(id) == theirs.text(id)
    assert verify(ours) == verify(theirs) == []


def assert_empty(store: MemoryStore) -> None:
    """Nothing was stored, and nothing left behind."""
    assert store.list() == verify(store) == []
    assert not [path for path in store.folder.glob("kv/**/*") if path.is_file()]


@contextmanager
def nothing_imported(store: MemoryStore, error: type[Exception], match: str) -> Iterator[None]:
    with pytest.raises(error, match=match):
        yield
    assert_empty(store)


# Export and import


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


# Damaged archives


@given(damage=damages)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_archive_gives_all_or_nothing(
    source: MemoryStore, archive: Path, tmp_path: Path, damage: Damage
) -> None:
    shutil.rmtree(tmp_path / "target", ignore_errors=True)
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(damage.done_to(archive.read_bytes()))
    with MemoryStore(tmp_path / "target") as target:
        try:
            import_documents(target, damaged)
        except CorruptFileError:
            assert_empty(target)
        else:
            assert_same(source, target)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["nothing", "folder", "fifo", "text", "empty", "zeros", "zipped", "K/V file"])
def test_what_is_no_archive_is_refused(archive: Path, target: MemoryStore, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "text":
            path.write_text("once upon a time " * 100)
        case "empty":
            path.touch()
        case "zeros":
            path.write_bytes(bytes(20_000))
        case "zipped":
            with tarfile.open(path, "w:gz") as tar:
                tar.add(archive)
        case "K/V file":
            path.write_bytes(file_of("bfloat16")[0])
    with nothing_imported(target, StoreError, r"a\.tar"):
        import_documents(target, path)


Members = list[tuple[tarfile.TarInfo, bytes]]


def members_of(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]  # all files


def write(path: Path, members: Members) -> None:
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def with_manifest(members: Members) -> Members:
    """The members, with a manifest that lists what they are, as somebody would write it to do harm."""
    files = [(info, data) for info, data in members if info.name.startswith("documents/")]
    listed = [[info.name, len(data), hashlib.sha256(data).hexdigest()] for info, data in files]
    manifest = {"files": listed, "sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest()}
    return [*members[:1], *files, member("manifest.json", json.dumps(manifest).encode())]


def document(number: int, file: bytes, label: dict[str, Any]) -> Members:
    name = f"documents/{number:09}"
    return [member(f"{name}.safetensors", file), member(f"{name}.json", json.dumps(sealed(label)).encode())]


def test_an_archive_that_is_put_together_again_is_read(archive: Path, source: MemoryStore, target: MemoryStore) -> None:
    """What the tests below change is what makes an archive bad, and nothing else."""
    members = members_of(archive)
    write(archive, with_manifest(members))
    assert import_documents(target, archive) == 3
    assert_same(source, target)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[::-1],
        lambda m: [m[0], *m[3:5], *m[1:3], *m[5:]],
        lambda m: [m[0], m[2], m[1], *m[3:]],
        lambda m: m[1:],
        lambda m: m[:-1],
        lambda m: [m[0], m[-1], *m[1:-1]],
        lambda m: [*m[:-1], m[-1], m[-1]],
        lambda m: [m[0], m[0], *m[1:]],
        lambda m: [*m[:3], *m[1:3], *m[3:]],
        lambda m: [m[0], *m[3:]],
        lambda m: [*m[:2], *m[3:]],
        lambda m: [m[0], m[-1]],
        lambda m: [*m, member("more")],
    ],
)
@pytest.mark.parametrize("anew", [False, True], ids=["its own manifest", "a new manifest"])
def test_members_that_are_missing_doubled_or_in_another_order_are_refused(
    archive: Path, target: MemoryStore, change: Callable[[Members], Members], anew: bool
) -> None:
    members = change(members_of(archive))
    if anew:
        members = with_manifest(members)
        names = [info.name for info, _ in members]
        if names == [info.name for info, _ in members_of(archive)]:
            return
        whole = len(names) == 2 and names[0] == "beacon-memory.json"
        if whole:  # an archive of nothing
            write(archive, members)
            assert import_documents(target, archive) == 0
            return
    write(archive, members)
    with nothing_imported(target, CorruptFileError, "cannot be imported"):
        import_documents(target, archive)


EVIL = {
    "path above": member("../evil", b"x"),
    "path above below": member("documents/../../evil", b"x"),
    "absolute path": member("/tmp/evil", b"x"),
    "drive": member("C:\\evil", b"x"),
    "long name": member("documents/" + "9" * 300, b"x"),
    "other digits": member("documents/" + "\N{ARABIC-INDIC DIGIT ZERO}" * 9 + ".json", b"x"),
    "no name": member("", b"x"),
    "control characters": member("documents/\x1b[2J\u202e", b"x"),
    "link": member("documents/000000000.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member("documents/000000000.json", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "device": member("documents/000000000.json", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "block device": member("documents/000000000.json", type=tarfile.BLKTYPE),
    "fifo": member("documents/000000000.json", type=tarfile.FIFOTYPE),
    "folder": member("documents/000000000.json", type=tarfile.DIRTYPE),
    "contiguous file": member("documents/000000000.json", type=tarfile.CONTTYPE),
    "sparse file": member("documents/000000000.json", type=tarfile.GNUTYPE_SPARSE),
    "unknown type": member("documents/000000000.json", type=b"?"),
    "headers of its own": member("documents/000000000.json", b"x", pax_headers={"comment": "y" * 5000}),
    "sparse by header": member("documents/000000000.json", b"x", pax_headers={"GNU.sparse.size": "1000000000000"}),
}


@pytest.mark.parametrize("kind", EVIL)
def test_members_that_no_export_writes_are_refused(
    archive: Path, target: MemoryStore, tmp_path: Path, kind: str
) -> None:
    members = members_of(archive)
    for at in (0, 1, 4, len(members)):
        write(archive, [*members[:at], EVIL[kind], *members[at:]])
        with nothing_imported(target, CorruptFileError, "cannot be imported"):
            import_documents(target, archive)
    assert {path.name for path in tmp_path.iterdir()} - {"target"} == {"archive.tar"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", "0xgLKXS")
@pytest.mark.parametrize("size", [1 << 20, 1 << 40, 1 << 62, 1 << 66, 1 << 87, -512, -1024, -(1 << 80)])
def test_a_header_that_claims_any_size_is_refused_at_once(
    archive: Path, target: MemoryStore, kind: str, size: int
) -> None:
    """A size of less than nothing once sent readers back to the same header for ever."""
    info = member("documents/000000000.safetensors", type=kind.encode())[0]
    info.size = size
    block = info.tobuf(tarfile.GNU_FORMAT)
    whole = archive.read_bytes()
    for end in (0, 1024):
        archive.write_bytes(whole[:end] + block + whole[end:])
        with nothing_imported(target, CorruptFileError, "cannot be imported"):
            import_documents(target, archive)


def test_a_manifest_that_is_longer_than_it_can_be_is_not_read(archive: Path, target: MemoryStore) -> None:
    members = members_of(archive)
    for at in (0, len(members) - 1):
        long = [*members[:at], member(members[at][0].name, b"[" * (2 << 20)), *members[at + 1 :]]
        write(archive, long)
        with nothing_imported(target, CorruptFileError, "too many"):
            import_documents(target, archive)


@pytest.mark.parametrize("value", [b"", b"{", b"[" * 3000, b"null", b"\xff", b'{"format": 2}', b'{"format": true}'])
def test_a_head_or_manifest_of_nonsense_is_refused(archive: Path, target: MemoryStore, value: bytes) -> None:
    members = members_of(archive)
    for at in (0, len(members) - 1):
        write(archive, [*members[:at], member(members[at][0].name, value), *members[at + 1 :]])
        if value == b'{"format": true}' and at == 0:
            continue  # JSON's true is as good as 1
        with nothing_imported(target, CorruptFileError, "cannot be imported"):
            import_documents(target, archive)


LABEL = {"format": 1, "id": "doc", "namespace": "", "created_at": CREATED, "updated_at": CREATED, **asdict(Label())}


def bad_documents() -> dict[str, Members]:
    """Documents that are all right for a manifest, and for nothing else."""
    whole, _, _ = file_of("bfloat16")
    _, entry, _ = parts(whole)
    far = with_entry(whole, {**entry, "header": {**entry["header"], "windows": _ending_at(entry, 10**6)}})
    return {
        "damaged K/V": document(1, whole[:-1] + bytes([whole[-1] ^ 1]), LABEL),
        "older format": document(1, with_entry(whole, {**entry, "format": 4}), LABEL),
        "newer format": document(1, with_entry(whole, {**entry, "format": 99}), LABEL),
        "label of another": document(1, whole, {**LABEL, "id": "another"}),
        "label of another namespace": document(1, whole, {**LABEL, "namespace": "another"}),
        "label of nonsense": document(1, whole, {**LABEL, "tags": 5}),
        "label of too many tags": document(1, whole, {**LABEL, "tags": [f"{n}" for n in range(10_001)]}),
        "label of too many metadata": document(1, whole, {**LABEL, "metadata": {f"{n}": n for n in range(10_001)}}),
        "label that is nested too deeply": document(
            1, whole, {**LABEL, "metadata": {"a": json.loads("[" * 700 + "]" * 700)}}
        ),
        "K/V that are no numbers": document(1, _not_a_number(), LABEL),
        "label without a field": document(1, whole, {"format": 1, "id": "doc"}),
        "window behind the text": document(1, far, LABEL),
        "the first one again": [],
    }


def _not_a_number() -> bytes:
    header, kv = sample()
    kv.keys[0, 0] = float("nan")
    with tempfile.TemporaryDirectory() as folder:
        return stage_kv_file(Path(folder), header, kv, Text(TEXT)).path.read_bytes()


def _ending_at(entry: dict[str, Any], stop: int) -> list[dict[str, Any]]:
    windows = entry["header"]["windows"]
    return [*windows[:-1], {**windows[-1], "stop": stop}]


@pytest.mark.parametrize("kind", bad_documents())
@pytest.mark.parametrize("replacing", [False, True])
def test_one_bad_document_keeps_all_others_out(archive: Path, target: MemoryStore, kind: str, replacing: bool) -> None:
    members = members_of(archive)
    bad = bad_documents()[kind] or [member(info.name.replace("000.", "001."), data) for info, data in members[1:3]]
    write(archive, with_manifest([*members[:3], *bad, *members[5:]]))
    with nothing_imported(target, CorruptFileError, "cannot be imported"):
        import_documents(target, archive, replace=replacing)


# Copies


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
