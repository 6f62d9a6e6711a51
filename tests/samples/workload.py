"""Random work on a store that notes what it does before and after, so that it is known what must be there if it dies.

A document is known by three words: the version of its K/V and text, the version of its label, and what its K/V are kept
in. From these all of its bytes follow. One that has grown has a version such as `5+7+1`: of what was put, and of each
piece that was appended.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from kv_samples import sample
from torch import Tensor

from beacon_memory.documents import Label, content_hash
from beacon_memory.errors import DocumentNotFoundError, StoreError
from beacon_memory.kv.memory_kv import BeaconKV, MemoryKV
from beacon_memory.storage.archive import export_documents, import_documents
from beacon_memory.storage.erasing import erase
from beacon_memory.storage.files.header import DocumentHeader, WindowSpan
from beacon_memory.storage.files.segments import joined_headers, joined_kv
from beacon_memory.storage.files.stored_kv import StoredKV, with_precision
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

_, _KV = sample(dtype=torch.float32)
_CREATED = "2026-01-01T00:00:00.000+00:00"
MOST_PIECES = 5  # so that a text is one passage

_BUSY = "busy"
_WAITED = (  # what errors say if others were at work for too long
    "has been writing for",
    "has been reading for",
    "is being written to",
    "is being repaired",
    "times while it was being",
)

Operation = Sequence[str]  # a name, an id, and perhaps a version or another id


@dataclass(frozen=True)
class State:
    """What a document is: the version of K/V and text, that of the label ("" is the empty one), and the precision."""

    content: str
    label: str
    precision: str = "float32"


@dataclass(frozen=True)
class Entry:
    """An operation between two moments: it was done, or refused since something was not there; None: nobody knows."""

    operation: Operation
    begin: float
    end: float
    done: bool | None


def document(id: str, version: str) -> tuple[DocumentHeader, StoredKV, str]:
    """Header, K/V and text of a version, the same whoever asks."""
    first, *more = version.split("+")
    text = f"word{first} is in the text of version {first}"
    header, _ = sample(id, text)
    header = replace(header, created_at=_CREATED)
    kv: StoredKV = replace(_KV, keys=_random(_KV.keys.shape, first), values=_random(_KV.keys.shape, f"{first}0"))
    for one in more:
        added, new, text = piece(header, text, one)
        header, kv = joined_headers([header, added], content_hash(text)), joined_kv([kv, new])
    return header, kv, text


def piece(header: DocumentHeader, text: str, version: str) -> tuple[DocumentHeader, MemoryKV, str]:
    """Header and K/V of a piece that is appended to the document of a header and a text, and the text with it."""
    added = f" word{version} was appended as {version}"
    window = WindowSpan(1, 0, len(text), len(text) + len(added), 1, due=4)
    header = replace(
        header, content_hash=content_hash(added), tokens=1, windows=(window,), tail_ids=(int(version) % 97,), span=1
    )
    kv = MemoryKV.of(BeaconKV(*(_random((2, 3, 1, 4), f"{version}{which}") for which in range(2))))
    return header, kv, text + added


def version_in(text: str) -> str:
    """The version of a document, as its text tells it."""
    return "+".join(re.findall(r"(?:of version|appended as) (\d+)", text))


def words(version: str) -> str:
    """A word of the text of a version that no other one has."""
    return f"word{version.rpartition('+')[2]}"


def _random(shape: Sequence[int], seed: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(seed) % 2**63))


def label(version: str) -> Label:
    """The label of a version."""
    return Label({"version": version}, (f"tag{version}",)) if version else Label()


def perform(store: MemoryStore, operation: Operation) -> bool:
    """Do it; False if it cannot be done with the documents that there are."""
    name, id, *rest = operation
    try:
        match name:
            case "put":
                store.put(*document(id, rest[0]), label(rest[0]))
            case "replace":
                store.put(*document(id, rest[0]))
            case "update":
                store.update(id, metadata=label(rest[0]).metadata, tags=label(rest[0]).tags)
            case "append":
                return append(store, id, rest[0])
            case "convert":
                store.convert(id, "int8")
            case "rename":
                return rest[0] not in store and bool(store.rename(id, rest[0]))
            case "delete":
                store.delete(id)
    except DocumentNotFoundError:
        return False
    return True


def append(store: MemoryStore, id: str, version: str) -> bool:
    """Append a piece to a document; False if it has as many as it can."""
    row, file = store.read(id)
    if version_in(file.text).count("+") == MOST_PIECES:
        return False
    store.append(row, *piece(file.header, file.text, version))
    return True


def after(states: Mapping[str, State], operation: Operation) -> dict[str, State]:
    """What an operation makes of documents that nobody else changes."""
    name, id, *rest = operation
    now, old = dict(states), states.get(id)
    match name:
        case "put":
            now[id] = State(rest[0], rest[0])
        case "replace":
            now[id] = State(rest[0], old.label if old else "")
        case "update" if old:
            now[id] = replace(old, label=rest[0])
        case "append" if old and old.content.count("+") < MOST_PIECES:
            now[id] = replace(old, content=f"{old.content}+{rest[0]}")
        case "convert" if old:
            now[id] = replace(old, precision="int8")
        case "rename" if old and rest[0] not in states:
            now[rest[0]] = now.pop(id)
        case "delete" if old:
            del now[id]
    return now


def look(store: MemoryStore, id: str, *, still: bool = True) -> State | None:
    """What a document is, None if it is not there; fails unless everything about it is of one version.

    still: nobody changes it meanwhile, so what takes more than one transaction to read is compared, too.
    """
    try:
        row, file = store.read(id)
    except DocumentNotFoundError:
        return None
    content = version_in(file.text)
    header, kv, text = document(id, content)
    assert file.text == text
    assert replace(file.header, id=id) == replace(header, namespace=store.namespace)
    assert row.content_hash == header.content_hash
    assert _tensors(file.kv) == _tensors(with_precision(kv, row.precision, header.window_starts))
    version = str(row.metadata.get("version", ""))
    assert row.label == label(version)
    if still:
        assert store.text(id) == text
        assert id in store
        assert id in {hit.document for hit in store.search(words(content))}
        assert id in {one.id for one in store.list(tags=row.tags, metadata=row.metadata)}
    return State(content, version, row.precision)


def work(
    store: MemoryStore, log: Path, own: Sequence[str], shared: Sequence[str], seed: int, until: float = math.inf
) -> None:
    """Change documents until that time, and read some of others."""
    rng = random.Random(seed)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while time.monotonic() < until:
        chosen = rng.choice([*own, *shared])
        names = ["put", "put", "update", "convert", "delete"]
        names += ["replace", "rename", "append", "append"] * (chosen in own)
        operation = [rng.choice(names), chosen]
        operation += {"rename": [rng.choice(own)], "convert": [], "delete": []}.get(
            operation[0], [str(rng.getrandbits(50))]
        )
        _note(handle, operation)
        try:
            _note(handle, perform(store, operation))
        except StoreError as error:
            require_busy(error)
            _note(handle, _BUSY)
        look(store, rng.choice(shared), still=False)
        if rng.random() < 0.05:
            store.close()


def care(store: MemoryStore, log: Path, expected: Collection[str], seed: int, until: float = math.inf) -> None:
    """Look after a store until that time, and read all of it; fails if it finds problems of other kinds than expected.

    Notes what was done to the end.
    """
    rng = random.Random(seed)
    aside = Path(tempfile.mkdtemp(dir=log.parent))
    with log.open("a", buffering=1) as done:
        while time.monotonic() < until:
            act = rng.choice([_repair, _verify, _erase, _export, _read])
            try:
                assert act(store, aside) <= {*expected}
            except StoreError as error:
                require_busy(error)
            else:
                done.write(f"{act.__name__}\n")
            store.close()


def _repair(store: MemoryStore, _: Path) -> set[str]:
    return {problem.kind for problem in repair(store)}


def _verify(store: MemoryStore, _: Path) -> set[str]:
    return {problem.kind for problem in verify(store)}


def _erase(store: MemoryStore, _: Path) -> set[str]:
    erase(store)
    return set()


def _export(store: MemoryStore, aside: Path) -> set[str]:
    """Export all, and look at it where it is imported."""
    archive = aside / secrets.token_hex(8)
    export_documents(store, archive)
    with MemoryStore(aside / f"{archive.name} imported") as imported:
        import_documents(imported, archive)
        for row in imported.list():
            assert look(imported, row.id)
    archive.unlink()
    shutil.rmtree(imported.folder, ignore_errors=True)
    return set()


def _read(store: MemoryStore, _: Path) -> set[str]:
    rows = store.list()
    assert not rows or store.namespace in store.namespaces()
    for row in rows:
        look(store, row.id, still=False)
    for hit in store.search("version"):
        assert hit.text == document(hit.document, version_in(hit.text))[2]
    return set()


def require_busy(error: StoreError) -> None:
    """Raise an error again unless others have written, or tidied up, for too long, and nothing was done."""
    if not any(words in str(error) for words in _WAITED):
        raise error


def history(log: Path, end: float) -> list[Entry]:
    """What a process did that was dead at the moment `end`."""
    noted = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    noted += [[end, None]] * (len(noted) % 2)
    pairs = zip(noted[::2], noted[1::2], strict=True)
    return [Entry(operation, begin, ended, done) for (begin, operation), (ended, done) in pairs if done != _BUSY]


def outcomes(entries: Iterable[Entry], id: str) -> dict[str, set[str | None]]:
    """What may have become of a document that several processes changed: possible values of each field of its State.

    An operation counts unless another one began after its end and was surely done. None: it may be gone.
    """
    values: dict[str, list[tuple[Entry, str | None]]] = {"content": [], "label": [], "precision": []}
    for entry in [Entry(("delete", id), 0, 0, True), *entries]:
        name, changed, *rest = entry.operation
        if changed != id or entry.done is False:
            continue
        version = rest[0] if rest else None
        written = {
            "put": {"content": version, "label": version, "precision": "float32"},
            "update": {"label": version},
            "convert": {"precision": "int8"},
            "delete": {"content": None, "label": None, "precision": None},
        }[name]
        for field, value in written.items():
            values[field].append((entry, value))
    return {
        field: {value for entry, value in written if not any(_later(other, entry) for other, _ in written)}
        for field, written in values.items()
    }


def _later(ours: Entry, theirs: Entry) -> bool:
    return ours.done is True and ours.begin >= theirs.end and ours is not theirs


def _note(handle: int, what: object) -> None:
    os.write(handle, json.dumps([time.monotonic(), what]).encode() + b"\n")


def _tensors(kv: StoredKV) -> dict[str, tuple[str, bytes]]:
    tensors = {field.name: getattr(kv, field.name) for field in fields(kv)}
    return {
        name: (f"{one.dtype} {list(one.shape)}", one.contiguous().view(torch.uint8).numpy().tobytes())
        for name, one in tensors.items()
        if isinstance(one, Tensor)
    }
