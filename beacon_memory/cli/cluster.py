"""Adding documents on a cluster: what `add --ray` does."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TextIO

from beacon_memory.distributed import require_ray
from beacon_memory.distributed.kinds import is_of_cluster
from beacon_memory.documents import Document
from beacon_memory.errors import BeaconMemoryError, ClusterError, InputError

from .adding import found_sources, remove_gone
from .sources import find_gone
from .terminal import counting, print_line, remarks, say

if TYPE_CHECKING:
    from beacon_memory.distributed import ClusterProgress
    from beacon_memory.memory import BeaconMemory
    from beacon_memory.results import Added

__all__ = ["ClusterJob", "add_on_cluster", "connected"]

_CONNECT_SECONDS = 10.0
_SAY_SECONDS = 60.0  # between remarks on how far it is, where no bar is shown


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to the Ray cluster at an address, `auto` for the one that is running, `local` for one of this machine.

    What Ray has to say meanwhile goes to standard error. Raises ClusterError if there is none.
    """
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports nothing to anybody
    import ray
    from ray.exceptions import RayError

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(_OutputOfThisThread()):
        try:
            _require_listening(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, RayError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"there is no Ray cluster at {address!r}: {error}; start one with `ray start --head`, or name another, "
                "or `local` for one of this machine"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


class _OutputOfThisThread(io.TextIOBase):
    """Take the place of standard output: what other threads print, as Ray's that listens for errors, goes to stderr."""

    def __init__(self) -> None:
        self._output, self._thread = sys.stdout, threading.current_thread()

    def write(self, text: str) -> int:
        """Write to standard output, or to standard error from another thread."""
        return self._of_thread().write(text)

    def flush(self) -> None:
        """Flush what this thread writes to."""
        self._of_thread().flush()

    def _of_thread(self) -> TextIO:
        return self._output if threading.current_thread() is self._thread else sys.stderr

    def isatty(self) -> bool:
        """Tell whether standard output is a terminal."""
        return self._output.isatty()

    def fileno(self) -> int:
        """Return the number of standard output."""
        return self._output.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a stream that has none says None
        """The encoding of standard output."""
        return self._output.encoding


def _require_listening(address: str) -> None:
    """Raise OSError if nobody listens at an address with a port: Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()


@dataclass(frozen=True, slots=True)
class ClusterJob:
    """Say how a cluster is to add documents: its address, how many workers, and what else `add` was told."""

    address: str
    workers: int | None = None
    dry_run: bool = False
    prune: bool = False
    as_json: bool = False


def add_on_cluster(
    job: ClusterJob,
    memory: BeaconMemory,
    paths: Sequence[str],
    id: str | None,
    label: Mapping[str, Any],
    how: tuple[int | str, str, str] = ("auto", "auto", "auto"),
) -> int:
    """Add files, tables and what has a URL by the workers of a cluster, and say what became of each document.

    Returns how many have failed; label, how: as for `add_sources`.
    """
    with connected(job.address):
        return _add(job, memory, paths, id, label, how)


def _add(
    job: ClusterJob,
    memory: BeaconMemory,
    paths: Sequence[str],
    id: str | None,
    label: Mapping[str, Any],
    how: tuple[int | str, str, str],
) -> int:
    from beacon_memory.distributed import compress
    from beacon_memory.distributed.reading import read

    plain = [path for path in paths if not is_of_cluster(path)]
    sources = found_sources(plain, id, job.as_json)
    if any(source.path is None for source in sources):
        raise InputError("standard input cannot be read on a cluster; name files")
    files = [(source.id, source.path.absolute()) for source in sources if source.path is not None]
    dataset, total = read([path for path in paths if is_of_cluster(path)], files, label)
    if job.prune:
        remove_gone(memory, find_gone(plain, sources, memory.list()), job.dry_run, job.as_json)
    with counting(total) as done:
        said = time.monotonic()

        def added(one: Added) -> None:
            done()
            if job.dry_run:
                would = one.status if one.status == "unchanged" else f"would be {one.status}"
                say(job.as_json, {"id": one.id, "status": would})
            else:
                say(job.as_json, asdict(one))

        def failure(document: Document, error: BeaconMemoryError) -> None:
            done()
            say(job.as_json, {"id": document.id, "status": "failed", "reason": str(error)})

        def progress(now: ClusterProgress) -> None:
            nonlocal said
            if time.monotonic() - said > _SAY_SECONDS and not remarks().is_terminal:
                said = time.monotonic()
                print_line(_told(now), err=True)

        outcome = compress(
            dataset,
            memory,
            *how,
            workers=job.workers,
            total=total,
            dry_run=job.dry_run,
            progress=progress,
            on_added=added,
            on_error=failure,
        )
    counts = ", ".join(f"{count:,} {status}" for status, count in sorted(outcome.counts.items()))
    would = "would be read" if job.dry_run else "read"
    print_line(f"{counts}; {outcome.tokens:,} tokens {would}, {outcome.seconds:,.0f} s", err=True)
    return len(outcome.failed)


def _told(now: ClusterProgress) -> str:
    of = "" if now.total is None else f" of {now.total:,}"
    left = "" if now.remaining is None else f", {now.remaining / 60:,.0f} min left"
    return f"{now.documents:,}{of} documents, {now.failed:,} failed, {now.rate:.2f} a second{left}"
