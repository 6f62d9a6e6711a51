"""What a store holds, and what can befall it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from catalog_samples import LATER, LONG_AGO
from kv_samples import same, sample, write_kv_file

from beacon_memory.documents import Label
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.storage.catalog.rows import DocumentRow
from beacon_memory.storage.files.label_file import StoredLabel, label_name, stage_label
from beacon_memory.storage.files.marks import mark_of
from beacon_memory.storage.files.names import file_stem
from beacon_memory.storage.repair import Problem
from beacon_memory.storage.store import MemoryStore

LABEL = Label({"a": [1, None], "b": "x"}, ["x", "y"], True, LATER)
LONG = " ".join(f"Zebra {n} crosses the street." for n in range(200))


def kinds(problems: list[Problem]) -> list[tuple[str, str | None]]:
    return [(problem.kind, problem.document) for problem in problems]


@dataclass
class Content:
    """All that a store holds of a document."""

    row: DocumentRow
    kv: MemoryKV
    text: str

    @classmethod
    def of(cls, store: MemoryStore, id: str) -> Content:
        found = store.get(id)
        return cls(found.row, found.kv, store.text(id))

    def stands(self, store: MemoryStore) -> bool:
        """Whether it is still there, every bit; when it was last changed and used may be told anew."""
        now = Content.of(store, self.row.id)
        times = {"updated_at": self.row.updated_at, "used_at": self.row.used_at}
        return replace(now.row, **times) == self.row and now.text == self.text and same(now.kv, self.kv)


def everything(store: MemoryStore) -> list[Content]:
    return [Content.of(store, row.id) for row in store.list()]


def file(store: MemoryStore, id: str = "doc") -> Path:
    return store.folder / store.row(id).file


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def flip_keys(path: Path) -> None:
    """Flip a byte of the keys, which come first in a K/V file; the text comes last."""
    flip(path, 8 + int.from_bytes(path.read_bytes()[:8], "little") + 5)


def scribble(path: Path) -> None:
    """Leave nothing of a database but its header."""
    data = path.read_bytes()
    path.write_bytes(data[:100] + b"\x5a" * (len(data) - 100))


def leave_catalog(store: MemoryStore) -> Path:
    """The catalog as one whole file."""
    store.close()
    return store.folder / "catalog.sqlite3"


def replaced_file(store: MemoryStore) -> None:
    """Put back the files that a replacement removed, as if it had been killed before it could."""
    old = [file(store), store.folder / label_name(store.row("doc").file)]
    copies = [path.read_bytes() for path in old]
    header, kv = store.get("doc").header, store.get("doc").kv
    store.put(header, kv, store.text("doc"))
    with store.parts.catalog().transaction(), store.parts.catalog().connections.use() as db:
        db.execute("INSERT INTO unsettled VALUES (?)", [old[0].name.partition("-")[2][:12]])
    for path, data in zip(old, copies, strict=True):
        path.write_bytes(data)


def unfinished_put(store: MemoryStore, id: str) -> None:
    """A file that was published for a row which never came."""
    name = f"{file_stem(id)}-{store.parts.catalog().file_names.take_number():012x}.safetensors"
    (store.folder / name).parent.mkdir(exist_ok=True)
    write_kv_file(store.folder / name, *sample(id, "new text"), "new text")
    mark_of(store.files, name).touch()


def stale_label(store: MemoryStore, *, id: str = "doc", created_at: str = LONG_AGO) -> None:
    stage_label(store.folder / "kv", StoredLabel(id, "", created_at, Label({"old": 1}), created_at)).replace(
        store.folder / label_name(store.row("doc").file)
    )
