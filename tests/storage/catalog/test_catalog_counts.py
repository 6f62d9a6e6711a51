from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from catalog_samples import LATER, LONG_AGO, add, row
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_memory.documents import Text
from beacon_memory.errors import CorruptFileError, DocumentNotFoundError
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.rows import DamagedRow


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with contextlib.closing(Catalog(tmp_path / "catalog.sqlite3")) as catalog:
        yield catalog
        assert catalog.check() == []


def counts(catalog: Catalog) -> tuple[int, int]:
    return catalog.count("documents"), catalog.count("bytes")


def test_documents_and_bytes_are_counted(catalog: Catalog) -> None:
    assert counts(catalog) == (0, 0)
    first = add(catalog, "doc", "text", bytes=100)
    add(catalog, "other", "text", bytes=10)
    assert counts(catalog) == (2, 110)
    second = add(catalog, "doc", "new text", bytes=70, file="kv/2", fingerprint="new")
    assert counts(catalog) == (2, 80)
    catalog.keep_version(first)
    assert counts(catalog) == (2, 180)
    assert catalog.drop_versions() == [first.file]
    assert counts(catalog) == (2, 80)
    catalog.keep_version(first)
    catalog.rename("doc", replace(second, id="new", file="kv/3"))
    assert counts(catalog) == (2, 80)
    catalog.delete("new")
    catalog.delete("other")
    assert counts(catalog) == (0, 0)


def test_counts_are_rolled_back_with_what_they_count(catalog: Catalog) -> None:
    add(catalog, "doc", "text", bytes=100)
    with pytest.raises(KeyError), catalog.transaction():  # noqa: PT012 -- what comes before the error is the point
        add(catalog, "new", "text", bytes=7)
        catalog.delete("doc")
        assert counts(catalog) == (1, 7)
        raise KeyError
    assert counts(catalog) == (1, 100)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_the_rows_whatever_is_done(data: st.DataObject) -> None:
    catalog = Catalog(":memory:")
    ids = st.sampled_from(["a", "b", "c"])
    for number in range(data.draw(st.integers(1, 12))):
        id, size = data.draw(ids), data.draw(st.integers(0, 99))
        now = catalog.get(id)
        match data.draw(st.sampled_from(["put", "keep", "delete", "rename", "drop"])):
            case "put":
                add(catalog, id, f"text {size}", bytes=size, file=f"kv/{number}", fingerprint=f"{number % 3}")
            case "keep" if now is not None:
                catalog.keep_version(now)
                catalog.put(replace(now, file=f"kv/{number}", bytes=size), Text(catalog.text(id)))
            case "delete" if now is not None:
                catalog.delete(id)
            case "rename" if now is not None and catalog.get(id * 2) is None:
                catalog.rename(id, replace(now, id=id * 2, file=f"kv/{number}"))
            case "drop":
                catalog.drop_versions(id)
        rows, versions = catalog.list(), [*catalog.versions()]
        assert counts(catalog) == (len(rows), sum(row.bytes for row in [*rows, *versions]))  # type: ignore[union-attr]
        assert catalog.files() == {row.file for row in [*rows, *versions]}
        assert catalog.check() == []
    catalog.close()


def test_facts_are_set_and_forgotten(catalog: Catalog) -> None:
    assert catalog.read_property("colour") is None
    for value in ("red", 7, "ü\0"):
        catalog.write_property("colour", value)
        assert catalog.read_property("colour") == value
    catalog.write_property("colour", None)
    assert catalog.read_property("colour") is None
    assert len(str(catalog.read_property("identity"))) == 32


def test_numbers_of_files_rise_with_the_time_and_never_repeat(catalog: Catalog, tmp_path: Path) -> None:
    before = int(time.time() * 1000)
    first = catalog.take_number()
    assert before <= first <= int(time.time() * 1000) + 1
    numbers = [catalog.take_number() for _ in range(50)]
    assert numbers == sorted({first, *numbers})[1:]
    catalog.write_property("last", ahead := before + 10**9)  # as if the clock had been set back
    with contextlib.closing(Catalog(tmp_path / "catalog.sqlite3")) as other:
        assert [other.take_number(), catalog.take_number()] == [ahead + 1, ahead + 2]


def file(number: int | str) -> str:
    return f"kv/ab/{'c' * 32}-{number if isinstance(number, str) else format(number, '012x')}.safetensors"


def key(name: str) -> str:
    return name[-24:-12]


def test_a_file_needs_no_row_after_it_was_replaced_or_removed(catalog: Catalog) -> None:
    names = [file(catalog.take_number()) for _ in range(3)]
    add(catalog, "doc", "text", file=names[0])
    assert catalog.unsettled() == set()
    add(catalog, "doc", "text", file=names[1], fingerprint="new")
    assert catalog.unsettled() == {key(names[0])}
    catalog.rename("doc", row("new", "text", file=names[2]))
    assert catalog.unsettled() == {key(names[0]), key(names[1])}
    catalog.delete("new")
    assert catalog.unsettled() == set(map(key, names))
    assert catalog.settle(map(key, names[:2]))
    assert catalog.unsettled() == {key(names[2])}
    add(catalog, "doc", "text", file=names[2])
    assert catalog.unsettled() == set()


def test_the_file_of_a_kept_version_has_a_row(catalog: Catalog) -> None:
    first = add(catalog, "doc", "text", file=file("0123456789ab"), fingerprint="old")
    catalog.keep_version(first)
    add(catalog, "doc", "text", file=file("0123456789ac"), fingerprint="new")
    assert first.file in catalog.files("doc")
    catalog.delete("doc")
    assert catalog.unsettled() == {"0123456789ab", "0123456789ac"}


def test_a_version_is_kept_for_each_fingerprint(catalog: Catalog) -> None:
    assert catalog.version("doc", "a") is None
    versions = [row("doc", "text", file=f"kv/{n}", fingerprint=name, tags=("x",)) for n, name in enumerate("aab")]
    add(catalog, "doc", "text")
    assert [catalog.keep_version(one) for one in versions] == [[], [versions[0].file], []]
    assert catalog.version("doc", "a") == versions[1]
    assert catalog.version("doc", "b") == versions[2]
    assert catalog.version("other", "a") is None
    assert [*catalog.versions()] == versions[1:]
    assert catalog.drop_versions("doc", "a") == [versions[1].file]
    assert catalog.drop_versions("other") == []
    assert [*catalog.versions()] == versions[2:]
    assert sorted(catalog.delete("doc")) == sorted(["kv/'doc'", versions[2].file])
    assert [*catalog.versions()] == []


@pytest.mark.parametrize(
    "change",
    ["record = '{}'", "record = '['", "record = replace(record, 'text', 'test')", "fingerprint = 'b'", "bytes = 7"],
)
def test_a_damaged_version_is_told_from_sound_ones(catalog: Catalog, tmp_path: Path, change: str) -> None:
    for id in ("doc", "other"):
        add(catalog, id, "text")
        catalog.keep_version(row(id, "text", file=f"kv/{id}", fingerprint="a", metadata={"about": "text"}))
    with contextlib.closing(sqlite3.connect(tmp_path / "catalog.sqlite3", isolation_level=None)) as db:
        db.execute(f"UPDATE versions SET {change} WHERE document = 'doc'")
    with pytest.raises(CorruptFileError, match="a kept version of 'doc' is damaged; `beacon-memory repair` drops it"):
        [catalog.version("doc", fingerprint) for fingerprint in "ab"]
    damaged, sound = catalog.versions()
    assert isinstance(damaged, DamagedRow)
    assert (damaged.id, damaged.file) == ("doc", "kv/doc")
    catalog.forget_version(damaged)
    assert [*catalog.versions()] == [sound]
    catalog.mend({})  # the bytes of a version may have been those of no version


def test_use_is_noted_and_never_set_back(catalog: Catalog) -> None:
    kept = add(catalog, "doc", "text", used_at=100)
    assert catalog.touch({"doc": 200, "unknown": 1})
    assert catalog.require("doc") == replace(kept, used_at=200)
    assert catalog.touch({"doc": 150})
    assert catalog.require("doc").used_at == 200


def test_notes_wait_for_nobody(catalog: Catalog, tmp_path: Path) -> None:
    add(catalog, "doc", "text", file=file("0123456789ab"), used_at=100)
    catalog.delete("doc")
    add(catalog, "doc", "text", used_at=100)
    with contextlib.closing(Catalog(tmp_path / "catalog.sqlite3")) as other, other.transaction():
        started = time.monotonic()
        assert not catalog.touch({"doc": 200})
        assert not catalog.settle(["0123456789ab"])
        assert time.monotonic() - started < 10  # others wait for 30
    assert catalog.require("doc").used_at == 100
    assert catalog.unsettled() == {"0123456789ab"}


def test_notes_and_numbers_inside_a_transaction_are_part_of_it(catalog: Catalog) -> None:
    add(catalog, "doc", "text", file=file("0123456789ab"), used_at=100)
    catalog.delete("doc")
    add(catalog, "doc", "text", used_at=100)
    with catalog.transaction():
        assert catalog.touch({"doc": 200})
        number = catalog.take_number()
    assert catalog.require("doc").used_at == 200
    with pytest.raises(KeyError), catalog.transaction():  # noqa: PT012 -- what comes before the error is the point
        assert catalog.touch({"doc": 300})
        assert catalog.settle(["0123456789ab"])
        catalog.write_property("last", catalog.take_number() + 10**9)
        raise KeyError
    assert catalog.require("doc").used_at == 200
    assert catalog.unsettled() == {"0123456789ab"}
    assert catalog.take_number() < number + 10**9


def test_the_least_used_documents_are_found_but_not_pinned_ones(catalog: Catalog) -> None:
    for n, id in enumerate("cadb"):
        add(catalog, id, "text", used_at=n, pinned=id == "a")
    assert [row.id for row in catalog.least_used(9)] == ["c", "d", "b"]
    assert [row.id for row in catalog.least_used(2)] == ["c", "d"]


def test_an_expired_document_is_as_good_as_not_there(catalog: Catalog) -> None:
    gone = add(catalog, "gone", "about apples", expires_at=LONG_AGO, tags=("x",))
    kept = add(catalog, "kept", "about apples", expires_at=LATER, tags=("x",))
    assert catalog.get("gone") is None
    for use in (catalog.require, catalog.text):
        with pytest.raises(DocumentNotFoundError, match="no document 'gone' is stored; list"):
            use("gone")
    assert catalog.list() == catalog.list(tags=["x"]) == catalog.list(prefix="") == [kept]
    assert [hit.document for hit in catalog.search("apples")] == ["kept"]
    assert catalog.expired(LATER.replace("2999", "2998")) == ["gone"]
    assert catalog.expired(LATER) == ["gone", "kept"]
    assert [*catalog.scan()] == [gone, kept]
    assert catalog.files("gone") == {gone.file}
