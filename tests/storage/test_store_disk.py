"""Full disks, and files that may not be read or written: an error says so, and the store stays as it was."""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import io
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from changes import CHANGES, Prepared, prepare, put, two
from crashing import copied, everything, fork, wait
from in_memory import folder_in_memory
from store_samples import change as change_catalog
from workload import State, look

from beacon_memory.errors import CorruptFileError, StoreError
from beacon_memory.storage.files import locks
from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

_REFUSED, _UNMOUNTED = 10, 11  # exit statuses
_DONE = ("created", "opened", "reached", "read", "written")
_SOMEBODY = 65534
_OWN_MOUNTS, _OWN_USERS, _PRIVATE = 0x20000, 0x10000000, 0x44000  # of Linux: unshare and mount


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that any user may reach, in memory where there is one."""
    path = folder_in_memory()
    path.chmod(0o755)
    yield path
    for one in [path, *path.rglob("*")]:
        if one.is_dir():
            one.chmod(0o755)
    shutil.rmtree(path)


@pytest.fixture
def prepared(folder: Path, request: pytest.FixtureRequest) -> Prepared:
    return prepare(folder, request.param)


def refused(act: Callable[[], object]) -> bool:
    """Whether an act ends with an error that says what the system refused, and not that anything is damaged."""
    try:
        act()
    except CorruptFileError:
        raise
    except StoreError as error:
        message = str(error)
    else:
        return False
    assert any(f"cannot be {word}" in message or f"could not be {word}" in message for word in _DONE), message
    return True


def in_a_process(act: Callable[[], object]) -> bool:
    """Whether what an act does, in a process of its own, was refused."""
    code = wait(fork(lambda: os._exit(_REFUSED if refused(act) else 0)))
    assert code in (0, _REFUSED)
    return code == _REFUSED


def check(folder: Path, prepared: Prepared, *, failed: bool, excused: frozenset[str] = frozenset()) -> None:
    """Nothing has changed if it failed, and it can be done now."""
    assert everything(folder) == (prepared.before if failed else prepared.after)
    with MemoryStore(folder) as store:
        assert {problem.kind for problem in verify(store)} <= excused
        if failed:
            prepared.act(store)
    assert everything(folder) == prepared.after


@pytest.mark.parametrize("prepared", CHANGES, indirect=True)
def test_what_finds_no_space_changes_nothing(folder: Path, prepared: Prepared) -> None:
    """Files may grow up to a limit, which stops a K/V file, a label, the log of the catalog or the catalog itself."""

    def act(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with MemoryStore(folder / "limited") as store:
            prepared.act(store)

    outcomes = set()
    for limit in (0, 100, 1500, 5000, 15_000, 40_000, 80_000, 1_000_000):
        limited = copied(prepared.template, folder / "limited")
        failed = in_a_process(lambda limit=limit: act(limit))
        check(limited, prepared, failed=failed)
        outcomes.add(failed)
    assert outcomes == {True, False}


class Failing:
    """Makes calls of the operating system fail from the one with a number on, or that one alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, code: int, *, lasting: bool) -> None:
        self.number, self.code, self.lasting = number, code, lasting
        self.calls = 0
        for module, name in (
            *((os, name) for name in ("open", "fsync", "replace", "mkdir", "chmod")),
            (io, "open"),
            (builtins, "open"),
        ):
            monkeypatch.setattr(module, name, self._failing(getattr(module, name)))

    @property
    def reached(self) -> bool:
        return self.calls >= self.number

    def _failing(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            self.calls += 1
            if self.calls == self.number or (self.lasting and self.calls > self.number):
                raise OSError(self.code, os.strerror(self.code), str(args[0]))
            return function(*args, **options)

        return call


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("prepared", CHANGES, indirect=True)
def test_whatever_call_fails_the_store_stays_as_it_was(
    folder: Path, prepared: Prepared, lasting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, reached = 0, True
    while reached:
        number += 1
        code = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)[number % 4]
        failing_folder = copied(prepared.template, folder / "failing")
        with monkeypatch.context() as patch, MemoryStore(failing_folder) as store:
            failing = Failing(patch, number, code, lasting=lasting)
            failed = refused(lambda: prepared.act(store))
        reached = failing.reached
        assert failed or not reached or everything(failing_folder) == prepared.after
        # a label that was written before the failure cannot be taken back where nothing can be written any more, and
        # the mark of a file must stay where that could come back
        excused = frozenset({"stale-label", "stale-temp"}) if lasting else prepared.excused
        check(failing_folder, prepared, failed=failed, excused=excused)
    assert number > 1


def with_open_files(spare: int, act: Callable[[], object]) -> None:
    """Run an act in a process that may open only so many files more."""
    handle, last = -1, max(int(one.name) for one in Path("/dev/fd").iterdir())
    while handle <= last:  # lower numbers that are free would count, too
        handle = os.open(os.devnull, os.O_RDONLY)
    os.close(handle)
    resource.setrlimit(resource.RLIMIT_NOFILE, (handle + spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    act()


def sound(store: MemoryStore) -> None:
    assert verify(store) == repair(store) == []


def _require(held: bool) -> None:
    assert held


USES = {
    "everything": lambda store: everything(store.root),
    "verify and repair": sound,
    "namespaces": lambda store: _require(store.namespaces() == ["", "other"]),
}


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files as Linux lets it")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("opened", [False, True])
def test_too_many_open_files_are_no_damage(folder: Path, use: str, opened: bool) -> None:
    store = MemoryStore(folder / "store")
    two(store)
    put("doc", "3")(store.within("other"))
    store.configure(quota=10**9)
    before = everything(store.root)

    def act() -> None:
        if not opened:
            store.close()
        USES[use](store)

    tried = [in_a_process(partial(with_open_files, spare, act)) for spare in range(16)]
    assert tried[0] or use == "namespaces"
    assert not tried[-1]
    sound(store)
    assert everything(store.root) == before
    store.close()


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files as Linux lets it")
@pytest.mark.parametrize("prepared", CHANGES, indirect=True)
def test_a_change_for_which_too_many_files_are_open_changes_nothing(folder: Path, prepared: Prepared) -> None:
    for spare in range(0, 12, 2):
        store = copied(prepared.template, folder / "store")
        act = partial(with_open_files, spare, partial(prepared.act, MemoryStore(store)))
        failed = in_a_process(act)
        check(store, prepared, failed=failed)


def with_a_small_disk(mount_point: Path, act: Callable[[], object]) -> None:
    """Run an act in a process that sees a disk of 1 MB in memory there; skips the test where none can be mounted."""
    mount_point.mkdir()

    def run() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        user, group = os.getuid(), os.getgid()
        if libc.unshare(_OWN_MOUNTS):
            if libc.unshare(_OWN_MOUNTS | _OWN_USERS):
                os._exit(_UNMOUNTED)
            for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
                Path("/proc/self", name).write_text(line)
        libc.mount(b"none", b"/", None, _PRIVATE, None)
        if libc.mount(b"none", os.fsencode(mount_point), b"tmpfs", 0, b"size=1m"):
            os._exit(_UNMOUNTED)
        act()

    code = wait(fork(run))
    if code == _UNMOUNTED:
        pytest.skip("no disk can be mounted here")
    assert code == 0


def fill(file: Path) -> None:
    with file.open("ab", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"0" * 4096)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a disk as Linux lets it")
def test_a_full_disk_loses_nothing_can_be_read_and_goes_on_when_it_has_room_again(folder: Path) -> None:
    disk = folder / "disk"

    def stays(store: MemoryStore, states: dict[str, State | None]) -> None:
        assert {row.id: look(store, row.id) for row in store.list()} == states
        assert store.totals().documents == len(states)

    def act() -> None:
        ballast = disk / "ballast"
        ballast.write_bytes(b"0" * 300_000)
        store = MemoryStore(disk / "store")
        states: dict[str, State | None] = {}
        while not refused(lambda: put(f"doc{len(states)}", str(len(states)))(store)):
            states[f"doc{len(states)}"] = State(str(len(states)), str(len(states)))
        assert len(states) > 3
        stays(store, states)
        assert verify(store) == []
        fill(disk / "filler")
        for change in (
            lambda: put("new", "7")(store),
            lambda: put("doc1", "7")(store),
            lambda: store.update("doc1", tags=["new"]),
            lambda: store.rename("doc1", "new"),
            lambda: store.convert("doc1", "int8"),
            lambda: store.delete("doc1"),
        ):
            assert refused(change)
            stays(store, states)
        store.close()
        stays(store, states)
        assert verify(store) == []
        ballast.unlink()
        store.delete("doc1")
        put("doc0", "9")(store)
        del states["doc1"]
        stays(store, states | {"doc0": State("9", "9")})
        assert verify(store) == []

    with_a_small_disk(disk, act)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a disk as Linux lets it")
def test_a_store_on_a_disk_that_others_filled_can_be_read(folder: Path) -> None:
    disk = folder / "disk"

    def act() -> None:
        with MemoryStore(disk / "store") as store:
            two(store)
        fill(disk / "filler")
        with MemoryStore(disk / "store") as store:
            for _ in range(2):
                assert (look(store, "kept"), look(store, "doc")) == (State("0", "0"), State("1", "1"))
                assert refused(lambda: put("new", "2")(store))
            (disk / "filler").unlink()
            put("new", "2")(store)
            assert len(store.list()) == 3
            assert verify(store) == []

    with_a_small_disk(disk, act)


def as_somebody(act: Callable[[], object]) -> None:
    """Run an act in a process that may do no more than others may."""

    def run() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(_SOMEBODY)
            os.setuid(_SOMEBODY)
        act()

    assert wait(fork(run)) == 0


def protect(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def reads_and_does_not_write(folder: Path) -> None:
    store = MemoryStore(folder)
    for _ in range(2):
        assert {row.id for row in store.list()} == {"kept", "doc"}
        assert (look(store, "kept"), look(store, "doc")) == (State("0", "0"), State("1", "1"))
        assert store.totals().documents == 2
        assert store.namespaces() == [""]
        assert store.get("doc").row.tags == ("tag1",)
        assert verify(store) == []
        for write in (
            lambda: put("new", "2")(store),
            lambda: put("doc", "2")(store),
            lambda: put("new", "2")(store.within("other")),
            lambda: store.update("doc", tags=["new"]),
            lambda: store.rename("doc", "new"),
            lambda: store.convert("doc", "int8"),
            lambda: store.delete("doc"),
            store.expire,
            lambda: store.configure(quota=10),
            lambda: repair(store),
        ):
            assert refused(write)
        store.close()


@pytest.mark.parametrize("left", ["closed", "open", "killed"])
def test_a_store_that_may_only_be_read_is_read_and_refuses_to_be_written(folder: Path, left: str) -> None:
    with MemoryStore(folder / "store") as store:
        two(store)
        assert store.convert("doc", "float32").precision == "float32"  # what is imported late, somebody cannot import
        verify(store)
        if left == "open":
            store.list()
            protect(store.folder)
            as_somebody(lambda: reads_and_does_not_write(store.folder))
            return
    before = everything(store.folder)
    if left == "killed":

        def die() -> None:
            MemoryStore(store.folder).update("doc", pinned=True)
            MemoryStore(store.folder).update("doc", pinned=False)
            os.kill(os.getpid(), signal.SIGKILL)

        assert wait(fork(die)) == -signal.SIGKILL
        assert list(store.folder.glob("*-wal"))
    protect(store.folder)
    as_somebody(lambda: reads_and_does_not_write(store.folder))
    for path in [store.folder, *store.folder.rglob("*")]:
        path.chmod(0o755)
    assert everything(store.folder) == before
    assert verify(store) == []


@pytest.mark.parametrize("locked", [True, False])
def test_verify_finds_in_a_store_that_may_only_be_read_what_it_finds_in_any(folder: Path, locked: bool) -> None:
    with MemoryStore(folder / "store") as store:
        two(store)
        kv = store.folder / store.row("doc").file
    kv.write_bytes(kv.read_bytes()[:-1])
    kv.with_suffix(".json").unlink()
    change_catalog(store, "INSERT INTO passages_fts(passages_fts) VALUES ('delete-all')")
    found = verify(store)
    store.close()
    assert {problem.kind for problem in found} == {"damaged-catalog", "damaged-file", "stale-label"}
    if not locked:
        (store.folder / "writers.lock").unlink()
    before = {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}
    protect(store.folder)

    def act() -> None:
        assert verify(MemoryStore(store.folder)) == found

    as_somebody(act)
    assert {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()} == before


def test_verify_of_a_store_that_may_only_be_read_waits_for_writers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "TIDY_SECONDS", 0.1)
    with MemoryStore(folder / "store") as store:
        two(store)

    def act() -> None:
        with pytest.raises(StoreError, match="is being written to"):
            verify(MemoryStore(store.folder))

    with locks.writing(store.folder):
        protect(store.folder)
        as_somebody(act)


def test_a_store_whose_cache_may_only_be_read_is_read(folder: Path) -> None:
    with MemoryStore(folder / "store", files=(folder / "files").as_uri()) as store:
        two(store)
    protect(folder)

    def act() -> None:
        ours = MemoryStore(store.folder)
        assert (look(ours, "kept"), look(ours, "doc")) == (State("0", "0"), State("1", "1"))
        assert verify(ours) == []

    as_somebody(act)


def test_a_store_that_may_not_be_entered_says_so(folder: Path) -> None:
    with MemoryStore(folder / "store") as store:
        two(store)
    store.folder.chmod(0)

    def act() -> None:
        closed = MemoryStore(store.folder)
        for read in (
            closed.list,
            lambda: closed.get("doc"),
            lambda: closed.text("doc"),
            lambda: closed.search("word1"),
            lambda: "doc" in closed,
            closed.totals,
            lambda: verify(closed),
            lambda: put("new", "2")(closed),
            lambda: closed.delete("doc"),
        ):
            assert refused(read)
        assert refused(lambda: MemoryStore(store.folder / "inner").list())
        assert refused(lambda: put("new", "2")(MemoryStore(store.folder / "inner")))
        assert refused(lambda: put("new", "2")(MemoryStore(folder / "another")))

    folder.chmod(0o555)
    as_somebody(act)
    folder.chmod(0o755)
    store.folder.chmod(0o755)
    assert (look(store, "kept"), look(store, "doc"), len(store.list())) == (State("0", "0"), State("1", "1"), 2)


def test_one_file_that_may_not_be_read_is_named_and_keeps_no_other_from_being_read(folder: Path) -> None:
    (folder / "store").mkdir()  # others may enter it
    with MemoryStore(folder / "store") as store:
        two(store)
        name = store.row("doc").file
    (store.folder / name).chmod(0)

    def act() -> None:
        ours = MemoryStore(store.folder)
        with pytest.raises(StoreError, match=name):
            ours.get("doc")
        assert refused(lambda: ours.get("doc"))
        assert look(ours, "kept") == State("0", "0")

    as_somebody(act)


def test_what_cannot_be_removed_is_reported_until_it_can(folder: Path) -> None:
    with MemoryStore(folder / "store") as store:
        two(store)
        kv = (store.folder / store.row("doc").file).parent
    for path in [store.folder, *store.folder.rglob("*")]:
        path.chmod(0o777)
    kv.chmod(0o555)

    def act() -> None:
        ours = MemoryStore(store.folder)
        ours.delete("doc")
        assert "doc" not in ours
        assert {problem.kind for problem in verify(ours)} == {"orphan-file"}
        assert not any(problem.mended for problem in repair(ours))
        assert refused(lambda: put("doc", "2")(ours))
        assert [row.id for row in ours.list()] == ["kept"]
        ours.close()

    as_somebody(act)
    kv.chmod(0o755)
    assert all(problem.mended for problem in repair(store))
    assert verify(store) == []
    assert list(kv.iterdir()) == []
