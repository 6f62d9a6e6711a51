from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from catalog_samples import LATER, LONG_AGO, add, clear, row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beacon_memory.documents import Text
from beacon_memory.errors import CorruptFileError, DocumentNotFoundError
from beacon_memory.storage.catalog.catalog import Catalog
from beacon_memory.storage.catalog.check import find_flaws, mend_catalog
from beacon_memory.storage.catalog.rows import DamagedRow


@pytest.fixture
def catalog(open_catalog: Callable[[], Catalog]) -> Iterator[Catalog]:
    catalog = open_catalog()
    yield catalog
    assert find_flaws(catalog) == []


def counts(catalog: Catalog) -> tuple[int, int]:
    return catalog.properties.count("documents"), catalog.properties.count("bytes")


def test_documents_and_bytes_are_counted(catalog: Catalog) -> None:
    assert counts(catalog) == (0, 0)
    first = add(catalog, "doc", "text", bytes=100)
    add(catalog, "other", "text", bytes=10)
    assert counts(catalog) == (2, 110)
    second = add(catalog, "doc", "new text", bytes=70, file="kv/2", fingerprint="new")
    assert counts(catalog) == (2, 80)
    catalog.versions.keep(first)
    assert counts(catalog) == (2, 180)
    assert catalog.versions.drop() == [first.file]
    assert counts(catalog) == (2, 80)
    catalog.versions.keep(first)
    catalog.documents.rename("doc", replace(second, id="new", file="kv/3"))
    assert counts(catalog) == (2, 80)
    catalog.documents.delete("new")
    catalog.documents.delete("other")
    assert counts(catalog) == (0, 0)


def test_counts_are_rolled_back_with_what_they_count(catalog: Catalog) -> None:
    add(catalog, "doc", "text", bytes=100)
    with pytest.raises(KeyError), catalog.transaction():  # noqa: PT012 -- what comes before the error is the point
        add(catalog, "new", "text", bytes=7)
        catalog.documents.delete("doc")
        assert counts(catalog) == (1, 7)
        raise KeyError
    assert counts(catalog) == (1, 100)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_are_those_of_the_rows_whatever_is_done(catalog: Catalog, data: st.DataObject) -> None:
    clear(catalog)
    ids = st.sampled_from(["a", "b", "c"])
    for number in range(data.draw(st.integers(1, 12))):
        id, size = data.draw(ids), data.draw(st.integers(0, 99))
        now = catalog.documents.get(id)
        match data.draw(st.sampled_from(["put", "keep", "delete", "rename", "drop"])):
            case "put":
                add(catalog, id, f"text {size}", bytes=size, file=f"kv/{number}", fingerprint=f"{number % 3}")
            case "keep" if now is not None:
                catalog.versions.keep(now)
                catalog.documents.put(replace(now, file=f"kv/{number}", bytes=size), Text(catalog.documents.text(id)))
            case "delete" if now is not None:
                catalog.documents.delete(id)
            case "rename" if now is not None and catalog.documents.get(id * 2) is None:
                catalog.documents.rename(id, replace(now, id=id * 2, file=f"kv/{number}"))
            case "drop":
                catalog.versions.drop(id)
        rows, versions = catalog.documents.list(), [*catalog.versions.scan()]
        assert counts(catalog) == (len(rows), sum(row.bytes for row in [*rows, *versions]))  # type: ignore[union-attr]
        assert catalog.file_names.named() == {row.file for row in [*rows, *versions]}
        assert find_flaws(catalog) == []


def test_facts_are_set_and_forgotten(catalog: Catalog) -> None:
    assert catalog.properties.get("colour") is None
    for value in ("red", 7, "ü\0"):
        catalog.properties.set("colour", value)
        assert catalog.properties.get("colour") == value
    catalog.properties.set("colour", None)
    assert catalog.properties.get("colour") is None
    assert len(str(catalog.properties.get("identity"))) == 32


def test_numbers_of_files_rise_with_the_time_and_never_repeat(
    catalog: Catalog, open_catalog: Callable[[], Catalog]
) -> None:
    before = int(time.time() * 1000)
    first = catalog.file_names.take_number()
    assert before <= first <= int(time.time() * 1000) + 1
    numbers = [catalog.file_names.take_number() for _ in range(50)]
    assert numbers == sorted({first, *numbers})[1:]
    catalog.properties.set("last", ahead := before + 10**9)  # as if the clock had been set back
    other = open_catalog()
    assert [other.file_names.take_number(), catalog.file_names.take_number()] == [ahead + 1, ahead + 2]


def file(number: int | str) -> str:
    return f"kv/ab/{'c' * 32}-{number if isinstance(number, str) else format(number, '012x')}.safetensors"


def key(name: str) -> str:
    return name[-24:-12]


def test_a_file_needs_no_row_after_it_was_replaced_or_removed(catalog: Catalog) -> None:
    names = [file(catalog.file_names.take_number()) for _ in range(3)]
    add(catalog, "doc", "text", file=names[0])
    assert catalog.file_names.unsettled() == set()
    add(catalog, "doc", "text", file=names[1], fingerprint="new")
    assert catalog.file_names.unsettled() == {key(names[0])}
    catalog.documents.rename("doc", row("new", "text", file=names[2]))
    assert catalog.file_names.unsettled() == {key(names[0]), key(names[1])}
    catalog.documents.delete("new")
    assert catalog.file_names.unsettled() == set(map(key, names))
    assert catalog.file_names.settle(map(key, names[:2]))
    assert catalog.file_names.unsettled() == {key(names[2])}
    add(catalog, "doc", "text", file=names[2])
    assert catalog.file_names.unsettled() == set()


def test_the_file_of_a_kept_version_has_a_row(catalog: Catalog) -> None:
    first = add(catalog, "doc", "text", file=file("0123456789ab"), fingerprint="old")
    catalog.versions.keep(first)
    add(catalog, "doc", "text", file=file("0123456789ac"), fingerprint="new")
    assert first.file in catalog.file_names.named("doc")
    catalog.documents.delete("doc")
    assert catalog.file_names.unsettled() == {"0123456789ab", "0123456789ac"}


def test_a_version_is_kept_for_each_fingerprint(catalog: Catalog) -> None:
    assert catalog.versions.get("doc", "a") is None
    versions = [row("doc", "text", file=f"kv/{n}", fingerprint=name, tags=("x",)) for n, name in enumerate("aab")]
    add(catalog, "doc", "text")
    assert [catalog.versions.keep(one) for one in versions] == [[], [versions[0].file], []]
    assert catalog.versions.get("doc", "a") == versions[1]
    assert catalog.versions.get("doc", "b") == versions[2]
    assert catalog.versions.get("other", "a") is None
    assert [*catalog.versions.scan()] == versions[1:]
    assert catalog.versions.drop("doc", "a") == [versions[1].file]
    assert catalog.versions.drop("other") == []
    assert [*catalog.versions.scan()] == versions[2:]
    assert sorted(catalog.documents.delete("doc")) == sorted(["kv/'doc'", versions[2].file])
    assert [*catalog.versions.scan()] == []


@pytest.mark.parametrize(
    "change",
    ["record = '{}'", "record = '['", "record = replace(record, 'text', 'test')", "fingerprint = 'b'", "bytes = 7"],
)
def test_a_damaged_version_is_told_from_sound_ones(catalog: Catalog, change: str) -> None:
    for id in ("doc", "other"):
        add(catalog, id, "text")
        catalog.versions.keep(row(id, "text", file=f"kv/{id}", fingerprint="a", metadata={"about": "text"}))
    with catalog.connections.transaction() as db:
        db.execute(f"UPDATE versions SET {change} WHERE document = 'doc'")
    with pytest.raises(CorruptFileError, match="a kept version of 'doc' is damaged; `beacon-memory repair` drops it"):
        [catalog.versions.get("doc", fingerprint) for fingerprint in "ab"]
    damaged, sound = catalog.versions.scan()
    assert isinstance(damaged, DamagedRow)
    assert (damaged.id, damaged.file) == ("doc", "kv/doc")
    catalog.versions.forget(damaged)
    assert [*catalog.versions.scan()] == [sound]
    mend_catalog(catalog, {})  # the bytes of a version may have been those of no version


def test_use_is_noted_and_never_set_back(catalog: Catalog) -> None:
    kept = add(catalog, "doc", "text", used_at=100)
    assert catalog.documents.touch({"doc": 200, "unknown": 1})
    assert catalog.documents.require("doc") == replace(kept, used_at=200)
    assert catalog.documents.touch({"doc": 150})
    assert catalog.documents.require("doc").used_at == 200


def test_notes_wait_for_nobody(catalog: Catalog, open_catalog: Callable[[], Catalog]) -> None:
    add(catalog, "doc", "text", file=file("0123456789ab"), used_at=100)
    catalog.documents.delete("doc")
    add(catalog, "doc", "text", used_at=100)
    with open_catalog().transaction():
        started = time.monotonic()
        assert not catalog.documents.touch({"doc": 200})
        settled = catalog.file_names.settle(["0123456789ab"])
        assert time.monotonic() - started < 10  # others wait for 30
    assert catalog.documents.require("doc").used_at == 100
    assert settled is catalog.shared  # in PostgreSQL this needs no lock
    assert catalog.file_names.unsettled() == (set() if settled else {"0123456789ab"})


def test_notes_and_numbers_inside_a_transaction_are_part_of_it(catalog: Catalog) -> None:
    add(catalog, "doc", "text", file=file("0123456789ab"), used_at=100)
    catalog.documents.delete("doc")
    add(catalog, "doc", "text", used_at=100)
    with catalog.transaction():
        assert catalog.documents.touch({"doc": 200})
        number = catalog.file_names.take_number()
    assert catalog.documents.require("doc").used_at == 200
    with pytest.raises(KeyError), catalog.transaction():  # noqa: PT012 -- what comes before the error is the point
        assert catalog.documents.touch({"doc": 300})
        assert catalog.file_names.settle(["0123456789ab"])
        catalog.properties.set("last", catalog.file_names.take_number() + 10**9)
        raise KeyError
    assert catalog.documents.require("doc").used_at == 200
    assert catalog.file_names.unsettled() == {"0123456789ab"}
    assert catalog.file_names.take_number() < number + 10**9


def test_the_least_used_documents_are_found_but_not_pinned_ones(catalog: Catalog) -> None:
    for n, id in enumerate("cadb"):
        add(catalog, id, "text", used_at=n, pinned=id == "a")
    assert [row.id for row in catalog.documents.least_used(9)] == ["c", "d", "b"]
    assert [row.id for row in catalog.documents.least_used(2)] == ["c", "d"]


def test_an_expired_document_is_as_good_as_not_there(catalog: Catalog) -> None:
    gone = add(catalog, "gone", "about apples", expires_at=LONG_AGO, tags=("x",))
    kept = add(catalog, "kept", "about apples", expires_at=LATER, tags=("x",))
    assert catalog.documents.get("gone") is None
    for use in (catalog.documents.require, catalog.documents.text):
        with pytest.raises(DocumentNotFoundError, match="no document 'gone' is stored; list"):
            use("gone")
    assert catalog.documents.list() == catalog.documents.list(tags=["x"]) == catalog.documents.list(prefix="") == [kept]
    assert [hit.document for hit in catalog.texts.search("apples")] == ["kept"]
    assert catalog.documents.expired(LATER.replace("2999", "2998")) == ["gone"]
    assert catalog.documents.expired(LATER) == ["gone", "kept"]
    assert [*catalog.documents.scan()] == [gone, kept]
    assert catalog.file_names.named("gone") == {gone.file}
