from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from beacon_memory.errors import StoreError
from beacon_memory.storage.files import locks
from beacon_memory.storage.files.locks import alone, renew_in_forks, tidying, writing


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "TIDY_SECONDS", 0.1)
    monkeypatch.setattr(locks, "WRITE_SECONDS", 0.1)
    monkeypatch.setattr(locks, "PATIENT_SECONDS", 0)


def test_writers_work_side_by_side(tmp_path: Path) -> None:
    with writing(tmp_path), writing(tmp_path), writing(tmp_path / "new" / "folder"):
        pass


def test_nobody_tidies_while_somebody_writes(tmp_path: Path) -> None:
    with (
        writing(tmp_path),
        pytest.raises(StoreError, match=r"is being written to for more than .* s; try again"),
        tidying(tmp_path),
    ):
        pass
    with tidying(tmp_path):
        pass


def test_nobody_writes_or_tidies_while_somebody_tidies(tmp_path: Path) -> None:
    with tidying(tmp_path):
        with pytest.raises(StoreError, match="is being repaired for more than"), writing(tmp_path):
            pass
        with pytest.raises(StoreError, match="is being written to"), tidying(tmp_path):
            pass
    with writing(tmp_path):
        pass


def tidying_in_a_thread(folder: Path, order: list[str]) -> threading.Thread:
    """Begin to tidy up, as soon as nobody writes, and note then that it was done."""

    def tidy() -> None:
        with tidying(folder):
            order.append("tidied")

    thread = threading.Thread(target=tidy)
    thread.start()
    return thread


def test_an_error_inside_gives_the_lock_back(tmp_path: Path) -> None:
    for lock in (writing, tidying):
        with pytest.raises(KeyError), lock(tmp_path):
            raise KeyError
    with tidying(tmp_path):
        pass


def test_who_waits_goes_on_as_soon_as_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "TIDY_SECONDS", 30)
    order: list[str] = []

    with writing(tmp_path):
        waiting = tidying_in_a_thread(tmp_path, order)
        time.sleep(0.05)
        order.append("written")
    waiting.join(timeout=20)
    assert order == ["written", "tidied"]


def test_one_that_tidies_gets_its_turn_between_writers_that_leave_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "TIDY_SECONDS", 30)
    monkeypatch.setattr(locks, "WRITE_SECONDS", 30)
    ended, turns = threading.Event(), [0] * 6

    def write(number: int) -> None:
        while not ended.is_set():
            with writing(tmp_path):
                time.sleep(0.02)
                turns[number] += 1

    writers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for _ in range(3):
        with tidying(tmp_path):
            before = list(turns)
            time.sleep(0.1)
            assert turns == before
    ended.set()
    for writer in writers:
        writer.join()
    assert min(turns) > 0


def test_who_tidies_holds_up_nobody_while_one_writes_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"TIDY": 30, "WRITE": 30, "PATIENT": 30, "MOMENT": 0.1}.items():
        monkeypatch.setattr(locks, f"{name}_SECONDS", seconds)
    order: list[str] = []

    def write() -> None:
        with writing(tmp_path):
            order.append("written")

    with writing(tmp_path):
        waiting = tidying_in_a_thread(tmp_path, order)
        time.sleep(0.05)
        for _ in range(2):
            other = threading.Thread(target=write)
            other.start()
            other.join()
    waiting.join()
    assert order == ["written", "written", "tidied"]


def test_a_thread_that_writes_may_begin_to_write_again_though_somebody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "TIDY_SECONDS", 30)
    order: list[str] = []

    with writing(tmp_path):
        waiting = tidying_in_a_thread(tmp_path, order)
        time.sleep(0.1)
        with writing(tmp_path):
            order.append("written")
    waiting.join()
    assert order == ["written", "tidied"]


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from beacon_memory.storage.files.locks import writing\n"
        "with writing(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(StoreError, match="is being written to"), tidying(tmp_path):
        pass
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    with tidying(tmp_path):
        pass


def test_of_many_who_want_to_be_alone_each_is_and_the_file_is_gone_with_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WRITE_SECONDS", 60)
    monkeypatch.setattr(locks, "_CHECK_SECONDS", 0.001)
    inside, most = [0], []

    def enter() -> None:
        for _ in range(20):
            with alone(tmp_path / "lock", "it is held"):
                inside[0] += 1
                most.append(inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 80
    assert [*tmp_path.iterdir()] == []


def test_one_that_cannot_be_alone_in_time_is_told_so(tmp_path: Path) -> None:
    with (
        alone(tmp_path / "lock", "it is held"),
        pytest.raises(StoreError, match="it is held for more than"),
        alone(tmp_path / "lock", "it is held"),
    ):
        pass
    assert [*tmp_path.iterdir()] == []


def test_a_lock_that_cannot_be_opened_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "writers.lock").mkdir()
    with (
        pytest.raises(StoreError, match=r"writers\.lock cannot be opened: .*; a store must be writable"),
        writing(tmp_path),
    ):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_is_registered_is_renewed_in_a_fork_and_only_there() -> None:
    class Counter:
        renewed = 0

        def _renew(self) -> None:
            self.renewed += 1

    counter = Counter()
    renew_in_forks(counter)
    child = os.fork()
    if child == 0:
        os._exit(counter.renewed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert counter.renewed == 0
