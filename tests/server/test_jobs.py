"""Jobs on disk: taken in order, done once, remembered for a day."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import httpx
import pytest
from servers import client, ended_job

from beacon_memory.errors import ConflictError
from beacon_memory.server.jobs import Job, JobKind, Jobs, JobStatus
from beacon_memory.server.refusals import RefusedError
from beacon_memory.server.run import RunningServer

SECRET = "the key is under the blue stone"


def add(jobs: Jobs, document: str = "a", namespace: str = "", key: str | None = None) -> Job:
    return jobs.add(namespace, JobKind.PUT, document, {"text": f"{document}: {SECRET}"}, key)[0]


def test_jobs_are_taken_in_their_order_and_again_after_the_server_died(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, most=10)
    first, second = add(jobs, "a"), add(jobs, "b")
    taken = jobs.take()
    assert taken is not None
    assert (taken.id, taken.status, taken.tries) == (first.id, JobStatus.RUNNING, 1)
    jobs.close()
    jobs = Jobs(tmp_path, most=10)
    again, other = jobs.take(), jobs.take()
    assert again is not None
    assert other is not None
    assert (again.id, again.tries, again.work, other.id) == (first.id, 2, first.work, second.id)
    assert jobs.take() is None
    jobs.requeue(again)
    once_more = jobs.take()
    assert once_more is not None
    assert once_more.tries == 2


def test_only_one_server_works_on_a_store(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, most=10)
    with pytest.raises(ConflictError, match="another server"):
        Jobs(tmp_path, most=10)
    jobs.close()
    Jobs(tmp_path, most=10).close()


def test_text_of_a_job_that_has_ended_is_nowhere(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, most=10)
    ended, cancelled = add(jobs, "a"), add(jobs, "b")
    assert jobs.cancel_queued(cancelled)
    assert not jobs.cancel_queued(cancelled)
    assert jobs.end(ended, JobStatus.DONE, result={"id": "a"})
    assert not jobs.end(ended, JobStatus.FAILED)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert jobs.get(ended.id, "").result == {"id": "a"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    jobs.close()


def test_job_under_which_the_server_died_three_times_is_given_up(fresh: RunningServer) -> None:
    service = fresh.service
    job, _ = service.jobs.add("", JobKind.PUT, "new", {"text": "x"})
    with service.jobs._database.transaction() as db:
        db.execute("UPDATE jobs SET tries = 3 WHERE id = ?", [job.id])
    service.compressing.wake()
    with client(fresh) as http:
        ended = ended_job(http, httpx.Response(202, headers={"location": f"/v1/jobs/{job.id}"}))
    assert (ended["status"], ended["error"]["code"]) == ("failed", "gave_up")  # type: ignore[index]


def test_jobs_of_one_namespace_are_not_those_of_another(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, most=2)
    mine = add(jobs, namespace="alice", key="k")
    assert add(jobs, namespace="alice", key="k").id == mine.id
    theirs = add(jobs, namespace="bob", key="k")
    assert theirs.id != mine.id
    with pytest.raises(RefusedError, match="no job"):
        jobs.get(mine.id, "bob")
    assert [job.id for job in jobs.list("bob")] == [theirs.id]
    add(jobs, "b", "alice")
    with pytest.raises(RefusedError, match="2 documents wait") as caught:
        add(jobs, "c", "alice")
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "10"})
    add(jobs, "c", "bob")
    jobs.close()


def test_what_became_of_a_job_is_forgotten_after_a_day(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, most=10)
    old, new = add(jobs, "a"), add(jobs, "b")
    for job in (old, new):
        jobs.end(job, JobStatus.DONE)
    with sqlite3.connect(tmp_path / "server" / "jobs.sqlite3") as db:
        db.execute("UPDATE jobs SET ended_at = '2020-01-01T00:00:00.000+00:00' WHERE id = ?", [old.id])
    jobs.end(add(jobs, "c"), JobStatus.DONE)
    assert {job.id for job in jobs.list("")} == {new.id, *(job.id for job in jobs.list("", document="c"))}
    jobs.close()
