"""Random work on a store that notes what it does before and after, so that it is known what must be there if it dies.

A document is known by three words: the version of its K/V and text, the version of its label, and what its K/V are kept
in. From these all of its bytes follow.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from kv_samples import sample
from torch import Tensor

from beacon_memory.documents import Label
from beacon_memory.errors import DocumentNotFoundError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.storage.files.header import DocumentHeader
from beacon_memory.storage.files.stored_kv import StoredKV, with_precision
from beacon_memory.storage.store import MemoryStore

_, _KV = sample(dtype=torch.float32)

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


def document(id: str, version: str) -> tuple[DocumentHeader, MemoryKV, str]:
    """Header, K/V and text of a version, the same whoever asks."""
    text = f"word{version} is in the text of version {version}"
    header, _ = sample(id, text)
    generator = torch.Generator().manual_seed(int(version))
    keys, values = (torch.randn(_KV.keys.shape, generator=generator) for _ in range(2))
    header = replace(header, created_at="2026-01-01T00:00:00.000+00:00")
    return header, replace(_KV, keys=keys, values=values), text


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
            case "convert":
                store.convert(id, "int8")
            case "rename" if rest[0] in store:
                return False
            case "rename":
                store.rename(id, rest[0])
            case "delete":
                store.delete(id)
    except DocumentNotFoundError:
        return False
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
    content = file.text.split()[-1]
    header, kv, text = document(id, content)
    assert file.text == text
    assert replace(file.header, id=id) == header
    assert row.content_hash == header.content_hash
    assert _tensors(file.kv) == _tensors(with_precision(kv, row.precision, header.window_starts))
    version = str(row.metadata.get("version", ""))
    assert row.label == label(version)
    if still:
        assert store.text(id) == text
        assert id in store
        assert id in {hit.document for hit in store.search(f"word{content}")}
        assert id in {one.id for one in store.list(tags=row.tags, metadata=row.metadata)}
    return State(content, version, row.precision)


def work(store: MemoryStore, log: Path, own: Sequence[str], shared: Sequence[str], seed: int) -> None:
    """Change documents for ever, and read some of others."""
    rng = random.Random(seed)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        chosen = rng.choice([*own, *shared])
        names = ["put", "put", "update", "convert", "delete"] + ["replace", "rename"] * (chosen in own)
        operation = [rng.choice(names), chosen]
        operation += {"rename": [rng.choice(own)], "convert": [], "delete": []}.get(
            operation[0], [str(rng.getrandbits(50))]
        )
        _note(handle, operation)
        _note(handle, perform(store, operation))
        look(store, rng.choice(shared), still=False)
        if rng.random() < 0.05:
            store.close()


def history(log: Path, end: float) -> list[Entry]:
    """What a process did that was dead at the moment `end`."""
    noted = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    noted += [[end, None]] * (len(noted) % 2)
    pairs = zip(noted[::2], noted[1::2], strict=True)
    return [Entry(operation, begin, ended, done) for (begin, operation), (ended, done) in pairs]


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
