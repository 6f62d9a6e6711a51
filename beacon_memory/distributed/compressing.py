"""Compressing a dataset on a cluster: Ray Data reads it, workers compress it, one writer commits what they made.

    outcome = compress(ray.data.read_parquet("s3://bucket/notes/"), memory)
    print(outcome.counts, outcome.failed)

Interrupted in any way, just run it again: what is stored is skipped.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
import ray.data
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from beacon_memory.compression.work import Ratio
from beacon_memory.documents import Document
from beacon_memory.errors import BeaconMemoryError, ClusterError, ConfigError, InputError
from beacon_memory.memory import BeaconMemory
from beacon_memory.results import Added

from .rows import added_of, error_of, rows_of, table_of
from .worker import How, Worker
from .writer import Writer

if TYPE_CHECKING:
    import datasets

__all__ = ["ClusterProgress", "Outcome", "compress"]

BATCH = 16  # documents that go to a worker at a time
_CPUS = 0.75  # of a worker: what reads must find room beside as many workers as there are cores
_BLOCK_BYTES = 1 << 17  # of documents that are one task of a worker, or more if a batch has more
_THREADS = 64  # of the writer; a worker uses one at a time
_SPEED_SECONDS = 300.0  # of which an estimate is made


Documents = Iterable[Document | tuple[str, str]]


@dataclass(frozen=True, slots=True)
class ClusterProgress:
    """Tell how far a job is.

    documents, failed, tokens: that are done, and those of them that have failed; raw tokens that were compressed.
    total:     documents of the dataset, None if that is not known.
    seconds:   since the job began.
    rate:      documents a second, of the last minutes.
    """

    documents: int
    failed: int
    tokens: int
    total: int | None
    seconds: float
    rate: float

    @property
    def remaining(self) -> float | None:
        """Estimated seconds to the end, None while they cannot be told."""
        if self.total is None or not self.rate:
            return None
        return max(0, self.total - self.documents) / self.rate


@dataclass(frozen=True, slots=True)
class Outcome:
    """Tell what became of a job.

    counts: documents by status, see `Added`. failed: errors by the ids of documents. tokens: raw tokens that were
    compressed, or would be. seconds: that it took.
    """

    counts: Mapping[str, int]
    failed: Mapping[str, BeaconMemoryError]
    tokens: int
    seconds: float


def compress(
    dataset: ray.data.Dataset | datasets.Dataset | datasets.IterableDataset | Documents,
    memory: BeaconMemory,
    ratio: Ratio = "auto",
    compression: str = "auto",
    precision: str = "auto",
    *,
    workers: int | None = None,
    cpus: float = _CPUS,
    gpus: float | None = None,
    batch: int = BATCH,
    total: int | None = None,
    dry_run: bool = False,
    progress: Callable[[ClusterProgress], None] = lambda _: None,
    on_added: Callable[[Added], None] = lambda _: None,
    on_error: Callable[[Document, BeaconMemoryError], None] = lambda _document, _error: None,
) -> Outcome:
    """Compress the documents of a dataset on the cluster that Ray is connected to, and store them.

    dataset: of Ray, or of Hugging Face, with columns `id` and `text`, and if you like `metadata`, `tags`, `pinned` and
             `expires_at`; or documents, or pairs of id and text.
    memory:  store and model. Its model is not loaded here, but by name in each worker. A store in a folder lies on a
             disk of this machine, and workers on others reach it under the same path.
    ratio, compression, precision: as for `BeaconMemory.add_many`.
    workers: how many; by default one for each GPU of the cluster, or without any one for each core.
    cpus, gpus: of each worker, as Ray counts them; gpus by default 1 if the cluster has any.
    batch:   documents that go to a worker at a time. total: documents of the dataset, if you know them.
    dry_run: only tell what would be added, replaced or left as it is.

    A document that fails is told to `on_error`, and the others go on. A worker that dies is replaced, and what it was
    doing is done again. Documents are stored some at a time by one process on this machine, each under its id, once.
    Raises ClusterError if Ray gives up, and what the model or the store raise if they cannot be used; what was finished
    is stored then.
    """
    if batch < 1 or (workers is not None and workers < 1):
        raise ConfigError(f"workers={workers} and batch={batch} must be at least 1")
    _ = memory.store.settings  # raises before anything is started if it cannot be opened
    source, how = memory.source, How(ratio, compression, precision, dry_run)
    rows, known = _as_dataset(dataset, batch)
    gpus, workers = _resources(gpus, workers)
    ask = _start_writer(memory)
    reports = rows.map_batches(
        Worker,
        fn_constructor_args=(ask, source, how),
        batch_size=batch,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    reports.context.enable_progress_bars = False
    reports.context.target_max_block_size = _BLOCK_BYTES  # else a worker says nothing for thousands of documents
    tally = _Tally(known if total is None else total)
    try:
        for report in _streamed(reports):
            tally.add(report, on_added, on_error)
            progress(tally.progress)
        ask("close")
    except RayError as error:
        raise ClusterError(f"Ray gave up: {error}; what was finished is stored, begin again to go on") from error
    return Outcome(dict(tally.counts), tally.failed, tally.tokens, tally.progress.seconds)


def _as_dataset(dataset: Any, batch: int) -> tuple[ray.data.Dataset, int | None]:
    """Return a dataset of Ray, in blocks of `batch` rows if it is made here, and how many it has if that is known."""
    if isinstance(dataset, ray.data.Dataset):
        return dataset, None
    if type(dataset).__module__.partition(".")[0] == "datasets":
        count: int | None = getattr(dataset, "num_rows", None)  # none of one that is streamed
        blocks = None if count is None else max(1, count // batch)
        return ray.data.from_huggingface(dataset, override_num_blocks=blocks), count
    documents = [one if isinstance(one, Document) else Document(*one) for one in dataset]
    if not documents:
        raise InputError("the dataset has no documents")
    starts = range(0, len(documents), batch)
    tables = [table_of(rows_of(documents[start : start + batch])) for start in starts]
    return ray.data.from_arrow(tables), len(documents)


def _resources(gpus: float | None, workers: int | None) -> tuple[float, int]:
    """Return how many GPUs a worker has, and how many workers there may be."""
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if gpus is None:
        gpus = 1.0 if there.get("GPU") else 0.0
    if workers is None:
        workers = int(there["GPU"] / gpus) if gpus else int(there.get("CPU", 1))
    return gpus, max(1, workers)


def _start_writer(memory: BeaconMemory) -> _Asking:
    """Start the writer on this machine, where the catalog is if it is one machine's."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Writer).options(  # which is typed as a class or a handle
        num_cpus=0, max_concurrency=_THREADS, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
    )
    return _Asking(actor.remote(memory.store))


class _Asking:
    """Call methods of the writer from a worker; what it raises is raised here."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __call__(self, method: str, *arguments: object) -> Any:
        try:
            return ray.get(getattr(self._writer, method).remote(*arguments))
        except RayTaskError as error:
            raise error.cause from error


def _streamed(reports: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Yield what workers report, as soon as they do."""
    tables: Iterable[Any] = reports.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for table in tables:
        yield from table.to_pylist()


@dataclass(slots=True)
class _Tally:
    """Count what workers report."""

    total: int | None
    counts: Counter[str] = field(default_factory=Counter)
    failed: dict[str, BeaconMemoryError] = field(default_factory=dict)
    tokens: int = 0
    begun: float = field(default_factory=time.monotonic)
    latest: deque[tuple[float, int]] = field(default_factory=deque)

    def add(
        self,
        report: Mapping[str, Any],
        on_added: Callable[[Added], None],
        on_error: Callable[[Document, BeaconMemoryError], None],
    ) -> None:
        """Count a report, and tell of it; raises what has stopped a worker."""
        if report["status"] in ("failed", "stopped"):
            error = error_of(report)
            if report["status"] == "stopped":
                raise error
            self.failed[report["id"]] = error
            on_error(Document(report["id"], ""), error)
        else:
            added = added_of(report)
            self.tokens += added.tokens if added.status != "unchanged" else 0
            on_added(added)
        self.counts[report["status"]] += 1
        now = time.monotonic()
        self.latest.append((now, self.counts.total()))
        while len(self.latest) > 1 and now - self.latest[0][0] > _SPEED_SECONDS:
            self.latest.popleft()

    @property
    def progress(self) -> ClusterProgress:
        """How far the job is now."""
        now, done = time.monotonic(), self.counts.total()
        since, before = self.latest[0] if self.latest else (now, done)
        if self.latest and self.latest[0][1] == 1:  # all of it so far: from the beginning on
            since, before = self.begun, 0
        rate = (done - before) / (now - since) if now > since else 0.0
        return ClusterProgress(done, self.counts["failed"], self.tokens, self.total, now - self.begun, rate)
