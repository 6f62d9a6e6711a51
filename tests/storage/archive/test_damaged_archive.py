"""Archives that are damaged, or written to do harm: nothing of them is imported, and nothing is left behind."""

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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from archive_samples import CREATED, assert_empty, assert_same
from damage import Damage, damages, file_of, parts, sealed, with_entry
from hypothesis import HealthCheck, given, settings
from kv_samples import TEXT, sample

from beacon_memory.documents import Label, Text
from beacon_memory.errors import CorruptFileError, StoreError
from beacon_memory.storage.archive import import_documents
from beacon_memory.storage.files.kv_file import stage_kv_file
from beacon_memory.storage.store import MemoryStore


@contextmanager
def nothing_imported(store: MemoryStore, error: type[Exception], match: str) -> Iterator[None]:
    with pytest.raises(error, match=match):
        yield
    assert_empty(store)


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
