"""A worker and its writer, in this process: what is done anew after deaths, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tiny_models import tiny_model, tiny_tokenizer

from beacon_memory import BeaconMemory, Document
from beacon_memory.config import BeaconConfig
from beacon_memory.distributed.rows import ROWS, document_of, rows_of, table_of
from beacon_memory.distributed.worker import How, Worker
from beacon_memory.distributed.writer import Writer
from beacon_memory.errors import InputError
from beacon_memory.load_once import ModelSource
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.storage.repair import repair
from beacon_memory.storage.store import MemoryStore

TEXTS = {id: f"The miller {id} sold {n} sacks of flour. " * 4 for n, id in enumerate(["Ada", "Bert", "Cora"])}


@pytest.fixture(scope="module")
def model() -> BeaconModel:
    config = BeaconConfig(beacon_window=32)
    return tiny_model("llama", config, tokenizer=tiny_tokenizer(), max_position_embeddings=4096)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryStore]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with MemoryStore(tmp_path / "store") as store:
        yield store


class Job:
    """A writer, and workers that ask it directly; `deadly` are ids of documents at which a worker dies."""

    def __init__(self, store: MemoryStore, model: BeaconModel) -> None:
        self.store, self.model = store, model
        self.writer = Writer(store)
        self.calls: list[str] = []
        self.deadly: set[str] = set()

    def ask(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        if method == "reserve" and arguments[0] in self.deadly:
            raise KeyboardInterrupt  # no Exception, as a process that ends
        return getattr(self.writer, method)(*arguments)

    def worker(self, **how: Any) -> Worker:
        return Worker(self.ask, ModelSource(self.model, None, None, "auto", 1024, "repeat"), How(**how))

    def reports(self, documents: dict[str, str], **how: Any) -> dict[str, dict[str, Any]]:
        """What a new worker reports of a batch, by id."""
        batch = table_of(rows_of([Document(id, text) for id, text in documents.items()]))
        return {report["id"]: report for report in self.worker(**how)(batch).to_pylist()}

    def statuses(self, documents: dict[str, str], **how: Any) -> dict[str, str]:
        return {id: report["status"] for id, report in self.reports(documents, **how).items()}


@pytest.fixture
def job(store: MemoryStore, model: BeaconModel) -> Job:
    return Job(store, model)


def test_a_batch_is_stored_in_one_commit_and_skipped_when_it_comes_again(job: Job) -> None:
    assert job.statuses(TEXTS) == dict.fromkeys(TEXTS, "added")
    assert job.calls.count("take") == 1
    assert job.statuses(TEXTS) == dict.fromkeys(TEXTS, "unchanged")
    assert job.calls.count("take") == 1
    assert BeaconMemory(job.store, job.model).verify() == []


def test_a_document_that_fails_leaves_the_others(job: Job) -> None:
    reports = job.reports(TEXTS | {"blank": " "})
    assert reports.pop("blank")["reason"] == (
        "document 'blank': the document is empty or blank: there is nothing to compress"
    )
    assert {one["status"] for one in reports.values()} == {"added"}


def test_what_a_worker_had_stored_before_it_died_is_skipped_and_the_rest_is_done_alone(job: Job) -> None:
    job.deadly = {"Bert"}
    with pytest.raises(KeyboardInterrupt):
        job.statuses(TEXTS)
    job.deadly = set()
    assert job.statuses(TEXTS) == dict.fromkeys(TEXTS, "added")
    assert job.calls.count("take") == 3
    job.writer.close()
    assert BeaconMemory(job.store, job.model).verify() == []


def test_a_document_that_kills_its_workers_is_left_out_in_the_end(job: Job) -> None:
    job.deadly = {"Bert"}
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            job.statuses(TEXTS)
    reports = job.reports(TEXTS)
    assert "4 workers have died while they read 'Bert'" in reports["Bert"]["reason"]
    assert reports["Cora"]["status"] == "added"
    assert [row.id for row in job.store.list()] == ["Ada", "Cora"]


def test_an_error_of_another_kind_is_that_of_its_document(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    real = job.writer.reserve

    def reserve(id: str) -> str:
        if id == "Bert":
            raise RuntimeError("out of memory")
        return real(id)

    monkeypatch.setattr(job.writer, "reserve", reserve)
    reports = job.reports(TEXTS)
    assert reports["Bert"]["reason"] == "RuntimeError: out of memory"
    assert [row.id for row in job.store.list()] == ["Ada", "Cora"]
    assert BeaconMemory(job.store, job.model).verify() == []


def test_what_repair_has_removed_meanwhile_is_made_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    real, repaired = job.writer.take, []

    def take(deliveries: Any) -> Any:
        if not repaired:
            repaired.extend(repair(job.store))
        return real(deliveries)

    monkeypatch.setattr(job.writer, "take", take)
    assert job.statuses(TEXTS) == dict.fromkeys(TEXTS, "added")
    assert {problem.kind for problem in repaired} == {"orphan-file", "stale-temp"}
    assert BeaconMemory(job.store, job.model).verify() == []


def test_two_texts_under_one_id_are_refused(job: Job) -> None:
    table = table_of(rows_of([Document("a", "One text."), Document("a", "Another one."), Document("b", "Text.")]))
    reports = job.worker()(table).to_pylist()
    assert sorted((one["id"], one["status"]) for one in reports) == [("a", "added"), ("a", "failed"), ("b", "added")]
    assert job.store.text("a") == "One text."
    assert "twice, with different texts" in job.reports({"a": "A third."})["a"]["reason"]


def test_a_preview_changes_nothing_and_tells_what_would_be_done(job: Job) -> None:
    job.statuses({"Ada": TEXTS["Ada"], "Bert": "Another text."})
    job.writer = Writer(job.store)
    before = job.store.list()
    assert job.statuses(TEXTS, dry=True) == {"Ada": "unchanged", "Bert": "replaced", "Cora": "added"}
    assert job.store.list() == before


def test_a_long_document_is_stored_before_what_is_kept_on_disk_of_it_goes(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, kept = job.writer.take, []

    def take(deliveries: Any) -> Any:
        kept.append(len([*(tmp_path / "cache").rglob("*.safetensors")]))
        return real(deliveries)

    monkeypatch.setattr(job.writer, "take", take)
    assert job.statuses({"long": TEXTS["Ada"] * 5}) == {"long": "added"}
    assert len(kept) == 1
    assert kept[0] > 16  # windows
    assert [*(tmp_path / "cache").rglob("*.safetensors")] == []
    assert BeaconMemory(job.store, job.model).verify() == []


def test_a_new_label_and_a_coarser_precision_reach_a_stored_document(job: Job) -> None:
    job.statuses({"Ada": TEXTS["Ada"]})
    batch = table_of(rows_of([Document("Ada", TEXTS["Ada"], tags=["mill"])]))
    (report,) = job.worker(precision="int8")(batch).to_pylist()
    assert (report["status"], report["precision"]) == ("unchanged", "int8")
    assert job.store.row("Ada").tags == ("mill",)
    assert job.store.row("Ada").precision == "int8"


def test_rows_are_committed_together_while_others_are_committed(job: Job) -> None:
    job.worker()
    workers = [threading.Thread(target=job.statuses, args=[{id: text}]) for id, text in TEXTS.items()]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert [row.id for row in job.store.list()] == sorted(TEXTS)
    assert BeaconMemory(job.store, job.model).verify() == []


def test_a_row_becomes_the_document_that_it_stands_for() -> None:
    document = Document("a", "Text.", {"year": 1999, "none": None}, ["x"], True, "2031-05-03T00:00:00+00:00")
    table = table_of(rows_of([document]))
    assert table.schema == ROWS
    assert document_of(table.to_pylist()[0], {"kept": 1}) == document
    plain = {"id": 7, "text": "Text.", "metadata": {"year": 1, "missing": None}, "path": "/a.txt"}
    assert document_of(plain, {}) == Document("7", "Text.", {"year": 1, "path": "/a.txt"})
    assert document_of({"id": "a", "text": "", "path": "/a"}, {"kept": 1}).metadata == {"kept": 1, "path": "/a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Text."}, "a row has None as id"),
        ({"id": "a", "body": "Text."}, "this one has id, body"),
        ({"id": "a", "text": "T", "metadata": "{"}, "the metadata of 'a' are no JSON"),
        ({"id": "a", "error": "it burnt"}, "it burnt"),
    ],
)
def test_a_row_that_is_no_document_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        document_of(row, {})


def test_rows_whose_columns_are_of_other_types_are_refused() -> None:
    with pytest.raises(InputError, match="the rows of the dataset are no documents"):
        table_of([{"id": "a", "text": 5.5}])
    assert isinstance(table_of([]), pa.Table)
