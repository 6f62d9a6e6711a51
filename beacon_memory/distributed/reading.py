"""Sources as datasets of Ray Data: text files, tables in Parquet and JSON lines, object storage.

    dataset, total = read(["s3://bucket/notes/", "more.parquet"], files=[("a.pdf", Path("/mnt/notes/a.pdf"))])

Files are read and turned into text by tasks of their own, beside the workers that compress.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data

from beacon_memory.documents import PATH
from beacon_memory.errors import BeaconMemoryError, InputError
from beacon_memory.formats.kinds import Format
from beacon_memory.formats.reading import read_text

from .kinds import is_of_lines, is_parquet
from .rows import table_of

__all__ = ["read"]

_CPUS = 0.25  # of a task that reads
_BLOCK = 64  # files that are read by one

_Rows = Callable[[dict[str, Any]], dict[str, Any]]


def read(
    sources: Iterable[str], files: Sequence[tuple[str, Path]] = (), label: Mapping[str, object] | None = None
) -> tuple[ray.data.Dataset, int | None]:
    """Return a dataset of documents, and how many there are if that can be told without reading them.

    sources: Parquet files and JSON lines, whose rows have `id` and `text` and perhaps parts of a label, as paths, globs
             or URLs (s3://, gs://, ...); other URLs are of text files, or of folders of these.
    files:   ids and paths of text files, which all machines reach.
    label:   tags, pinned and expires_at of all documents, as far as they are not None.

    Raises InputError for what is not there.
    """
    given = {name: value for name, value in (label or {}).items() if value is not None}
    datasets: list[ray.data.Dataset] = []
    totals: list[int | None] = []
    if files:
        tables = [
            pa.table({"id": [id for id, _ in block], PATH: [str(path) for _, path in block]})
            for block in _blocks(files)
        ]
        datasets.append(_mapped(ray.data.from_arrow(tables), _of_file, given))
        totals.append(len(files))
    for source in sources:
        with _reported(source):
            dataset, total = _read(source, given)
        datasets.append(dataset)
        totals.append(total)
    if not datasets:
        raise InputError("there is nothing to read: name files, tables or URLs")
    known = [total for total in totals if total is not None]
    return datasets[0].union(*datasets[1:]) if datasets[1:] else datasets[0], (
        sum(known) if len(known) == len(totals) else None
    )


def _read(source: str, label: Mapping[str, object]) -> tuple[ray.data.Dataset, int | None]:
    if is_parquet(source):
        table = ray.data.read_parquet(_paths(source), num_cpus=_CPUS)
        total = table.count()  # from the files' ends
        return _mapped(table, _of_row, label), total
    if is_of_lines(source):
        return _mapped(ray.data.read_json(_paths(source), num_cpus=_CPUS), _of_row, label), None
    endings = [ending.removeprefix(".") for one in Format for ending in one.suffixes if ending]
    scheme = source.partition("://")[0]
    objects = ray.data.read_binary_files(source, include_paths=True, file_extensions=endings, num_cpus=_CPUS)
    return _mapped(objects, partial(_of_object, scheme), label), None


def _paths(source: str) -> str | list[str]:
    if "://" in source:
        return source
    found = sorted(glob.glob(source, recursive=True)) if glob.has_magic(source) else [source]  # noqa: PTH207  # as typed
    if not found:
        raise InputError(f"{source!r} does not exist, nothing matches it")
    return [str(Path(one).absolute()) for one in found]


def _mapped(dataset: ray.data.Dataset, to_row: _Rows, label: Mapping[str, object]) -> ray.data.Dataset:
    """Return a dataset of documents; `to_row` is called where it is read."""

    def documents(table: pa.Table) -> pa.Table:
        return table_of({**to_row(row), **label} for row in table.to_pylist())

    return dataset.map_batches(documents, batch_format="pyarrow", batch_size=_BLOCK, num_cpus=_CPUS)


def _of_row(row: dict[str, Any]) -> dict[str, Any]:
    row.pop("error", None)  # which is ours to set
    return row


def _of_file(row: dict[str, Any]) -> dict[str, Any]:
    try:
        data = Path(row[PATH]).read_bytes()
    except OSError as error:
        return row | {"error": f"{row[PATH]!r} cannot be read on the machine of a worker: {error.strerror}"}
    return row | _text_of(data, row[PATH])


def _of_object(scheme: str, row: dict[str, Any]) -> dict[str, Any]:
    url = row[PATH] if "://" in row[PATH] else f"{scheme}://{row[PATH]}"
    return {"id": url, PATH: url} | _text_of(row["bytes"], url)


def _text_of(data: bytes, path: str) -> dict[str, str]:
    try:
        return {"text": read_text(data, name=path.rpartition("/")[2])}
    except BeaconMemoryError as error:
        return {"error": f"{path!r} cannot be read: {error}"}


def _blocks(files: Sequence[tuple[str, Path]]) -> Iterator[Sequence[tuple[str, Path]]]:
    return (files[start : start + _BLOCK] for start in range(0, len(files), _BLOCK))


@contextlib.contextmanager
def _reported(source: str) -> Iterator[None]:
    """Raise InputError for what Ray and Arrow say of a source that cannot be read."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, BeaconMemoryError):
            raise
        raise InputError(f"{source!r} cannot be read: {error}") from error
