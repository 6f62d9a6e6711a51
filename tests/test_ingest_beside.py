"""Adding many documents: the next is prepared, and the last one stored, in threads beside the computing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory import Added, BeaconMemory, Document, InputError, StoreError
from beacon_memory.compression.methods.registry import BUILT_IN
from beacon_memory.config import BeaconConfig

TEXTS = [f"In the year {1700 + n} the miller of Wend sold {n} sacks of flour." for n in range(6)]
DOCUMENTS = [Document(f"{n}", text) for n, text in enumerate(TEXTS)]
HOW: dict[str, Any] = {"ratio": 4, "compression": "select"}
SOON = 20  # seconds that something may take which happens at once


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[BeaconMemory]:
    model = tiny_model("llama", BeaconConfig(beacon_window=64), tokenizer=tiny_tokenizer())
    with BeaconMemory(tmp_path / "store", model, reserve=100) as memory:
        memory.compressor.sink  # noqa: B018  # read now, so that each pass from here on is one of a document
        memory.compressor.rows_per_pass = 1  # for one document each
        yield memory


def before_each(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, act: Callable[..., object]) -> None:
    """Let something happen before each call of a method."""
    method = getattr(owner, name)

    def acted(*args: Any, **options: Any) -> Any:
        act(*args)
        return method(*args, **options)

    monkeypatch.setattr(owner, name, acted)


def stored(memory: BeaconMemory) -> list[str]:
    return [row.id for row in memory.list()]


def test_a_document_is_stored_while_the_next_one_is_computed(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    putting, computing, met = threading.Event(), threading.Event(), []

    def put(header: Any, *_: Any) -> None:
        if header.id == "0":
            putting.set()
            met.append(computing.wait(SOON))

    def run(layout: Any, *_: Any) -> None:
        if layout.raw_ids[:20] == memory.compressor.tokenize(TEXTS[1]).ids[:20]:
            met.append(putting.wait(SOON))
            computing.set()

    before_each(monkeypatch, memory.store, "put", put)
    before_each(monkeypatch, memory.model, "read", run)
    for documents in (iter(DOCUMENTS[:3]), DOCUMENTS[:3]):
        assert [one.id for one in memory.add_many(documents, **HOW)] == ["0", "1", "2"]
        memory.erase("0", "1", "2")
        putting.clear()
        computing.clear()
    assert len(met) >= 4
    assert all(met)


def test_the_next_document_is_tokenized_while_one_is_computed(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizing, met = threading.Event(), []
    before_each(monkeypatch, memory.compressor, "tokenize", lambda text: text == TEXTS[1] and tokenizing.set())
    before_each(monkeypatch, memory.model, "read", lambda *_: met.append(tokenizing.wait(SOON)))
    memory.add_many(DOCUMENTS[:2], **HOW)
    assert met
    assert all(met)


def test_documents_that_may_have_to_be_waited_for_are_not_taken_early(memory: BeaconMemory) -> None:
    tokens = [len(memory.compressor.tokenize(text).ids) for text in TEXTS]
    read = [0]

    def arriving() -> Iterator[Document]:
        for number, document in enumerate(DOCUMENTS[:4]):
            assert read[-1] == sum(tokens[:number])
            yield document

    added = memory.add_many(arriving(), **HOW, progress=lambda done: read.append(done.tokens))
    assert [one.id for one in added] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("compression", list(BUILT_IN))
def test_results_and_errors_come_in_order(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    def put(header: Any, *_: Any) -> None:
        if header.id == "2":
            raise StoreError("the disk is full")

    before_each(monkeypatch, memory.store, "put", put)
    memory.add("1", TEXTS[1], ratio=4, compression=compression)
    told: list[str] = []
    done = memory.add_many(
        [*DOCUMENTS[:4], Document("blank", " "), DOCUMENTS[4]],
        ratio=4,
        compression=compression,
        on_added=lambda one: told.append(f"{one.id} {one.status}"),
        on_error=lambda document, error: told.append(f"{document.id} {type(error).__name__}"),
    )
    computed = ["0 added", "2 StoreError", "3 added", "4 added"]
    assert [one for one in told if one[0] in "0234"] == computed
    assert sorted(told) == sorted([*computed, "1 unchanged", "blank InputError"])
    assert [f"{one.id} {one.status}" for one in done] == [one for one in told if not one.endswith("Error")]
    assert stored(memory) == ["0", "1", "3", "4"]


@pytest.mark.parametrize("compression", list(BUILT_IN))
def test_an_error_without_a_listener_is_raised_and_nothing_behind_it_is_stored(
    memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    def put(header: Any, *_: Any) -> None:
        if header.id == "2":
            raise StoreError("the disk is full")

    before_each(monkeypatch, memory.store, "put", put)
    added: list[Added] = []
    with pytest.raises(StoreError, match="the disk is full"):
        memory.add_many(DOCUMENTS, ratio=4, compression=compression, on_added=added.append)
    assert stored(memory) == [one.id for one in added] == ["0", "1"]
    with pytest.raises(InputError, match="empty or blank"):
        memory.add_many([DOCUMENTS[3], Document("blank", " ")], ratio=4, compression=compression)
    assert stored(memory) == ["0", "1", "3"]


def test_an_error_of_whoever_gives_documents_comes_behind_those_before_it(memory: BeaconMemory) -> None:
    for given in ([*DOCUMENTS[:2], ("only an id",)], iter([*DOCUMENTS[2:4], ("only an id",)])):
        with pytest.raises(TypeError):
            memory.add_many(given, **HOW)  # type: ignore[arg-type]  # on purpose
    assert stored(memory) == ["0", "1", "2", "3"]


def test_interrupted_it_has_stored_what_was_computed(memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[Added] = []

    def run(layout: Any, *_: Any) -> None:
        if layout.raw_ids[:20] == memory.compressor.tokenize(TEXTS[3]).ids[:20]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        before_each(patched, memory.model, "read", run)
        with pytest.raises(KeyboardInterrupt):
            memory.add_many(DOCUMENTS, **HOW, on_added=added.append)
    assert stored(memory) == [one.id for one in added] == ["0", "1", "2"]
    again = memory.add_many(DOCUMENTS, **HOW)
    assert [one.status for one in again] == ["unchanged"] * 3 + ["added"] * 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]


def test_a_document_sees_what_became_of_those_before_it(memory: BeaconMemory) -> None:
    other = Document("0", TEXTS[5])
    given = [DOCUMENTS[0], DOCUMENTS[0], other, DOCUMENTS[1], DOCUMENTS[0]]
    statuses = [one.status for one in memory.add_many(given, **HOW)]
    assert statuses == ["added", "unchanged", "replaced", "added", "replaced"]
    memory.store.configure(quota=memory.show("0").bytes + 100)  # there is room for one
    assert [one.status for one in memory.add_many([DOCUMENTS[2], DOCUMENTS[1], DOCUMENTS[2]], **HOW)] == ["added"] * 3
    assert stored(memory) == ["2"]


def test_few_bytes_wait_to_be_stored(memory: BeaconMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beacon_memory.outbox._MOST_BYTES", 1)
    ready, started = threading.Event(), []
    before_each(monkeypatch, memory.store, "put", lambda *_: ready.wait(SOON))
    before_each(monkeypatch, memory.model, "read", lambda *_: started.append(len(stored(memory))))
    threading.Timer(0.5, ready.set).start()
    memory.add_many(DOCUMENTS, **HOW)
    assert max(n - stores for n, stores in enumerate(started[:: len(started) // len(DOCUMENTS)])) <= 2
