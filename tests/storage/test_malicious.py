"""Files, labels and catalogs that somebody wrote to do harm, hashes and all: refused at once, and at no cost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import crafted, file_of, forged, parts, sealed, with_entry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_samples import TEXT, finish, same, sample, start
from store_samples import put

from beacon_memory.errors import BeaconMemoryError, CorruptFileError, InputError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.storage.files.kv_file import read_header, read_kv_file
from beacon_memory.storage.files.label_file import label_name, read_label
from beacon_memory.storage.files.names import file_stem
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

often = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Ids that a path, a terminal or a database would take amiss.
IDS = (
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "kv/../../x",
    "C:\\Windows\\win.ini",
    "a\x00b",
    "a\nb\x1b[2J",
    "\u202egnp.exe",
    "'; DROP TABLE documents; --",
    "%s%n{0}",
    "x" * 10_000,
    "\U0001f600" * 100,
)

whole_numbers = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 2**70, 10**400, -(2**63)])
)
plain = st.one_of(
    st.none(), st.booleans(), whole_numbers, st.floats(), st.text(max_size=5), st.sampled_from(["\ud800", *IDS])
)
anything = st.recursive(
    plain,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)


@cache
def good(form: str = "bfloat16") -> bytes:
    return file_of(form)[0]


@cache
def kept_by(form: str) -> MemoryKV:
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "a").write_bytes(good(form))
        return read_kv_file(path).memory(dtype=torch.float32)


def read(path: Path) -> MemoryKV | None:
    """All that is done with a file, or None if it is refused, by one of our errors that does not run on for pages."""
    try:
        read_header(path)
        file = read_kv_file(path)
        assert len(file.text) < 1 << 20
        return file.memory(dtype=torch.float32)
    except CorruptFileError as error:
        message = str(error)
    assert len(message) < 1500
    assert message.replace("\n", "").isprintable()
    return None


def places(value: Any, where: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where in nested JSON something could be changed."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [where, *(place for key, one in inner for place in places(one, (*where, key)))]


def changed(value: Any, where: tuple[str | int, ...], new: Any) -> Any:
    """Nested JSON with something else at a place."""
    if not where:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[where[0]] = changed(copy[where[0]], where[1:], new)
    return copy


@pytest.mark.parametrize("form", ["bfloat16", "int4"])
@given(data=st.data())
@often
def test_a_sealed_entry_with_anything_anywhere_is_refused_or_harmless(
    tmp_path: Path, form: str, data: st.DataObject
) -> None:
    _, entry, _ = parts(good(form))
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(places(entry)[1:]))
        entry = changed(entry, where, data.draw(anything))
        if not isinstance(entry.get("header"), dict):
            break
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_entry(good(form), entry))
    kv = read(path)
    assert kv is None or same(kv, kept_by(form))


@given(entry=anything)
@often
def test_any_json_for_an_entry_is_refused(tmp_path: Path, entry: object) -> None:
    head, _, data = parts(good())
    path = tmp_path / "a.safetensors"
    path.write_bytes(crafted({**head, "__metadata__": {"beacon_memory": json.dumps(entry)}}, data))
    assert read(path) is None
    if isinstance(entry, dict):
        path.write_bytes(with_entry(good(), entry))
        assert read(path) is None


NAMES = ("keys", "values", "places", "counts", "hashes", "text")
DTYPES = (
    "BOOL",
    "U8",
    "I8",
    "I16",
    "I32",
    "I64",
    "F16",
    "BF16",
    "F32",
    "F64",
    "F8_E4M3",
    "F8_E8M0",
    "C64",
    "F4",
    "U64",
)


@given(
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.one_of(st.integers(0, 40), st.sampled_from([2**31, 2**62, 2**63, 2**64 - 1])), max_size=5),
    begin=st.integers(0, 800),
    size=st.integers(-1, 800),
)
@often
def test_tensors_of_any_place_and_shape_are_refused(
    tmp_path: Path, name: str, dtype: str, shape: list[int], begin: int, size: int
) -> None:
    head, entry, data = parts(good())
    path = tmp_path / "a.safetensors"
    for offsets in ([begin, max(0, begin + size)], head[name]["data_offsets"]):
        said = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        forged = {**entry, "tensors": {**entry["tensors"], name: {"dtype": "torch.int32", "shape": shape}}}
        for one in (entry, forged):
            whole = with_entry(crafted({**head, name: said}, data), one)
            path.write_bytes(whole)
            assert read(path) is None or said == head[name]


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("bfloat16", {"keys": torch.zeros(())}),
        ("bfloat16", {"keys": torch.zeros(36, 4, dtype=torch.int8), "values": torch.zeros(36, 4, dtype=torch.int8)}),
        ("bfloat16", {"counts": torch.zeros(2, 14, 2, 3, dtype=torch.uint8)}),
        ("bfloat16", {"counts": torch.full((2, 14, 2, 3), 255, dtype=torch.uint8)}),
        ("bfloat16", {"counts": torch.full((2, 1, 2, 3), 3, dtype=torch.int64)}),
        ("bfloat16", {"counts": torch.zeros(0, 1, 2, 3, dtype=torch.uint8)}),
        ("bfloat16", {"counts": torch.zeros(2, 0, 2, 3, dtype=torch.uint8)}),
        ("bfloat16", {"counts": torch.zeros(2, 1, 0, 3, dtype=torch.uint8)}),
        ("bfloat16", {"counts": torch.zeros(2, 300, 2, 3, dtype=torch.uint8)}),
        ("bfloat16", {"counts": torch.tensor(36, dtype=torch.uint8)}),
        ("bfloat16", {"hashes": torch.zeros(2, 14, 16, dtype=torch.uint8)}),
        ("bfloat16", {"hashes": torch.tensor(0, dtype=torch.uint8)}),
        ("bfloat16", {"places": torch.full((36,), 13, dtype=torch.uint8)}),
        ("bfloat16", {"places": torch.full((36,), 255, dtype=torch.uint8)}),
        ("bfloat16", {"places": torch.full((36,), -1, dtype=torch.int16)}),
        ("bfloat16", {"places": torch.full((36,), math.nan)}),
        ("bfloat16", {"text": torch.zeros(66, dtype=torch.bfloat16)}),
        ("bfloat16", {"text": torch.zeros((), dtype=torch.uint8)}),
        ("bfloat16", {"text": torch.full((66,), 255, dtype=torch.uint8)}),
        ("int8", {"keys": torch.zeros((), dtype=torch.uint8)}),
        ("int8", {"key_scales": torch.zeros((), dtype=torch.float16)}),
        ("int8", {"key_scales": torch.zeros(6, 0, dtype=torch.float16)}),
        ("int8", {"key_scales": torch.zeros(6, 3, dtype=torch.float16)}),
        ("int8", {"key_scales": torch.zeros(6, 4, dtype=torch.float32)}),
        ("int8", {"key_scales": torch.zeros(13, 4, dtype=torch.float16)}),
        ("int8", {name: torch.zeros(5, 4, dtype=torch.float16) for name in ("key_scales", "key_zeros")}),
        ("int8", {"key_zeros": torch.zeros(5, 4, dtype=torch.float16)}),
        ("int8", {"value_scales": torch.zeros(35, dtype=torch.float16)}),
        ("int8", {"value_zeros": torch.zeros(36, 1, dtype=torch.float16)}),
        ("int8", {"keys": torch.zeros(36, 5, dtype=torch.uint8)}),
        ("int4", {"key_scales": torch.zeros(6, 2, dtype=torch.float16)}),
        ("int4", {"keys": torch.zeros(36, 2, dtype=torch.int8)}),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(
    tmp_path: Path, form: str, change: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(forged(good(form)))
    assert read(path) is not None
    path.write_bytes(forged(good(form), change))
    assert read(path) is None


@pytest.mark.parametrize(
    "header",
    [
        {
            "tokens": 2**70,
            "windows": [{"tokens": 2**70, "ratio": 2**70, "start": 0, "stop": 1, "span": 13, "cuts": []}],
        },
        {"span": 2**70},
        {"span": -1},
        {"tail_ids": [2**64] * 5},
        {"tail_ids": "78901"},
        {"tail_ids": {"7": 1}},
        {"created_at": "\ud800"},
        {"created_at": "\u202e2031"},
        {"content_hash": "\ud800"},
        {"id": "\udfff"},
        {"id": ""},
        {"id": ["doc"]},
        {"method": {"score": [1]}},
        {"method": {"score": None}},
        {"method": "repeat"},
        {"compression": "__class__"},
        {"compression": ["select"]},
        {"windows": {}},
        {"windows": None},
        {"windows": "ab"},
        {"windows": [[1, 2, 3, 4, 5]]},
        {"windows": [{"tokens": 13, "ratio": 0, "start": 9, "stop": 1, "span": 13, "cuts": []}]},
        {"windows": [{"tokens": 13, "ratio": -2, "start": 0, "stop": 1, "span": 13, "cuts": []}]},
        {"windows": [{"tokens": 13, "ratio": 2, "start": 0, "stop": 9, "span": 13}]},
        {"windows": [{"tokens": 13, "ratio": 2, "start": 0, "stop": 9, "span": 13, "cuts": [3]}]},
        {"windows": [{"tokens": 13, "ratio": 2, "start": 0, "stop": 9, "span": 13, "cuts": None}]},
        {"namespace": None},
        {"namespace": 3},
        {"namespace": "\ud800"},
        {"fingerprint": {}},
        {"fingerprint": {"base": 1, "adapter": "", "tokenizer": "", "config": "", "rope": ""}},
        {"an unknown field \x1b[2J": 1},
    ],
)
def test_a_header_of_nonsense_is_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(forged(good(), **header))
    assert read(path) is None


def test_a_text_that_is_no_utf8_is_refused_though_its_hash_is_right(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    data = b"\xff\xfe" * 33
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    path.write_bytes(forged(good(), {"text": text}, content_hash=hashlib.sha256(data).hexdigest()))
    with pytest.raises(CorruptFileError, match="is not UTF-8"):
        _ = read_kv_file(path).text


def test_an_entry_is_refused_at_any_depth(tmp_path: Path) -> None:
    """Somewhere below the limit of recursion reading still works and hashing does not."""
    head, entry, data = parts(good())
    path = tmp_path / "a.safetensors"
    text = json.dumps({**entry, "more": "?"})
    for depth in (*range(500, 1010), 100_000):
        nested = text.replace('"?"', "[" * depth + "]" * depth)
        path.write_bytes(crafted({**head, "__metadata__": {"beacon_memory": nested}}, data))
        assert read(path) is None


# Each is a file that costs a careless reader gigabytes, or the process.
HUGE = """
import json, struct
from damage import crafted, file_of, forged, parts, with_entry
from beacon_memory.errors import CorruptFileError
from beacon_memory.storage.files.kv_file import read_header, read_kv_file

whole = file_of("bfloat16")[0]
head, entry, data = parts(whole)
one = {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}

def with_text(text):
    return crafted({**head, "__metadata__": {"beacon_memory": text}}, data)

def with_header(**changes):
    return with_entry(whole, {**entry, "header": {**entry["header"], **changes}})

def empty(keys, counts):
    none = {"keys": torch.zeros(keys), "values": torch.zeros(keys), "places": torch.zeros(0, dtype=torch.uint8)}
    none |= {"counts": torch.zeros(counts, dtype=torch.uint8)}
    none |= {"hashes": torch.zeros([*counts[:2], 16], dtype=torch.uint8)}
    return forged(whole, none, windows=[], tail_ids=[], tokens=0, span=0)

def spanning(span):
    window = {"tokens": 13, "ratio": 2, "start": 0, "stop": 9, "span": span, "cuts": []}
    return with_header(windows=[window], tail_ids=[], span=span)

files = {
    "header of 2**60 bytes": lambda: struct.pack("<Q", 1 << 60) + whole[8:],
    "header of 2**64 - 1 bytes": lambda: b"\\xff" * 8 + whole[8:],
    "header of 100 MB": lambda: struct.pack("<Q", 100 << 20) + b" " * (100 << 20),
    "header of 31 MB": lambda: struct.pack("<Q", 31 << 20) + b" " * (31 << 20),
    "many tensors": lambda: crafted({str(n): one for n in range(100_000)}, b"0"),
    "long entry": lambda: with_text("[" + "0," * (14 << 20) + "0]"),
    "many parts of an entry": lambda: with_entry(whole, {**entry, "header": [[]] * (1 << 20)}),
    "long id": lambda: with_header(id=5, fingerprint="x" * (7 << 20)),
    "many windows": lambda: with_header(windows=[{}] * (1 << 20)),
    "many tail ids": lambda: with_header(tail_ids=[0.5] * (1 << 20)),
    "2**56 sections": lambda: spanning(1 << 62),
    "no entries of 2**60 heads": lambda: empty([0, 4], [0, 1, 1 << 30, 1 << 30]),
    "no entries of 2**33 heads": lambda: empty([0, 4], [0, 1, 1 << 33, 1]),
    "no entries of 2**33 sections": lambda: empty([0, 4], [1 << 33, 0, 1, 1]),
    "no entries of 2**60 channels": lambda: empty([0, 1 << 60], [0, 1, 2, 3]),
}
"""
_LIMIT = 400 << 20  # bytes that reading may take beyond what a process has when it starts


def test_no_file_makes_a_reader_take_much_memory(tmp_path: Path) -> None:
    child = start(
        HUGE
        + f"""
path = folder / "a.safetensors"
for name, make in files.items():
    path.write_bytes(make())
    if not os.fork():
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + {_LIMIT},) * 2)
        try:
            if not name.startswith("no entries") and "sections" not in name:
                read_header(path)
            read_kv_file(path)
        except CorruptFileError as error:
            os._exit(len(str(error)) > 1500)
        os._exit(1)
    if os.wait()[1]:
        raise SystemExit(f"{{name}} was not refused as it should be")
print("all refused")
""",
        tmp_path,
    )
    status, out, errors = finish(child)
    assert (status, out) == (0, "all refused\n"), errors


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "link": lambda path: path.symlink_to(path.with_name("target")),
    "broken link": lambda path: path.symlink_to(path.with_name("nowhere")),
    "folder": Path.mkdir,
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ODD_FILES)
def test_what_is_no_plain_file_is_refused_and_nothing_waits_for_it(tmp_path: Path, kind: str) -> None:
    (tmp_path / "target").write_bytes(good())
    path = tmp_path / "a.safetensors"
    ODD_FILES[kind](path)
    for reader in (read_header, read_kv_file, read_label):
        with pytest.raises(CorruptFileError, match=r"a\.safetensors"):
            reader(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ODD_FILES)
def test_what_is_no_plain_file_in_a_store_is_reported_and_its_target_left_alone(tmp_path: Path, kind: str) -> None:
    with MemoryStore(tmp_path / "store") as store:
        put(store)
        file = store.row("doc").file
        for name in (file, label_name(file)):
            path = store.folder / name
            path.rename(target := path.with_name("target"))
            if "link" in kind:
                target.rename(tmp_path / path.with_name("target").name)
            ODD_FILES[kind](path)
            target.unlink(missing_ok=True)
        with pytest.raises(CorruptFileError):
            store.get("doc")
        kinds = {problem.kind for problem in verify(store)}
        assert kinds == {"damaged-file", "stale-label"}
        repair(store)
        assert store.text("doc") == TEXT
        kv = put(store)
        assert same(store.get("doc").kv, kv)


@pytest.mark.parametrize("id", IDS)
def test_an_id_never_leads_out_of_the_store(tmp_path: Path, id: str) -> None:
    (tmp_path / "beside").mkdir()
    with MemoryStore(tmp_path / "store", namespace=id) as store:
        kv = put(store, id)
        assert same(store.get(id).kv, kv)
        assert store.rename(id, id + "2").id == id + "2"
        for catalog in store.folder.glob("catalog.sqlite3*"):
            catalog.unlink()
        assert [problem.mended for problem in repair(store) if problem.kind == "lost-row"] == [True]
        assert same(store.get(id + "2").kv, kv)
        store.delete(id + "2")
        assert {path.name for path in tmp_path.iterdir()} == {"beside", "store"}
        assert not list((tmp_path / "beside").iterdir())
        assert all(path.name.isascii() and len(path.name) < 70 for path in store.root.rglob("*"))


@pytest.mark.parametrize("id", IDS)
def test_a_file_of_another_id_than_its_name_says_is_not_adopted(tmp_path: Path, id: str) -> None:
    with MemoryStore(tmp_path / "store") as store:
        put(store, "other")
        stray = store.folder / f"{file_stem('doc')}-{1:012x}.safetensors"
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(file_of("bfloat16", id)[0])
        (problem,) = repair(store)
        assert (problem.kind, problem.mended) == ("lost-row", False)
        assert [row.id for row in store.list()] == ["other"]
        assert stray.exists()


LABEL = {
    "format": 1,
    "id": "doc",
    "namespace": "",
    "created_at": "2031-01-01",
    "updated_at": "2031-01-01",
    "metadata": {},
    "tags": [],
    "pinned": False,
    "expires_at": None,
}


@given(fields=st.dictionaries(st.sampled_from([*LABEL, "more"]), anything))
@often
def test_a_sealed_label_of_anything_is_refused_or_can_be_kept(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "label.json"
    path.write_text(json.dumps(sealed({**LABEL, **fields})))
    stored = None
    with contextlib.suppress(CorruptFileError):
        stored = read_label(path)
    if stored is None:
        return
    with MemoryStore(tmp_path / "store") as store:
        header, kv = sample(stored.id)
        store.put(header, kv, TEXT, stored.label, created_at=stored.created_at)
        found = [row.label for row in store.list() if row.id == stored.id]
        assert found == [stored.label] or stored.label.expires_at is not None


def test_a_label_that_is_too_long_to_be_read_is_not_written(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store") as store:
        kv = put(store)
        with pytest.raises(InputError, match=r"the label of 'doc' would take 67,\d{3},\d{3} bytes"):
            store.update("doc", metadata={"long": "x" * (64 << 20)})
        assert verify(store) == []
        assert same(store.get("doc").kv, kv)


# Catalogs


def name_another_file(store: MemoryStore, file: str) -> None:
    """Change the only row as somebody would who knows how rows are sealed."""
    (row,) = store.list()
    store.parts.catalog().documents.update(replace(row, file=file))


@pytest.mark.parametrize(
    "file", ["../victim.safetensors", "kv/../../victim.safetensors", "{folder}/victim.safetensors"]
)
def test_a_catalog_cannot_name_files_outside_of_its_store(tmp_path: Path, file: str) -> None:
    victim = tmp_path / "victim.safetensors"
    victim.write_bytes(good())
    (tmp_path / "victim.json").write_text("mine")
    with MemoryStore(tmp_path / "store") as store:
        put(store)
        name_another_file(store, file.format(folder=tmp_path))
        with pytest.raises(BeaconMemoryError):
            store.get("doc")
        with contextlib.suppress(BeaconMemoryError):
            store.put(*sample("doc"), TEXT)
        with contextlib.suppress(BeaconMemoryError):
            store.delete("doc")
        repair(store)
    assert victim.read_bytes() == good()
    assert (tmp_path / "victim.json").read_text() == "mine"
