"""Jobs: texts that wait to be compressed, on disk, so that what was accepted survives the death of the server.

    <store>/server/jobs.sqlite3  the jobs of all namespaces
    <store>/server/lock          held by the server that works on them

A job's text stays until it has ended, then only what became of it, for a day. `done` is written after the document is:
a job that was running when the server died is done again, which changes nothing if the document was stored already.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from beacon_memory.documents import utc_now
from beacon_memory.errors import ConflictError
from beacon_memory.storage.catalog.connections import SQLiteConnections
from beacon_memory.storage.files.durable import create_file, make_folder
from beacon_memory.storage.files.locks import claimed

from .refusals import RefusedError

__all__ = ["Job", "JobKind", "JobStatus", "Jobs"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    namespace TEXT NOT NULL,
    kind TEXT NOT NULL,
    document TEXT NOT NULL,
    status TEXT NOT NULL,
    work TEXT,
    digest TEXT NOT NULL,
    idempotency_key TEXT,
    tries INTEGER NOT NULL DEFAULT 0,
    becomes TEXT,
    result TEXT,
    error TEXT,
    created_at TEXT NOT NULL,
    started_at TEXT,
    ended_at TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS jobs_by_key ON jobs (namespace, idempotency_key);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, number);
CREATE INDEX IF NOT EXISTS jobs_by_document ON jobs (namespace, document, status);
"""
_KEPT = timedelta(days=1)  # for which what became of a job is remembered, and its idempotency key


class JobKind(StrEnum):
    """A thing that a job does to a document."""

    PUT = "put"
    APPEND = "append"


class JobStatus(StrEnum):
    """The state of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more will become of it."""
        return self in (JobStatus.DONE, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is on disk.

    work:    the text and how it is to be compressed; None once the job has ended.
    tries:   how often it was begun; more than once if the server died meanwhile.
    becomes: of an append, the sha256 of the whole text that the document has afterwards.
    result:  of a job that is done, the fields of `Added`.
    error:   of one that failed, as clients are told of it.
    """

    id: str
    namespace: str
    kind: JobKind
    document: str
    status: JobStatus
    work: Mapping[str, Any] | None
    tries: int
    becomes: str | None
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    created_at: str
    started_at: str | None
    ended_at: str | None


class Jobs:
    """The jobs of a store, for one server at a time; threads may share them.

    Raises ConflictError if another server has them.
    """

    def __init__(self, root: Path, most: int) -> None:
        folder = root / "server"
        make_folder(root)
        make_folder(folder, root)
        self._most = most
        self._held = contextlib.ExitStack()
        if not self._held.enter_context(claimed(folder / "lock")):
            raise ConflictError(f"another server works on the store {str(root)!r}; stop it, or name another store")
        create_file(folder / "jobs.sqlite3")
        self._database = SQLiteConnections(folder / "jobs.sqlite3")
        with self._database.transaction() as db:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                db.execute(statement)
            db.execute("UPDATE jobs SET status = 'queued' WHERE status = 'running'")

    def close(self) -> None:
        """Leave the jobs to the next server."""
        self._database.close()
        self._held.close()

    def add(
        self, namespace: str, kind: JobKind, document: str, work: Mapping[str, Any], idempotency_key: str | None = None
    ) -> tuple[Job, bool]:
        """Add a job; when this returns, it is on disk. Returns it, and whether it is new.

        idempotency_key: with the same one, the same work is added once; other work is refused with 422.
        Raises RefusedError with 429 if too many jobs of the namespace wait.
        """
        written = json.dumps(work, ensure_ascii=False)
        digest = hashlib.sha256(json.dumps([kind, document, work]).encode()).hexdigest()
        with self._database.transaction() as db:
            if idempotency_key is not None:
                known = db.execute(
                    "SELECT id, digest FROM jobs WHERE namespace = ? AND idempotency_key = ?",
                    [namespace, idempotency_key],
                ).fetchone()
                if known is not None and known[1] != digest:
                    raise RefusedError(
                        422,
                        "idempotency_key_reused",
                        "this Idempotency-Key was sent with another request; take a new one",
                    )
                if known is not None:
                    return self._require(known[0]), False
            waiting = db.execute(
                "SELECT count(*) FROM jobs WHERE namespace = ? AND status = 'queued'", [namespace]
            ).fetchone()[0]
            if waiting >= self._most:
                raise RefusedError(
                    429,
                    "too_many_jobs",
                    f"{waiting} documents wait to be compressed already; try again when some of them are",
                    headers={"Retry-After": "10"},
                )
            id = f"job_{secrets.token_hex(12)}"
            db.execute(
                "INSERT INTO jobs (id, namespace, kind, document, status, work, digest, idempotency_key, created_at) "
                "VALUES (?, ?, ?, ?, 'queued', ?, ?, ?, ?)",
                [id, namespace, kind, document, written, digest, idempotency_key, utc_now()],
            )
        return self._require(id), True

    def get(self, id: str, namespace: str) -> Job:
        """Return a job of a namespace; raises RefusedError with 404 if it has none of this id."""
        with self._database.use() as db:
            found = [*db.query("SELECT * FROM jobs WHERE id = ? AND namespace = ?", [id, namespace])]
        if not found:
            raise RefusedError(
                404, "job_not_found", f"there is no job {id[:100]!r}; what became of one is kept for a day"
            )
        return _job(found[0])

    def list(
        self, namespace: str, *, document: str | None = None, status: JobStatus | None = None, limit: int = 100
    ) -> builtins.list[Job]:
        """Return the latest jobs of a namespace, the newest first: all, or those of a document or in a state."""
        with self._database.use() as db:
            found = db.query(
                "SELECT * FROM jobs WHERE namespace = :namespace AND (:document IS NULL OR document = :document) "
                "AND (:status IS NULL OR status = :status) ORDER BY number DESC LIMIT :limit",
                {"namespace": namespace, "document": document, "status": status, "limit": limit},
            )
            return [_job(one) for one in found]

    def unfinished(self, namespace: str, document: str) -> builtins.list[Job]:
        """Return the jobs of a document that wait or run, in their order."""
        found = self.list(namespace, document=document, limit=self._most + 1)
        return [job for job in reversed(found) if not job.status.ended]

    def counts(self) -> dict[str, int]:
        """Count the jobs of all namespaces by their state."""
        with self._database.use() as db:
            return dict(db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())

    def take(self) -> Job | None:
        """Begin the job that has waited longest; None if none waits."""
        with self._database.transaction() as db:
            found = db.execute("SELECT id FROM jobs WHERE status = 'queued' ORDER BY number LIMIT 1").fetchone()
            if found is None:
                return None
            db.execute(
                "UPDATE jobs SET status = 'running', tries = tries + 1, started_at = coalesce(started_at, ?) "
                "WHERE id = ?",
                [utc_now(), found[0]],
            )
        return self._require(found[0])

    def expect(self, job: Job, becomes: str) -> Job:
        """Note which text an append is about to make of the document, so that it is not appended twice."""
        with self._database.transaction() as db:
            db.execute("UPDATE jobs SET becomes = ? WHERE id = ?", [becomes, job.id])
        return replace(job, becomes=becomes)

    def requeue(self, job: Job) -> None:
        """Let a job that was interrupted be begun anew."""
        with self._database.transaction() as db:
            db.execute("UPDATE jobs SET status = 'queued', tries = tries - 1 WHERE id = ?", [job.id])

    def end(
        self,
        job: Job,
        status: JobStatus,
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> bool:
        """Write what became of a job, and forget its text; False if it had ended already."""
        values = [status, *(None if one is None else json.dumps(one) for one in (result, error)), utc_now(), job.id]
        return self._finish(
            "UPDATE jobs SET status = ?, result = ?, error = ?, ended_at = ?, work = NULL "
            "WHERE id = ? AND status IN ('queued', 'running')",
            values,
        )

    def cancel_queued(self, job: Job) -> bool:
        """Cancel a job that waits; False if it does not wait any more."""
        return self._finish(
            "UPDATE jobs SET status = 'cancelled', work = NULL, ended_at = ? WHERE id = ? AND status = 'queued'",
            [utc_now(), job.id],
        )

    def _finish(self, sql: str, values: Sequence[object]) -> bool:
        """End a job, and forget those that ended a day ago: texts go from the database and its log, too."""
        before = (datetime.now(UTC) - _KEPT).isoformat(timespec="milliseconds")
        with self._database.use() as db:
            db.execute("PRAGMA secure_delete = ON")
            with self._database.transaction():
                changed = db.execute(sql, values).rowcount
                db.execute("DELETE FROM jobs WHERE ended_at < ?", [before])
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return bool(changed)

    def _require(self, id: str) -> Job:
        with self._database.use() as db:
            return _job(next(iter(db.query("SELECT * FROM jobs WHERE id = ?", [id]))))


def _job(record: Mapping[str, Any]) -> Job:
    values = {name: record[name] for name in Job.__dataclass_fields__}
    for name in ("work", "result", "error"):
        values[name] = None if values[name] is None else json.loads(values[name])
    return Job(**values | {"kind": JobKind(values["kind"]), "status": JobStatus(values["status"])})
