"""Compressing on a cluster of several nodes: what it reads, and what is left of a job in which something was killed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from cli_samples import lines, runner
from postgres_server import PostgresServer, postgres  # noqa: F401  # a fixture
from ray._private.utils import publish_error_to_driver
from ray._raylet import GcsClient
from ray_cluster import Nodes, documents, job, killed_in_the_middle
from tiny_models import tiny_base, tiny_checkpoint

from beacon_memory import BeaconMemory, ClusterError, ConfigError, InputError
from beacon_memory.cli.cluster import connected
from beacon_memory.cli.terminal import print_line
from beacon_memory.distributed import compress
from beacon_memory.distributed.compressing import _as_dataset
from beacon_memory.distributed.reading import read

COUNT = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), tiny_base("llama", max_position_embeddings=4096))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes with a core each, for all tests: starting Ray takes seconds."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # of workers
        nodes = Nodes(2)
        yield nodes
        nodes.close()


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A folder with a table, JSON lines and text files, one of which cannot be read."""
    folder = tmp_path / "sources"
    folder.mkdir()
    rows = [{"id": f"row {n}", "text": f"Row {n} of a table.", "metadata": {"year": 1900 + n}} for n in range(3)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    line = [{"id": "7", "text": "A line."}, {"id": "of Ada", "text": "Ada's line.", "metadata": {"author": "Ada"}}]
    (folder / "some.jsonl").write_text("".join(json.dumps(one) + "\n" for one in line))
    (folder / "mill.txt").write_text("The mill is sold.")
    (folder / "bad.md").write_bytes(b"\xff\xfe\x00")
    return folder


def test_a_command_reads_tables_and_files_and_stores_what_add_would_store(
    nodes: Nodes, model: Path, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runner(tmp_path / "store", model, monkeypatch)
    monkeypatch.chdir(tables)
    given = ["mill.txt", "bad.md", "rows.parquet", "some.jsonl"]
    added = run("add", *given, "--ray", nodes.address, "--workers", "1", "--tag", "mill", "--json")
    assert added.exit_code == 1, added.output
    statuses = {line["id"]: line["status"] for line in lines(added)}
    assert statuses.pop("bad.md") == "failed"
    assert set(statuses.values()) == {"added"}
    with BeaconMemory(tmp_path / "store", model) as memory, BeaconMemory(tmp_path / "alone", model) as alone:
        rows = {row.id: row for row in memory.list()}
        assert rows.keys() == statuses.keys() == {"mill.txt", "row 0", "row 1", "row 2", "7", "of Ada"}
        assert rows["row 1"].metadata == {"year": 1901}
        assert rows["of Ada"].metadata == {"author": "Ada"}
        assert rows["7"].metadata == {}
        assert rows["mill.txt"].metadata == {"path": str(tables / "mill.txt")}
        assert all(row.tags == ("mill",) for row in rows.values())
        assert memory.verify() == []
        alone.add_many([(id, memory.store.text(id)) for id in rows])
        for id in rows:
            ours, theirs = memory.store.get(id), alone.store.get(id)
            assert ours.header.windows == theirs.header.windows
            assert (ours.kv.keys - theirs.kv.keys).abs().max() < 1e-5
    again = run("add", "mill.txt", "rows.parquet", "--ray", nodes.address, "--workers", "1", "--dry-run", "--json")
    assert {line["status"] for line in lines(again)} == {"unchanged"}, again.output


@pytest.mark.parametrize("kill", ["worker", "node"])
def test_a_killed_worker_or_node_loses_nothing_and_doubles_nothing(
    nodes: Nodes, model: Path, tmp_path: Path, kill: str
) -> None:
    counts = killed_in_the_middle(nodes, kill, tmp_path / "store", None, model, documents(COUNT), [7])
    assert counts.total() == COUNT


def test_a_job_whose_driver_was_killed_goes_on_where_it_was(
    nodes: Nodes,
    model: Path,
    tmp_path: Path,
    postgres: PostgresServer,  # noqa: F811  # the fixture
) -> None:
    place, files = postgres.new_database(), (tmp_path / "files").as_uri()
    counts = killed_in_the_middle(nodes, "driver", place, files, model, documents(COUNT), [5])
    assert counts["unchanged"] >= 5
    assert counts.total() == COUNT


def test_what_stops_all_workers_is_raised_once(nodes: Nodes, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nosuch"), connected(nodes.address):
        compress([("a", "Text.")], BeaconMemory(tmp_path / "store", model), compression="nosuch", workers=1)
    assert not (tmp_path / "store" / "kv").exists()


def test_text_files_with_a_url_and_datasets_of_hugging_face_are_read(nodes: Nodes, tmp_path: Path) -> None:
    import datasets

    (tmp_path / "a.txt").write_text("One.")
    (tmp_path / "b.png").write_bytes(b"")
    theirs = datasets.Dataset.from_list([{"id": "x", "text": "Two.", "pinned": True}])
    with connected(nodes.address):
        objects, total = read([tmp_path.as_uri()])
        (row,) = objects.take_all()
        assert (row["id"], row["text"], row["path"], total) == (f"file://{tmp_path}/a.txt", "One.", row["id"], None)
        dataset, known = _as_dataset(theirs, 16)
        assert (dataset.take_all(), known) == ([{"id": "x", "text": "Two.", "pinned": True}], 1)
        with pytest.raises(InputError, match=r"no\.parquet"):
            read([str(tmp_path / "no.parquet")])


def test_what_ray_reports_never_comes_between_the_lines_of_a_command(
    nodes: Nodes, capsys: pytest.CaptureFixture[str]
) -> None:
    printed, reported, until = "", "", time.monotonic() + 60
    with connected(nodes.address):
        while "too many workers" not in reported:
            assert time.monotonic() < until
            publish_error_to_driver("warning", "too many workers", GcsClient(nodes.address))  # as a raylet does
            print_line("added")
            time.sleep(0.1)
            captured = capsys.readouterr()
            printed, reported = printed + captured.out, reported + captured.err
            assert set(printed.splitlines()) == {"added"}


def test_a_cluster_that_is_not_there_is_named() -> None:
    with pytest.raises(ClusterError, match="no Ray cluster at"), connected("127.0.0.1:1"):
        pass


def test_a_dataset_without_documents_is_refused(nodes: Nodes, model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no documents"):
        job(nodes.address, tmp_path / "store", None, model, [])
