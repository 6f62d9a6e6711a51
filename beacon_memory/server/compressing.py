"""Compressing beside the answers: one thread works on the jobs, one after another, and gives way to who asks.

Documents are read window by window, in passes. On a processor the thread has a lower priority than those that answer;
and while anybody is being answered, it waits after each pass as long as that took, so that an accelerator, which knows
no priorities, has time for the answers, too.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from beacon_memory.documents import Document, content_hash
from beacon_memory.memory import BeaconMemory
from beacon_memory.results import Added, Progress

from .jobs import Job, JobKind, Jobs, JobStatus
from .logs import LOGGER
from .metrics import Metrics
from .refusals import INTERNAL, RefusedError, refusal_of

__all__ = ["Compressing"]

_NICER = 5  # the priority of the thread, in Unix' niceness: a third of a processor that others want, too
_LONGEST_PAUSE = 2.0  # seconds that it waits after a pass
_MOST_TRIES = 3  # times that a job may be begun: one that lets the server die shall not do so for ever
_CANCEL_SECONDS = 60.0  # how long to wait for the pass of a job that is cancelled


class _InterruptedError(Exception):
    """The job is not to be gone on with."""


class Compressing:
    """Work on jobs in a thread, from `start` to `stop`.

    memory_of: the memory of a namespace. busy: whether anybody is being answered. changed: told of each job that has
    got on, in this thread.
    """

    def __init__(
        self,
        jobs: Jobs,
        memory_of: Callable[[str], BeaconMemory],
        metrics: Metrics,
        *,
        busy: Callable[[], bool],
        changed: Callable[[str], None],
    ) -> None:
        self._jobs = jobs
        self._memory_of = memory_of
        self._metrics = metrics
        self._busy = busy
        self._changed = changed
        self._news = threading.Condition()
        self._stopping = False
        self._running: Job | None = None
        self._cancelled = False
        self._progress = Progress(0, 0)
        self._thread = threading.Thread(target=self._work, name="beacon-memory-compress", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread works, or waits for work."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin with the jobs that wait already."""
        self._thread.start()

    def stop(self) -> None:
        """End after the pass that is under way; the job that it belongs to goes on with the next server."""
        with self._news:
            self._stopping = True
            self._news.notify_all()
        self._thread.join()

    def wake(self) -> None:
        """Look for jobs that were added."""
        with self._news:
            self._news.notify_all()

    def progress(self, job: Job) -> Progress | None:
        """Return how far a job is; None if it does not run."""
        with self._news:
            return self._progress if self._running is not None and self._running.id == job.id else None

    def cancel(self, job: Job) -> bool:
        """Cancel a job; waits for the pass that is under way. Returns False if it had ended before.

        Raises RefusedError with 409 if that does not end in a minute.
        """
        if self._jobs.cancel_queued(job):
            self._changed(job.id)
            return True
        with self._news:
            if self._running is None or self._running.id != job.id:
                return False
            self._cancelled = True
            self._news.notify_all()
            if not self._news.wait_for(lambda: self._running is None or self._running.id != job.id, _CANCEL_SECONDS):
                raise RefusedError(409, "job_running", f"{job.id} is being compressed, and does not stop; try again")
        return self._jobs.get(job.id, job.namespace).status is JobStatus.CANCELLED

    def _work(self) -> None:
        _give_way()
        while True:
            with self._news:
                if self._stopping:
                    return
                job = self._jobs.take()
                self._running, self._cancelled, self._progress = job, False, Progress(0, 0)
                if job is None:
                    self._news.wait()
                    continue
            self._changed(job.id)
            self._do(job)
            with self._news:
                self._running = None
                self._news.notify_all()
            self._changed(job.id)

    def _do(self, job: Job) -> None:
        """Do a job, and write what became of it."""
        try:
            if job.tries > _MOST_TRIES:
                raise RefusedError(
                    500, "gave_up", f"the server ended {_MOST_TRIES} times while it did this, and does not try again"
                )
            added = self._put(job) if job.kind is JobKind.PUT else self._append(job)
            self._end(job, JobStatus.DONE, result=asdict(added))
        except _InterruptedError:
            if self._cancelled:
                self._end(job, JobStatus.CANCELLED)
            else:
                self._jobs.requeue(job)
        except Exception as error:  # noqa: BLE001  # of whatever kind, the other jobs go on
            refusal = refusal_of(error)
            if refusal is INTERNAL:
                LOGGER.exception("a job failed", extra={"fields": {"job": job.id}})
                refusal = RefusedError(
                    500, INTERNAL.code, "the server could not do this; its log says why, under this job"
                )
            self._end(job, JobStatus.FAILED, error=refusal.body["error"])

    def _end(self, job: Job, status: JobStatus, **what: Any) -> None:
        self._jobs.end(job, status, **what)
        self._metrics.jobs.labels(status).inc()
        LOGGER.info("job", extra={"fields": {"job": job.id, "kind": job.kind, "status": status}})

    def _put(self, job: Job) -> Added:
        assert job.work is not None
        label = {name: job.work[name] for name in ("metadata", "tags", "pinned", "expires_at")}
        how = {name: job.work[name] for name in ("ratio", "compression", "precision")}
        document = Document(job.document, job.work["text"], **label)
        advance = partial(self._advance, _Pace())
        return self._memory_of(job.namespace).add_many([document], **how, progress=advance)[0]

    def _append(self, job: Job) -> Added:
        assert job.work is not None
        memory, text = self._memory_of(job.namespace), job.work["text"]
        row = memory.show(job.document)
        if job.becomes is not None and row.content_hash == job.becomes:  # the server died right behind it
            return Added(
                row.id, "appended", row.tokens, row.slots, row.bytes, row.ratios, row.compression, row.precision, 0.0
            )
        self._jobs.expect(job, content_hash(memory.store.text(job.document) + text))
        return memory.append(job.document, text, job.work["ratio"])

    def _advance(self, pace: _Pace, progress: Progress) -> None:
        """Hear of a pass: tell of it, and give others a turn; raises _InterruptedError if it is enough."""
        with self._news:
            self._metrics.compressed.inc(max(0, progress.tokens - self._progress.tokens))
            self._progress = progress
            job = self._running
        if job is not None:
            self._changed(job.id)
        pause = min(pace.took(), _LONGEST_PAUSE) if self._busy() else 0.0
        with self._news:
            self._news.wait_for(lambda: self._stopping or self._cancelled or not self._busy(), pause)
            if self._stopping or self._cancelled:
                raise _InterruptedError
        pace.begin()


class _Pace:
    """Take the time of passes."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Note that a pass begins."""
        self._began = time.monotonic()

    def took(self) -> float:
        """Return the seconds since the pass began."""
        return time.monotonic() - self._began


def _give_way() -> None:
    """Lower the priority of this thread, and of those that compute for it, where the system has one for threads."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICER)
