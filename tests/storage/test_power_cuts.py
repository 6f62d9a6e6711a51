"""The power fails at any moment: nothing that was stored is lost, and nothing that was removed comes back."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from changes import CRASHING, Act, expired, full, put, two
from crashing import copied, everything, fork, mend, wait
from power_cuts import Disk, Names
from rounds.power import States, seen
from workload import State

from beacon_memory.storage.erasing import erase
from beacon_memory.storage.repair import verify
from beacon_memory.storage.store import MemoryStore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="follows a process as Linux lets it")

_OWN_MOUNTS, _PRIVATE, _UNMOUNTED = 0x20000, 0x44000, 11
CUTS = 4  # of each history, and as many for each of its steps


def delete(id: str) -> Act:
    return lambda store: store.delete(id)


def rename(id: str, new_id: str) -> Act:
    return lambda store: store.rename(id, new_id)


HISTORIES: dict[str, tuple[Act, Sequence[Act]]] = {
    **{name: (change.prepare, [change.act]) for name, change in CRASHING.items()},
    "two deletes": (two, [delete("doc"), delete("kept")]),
    "replaced, then deleted": (two, [put("doc", "2"), delete("doc"), put("new", "3")]),
    "renamed back": (two, [rename("doc", "new"), rename("new", "doc")]),
    "two evictions": (full, [put("new", "3"), put("newer", "4")]),
    "expired, then written": (expired, [MemoryStore.expire, put("new", "3")]),
    "deleted, then repaired and written": (two, [delete("doc"), mend, put("new", "3")]),
    "deleted, then erased": (two, [delete("doc"), erase]),
}


def record(disk: Disk, act: Act, kill_after: int | None = None) -> object:
    """Do something to a store in another process, which may be killed; returns what the store holds then."""
    try:
        disk.record(lambda: act(MemoryStore(disk.folder)), kill_after=kill_after)
    except PermissionError as error:
        pytest.skip(str(error))
    return everything(copied(disk.folder, disk.folder.with_name("copy")))


def repaired(folder: Path) -> object:
    """Repair a store, and return what it holds then."""
    with MemoryStore(folder) as whole:
        for name in whole.namespaces():
            with MemoryStore(folder, name) as store:
                mend(store)
                assert verify(store) == []
    return everything(folder)


@pytest.mark.parametrize("name", HISTORIES)
def test_a_power_cut_leaves_the_old_or_the_new_and_repair_lets_it_be(folder: Path, name: str) -> None:
    prepare, acts = HISTORIES[name]
    with MemoryStore(folder / "store") as store:
        prepare(store)
    states, ends = [everything(copied(store.folder, folder / "copy"))], [0]
    disk = Disk(folder / "store")
    for act in acts:
        states.append(record(disk, act))
        ends.append(len(disk.events))
    rng = random.Random(name)
    for _ in range(CUTS * (1 + len(acts))):
        moment = rng.choice(disk.moments)
        cut = disk.leave(moment, rng, folder / "cut")
        done = bisect_right(ends, moment) - 1
        found = everything(cut)
        assert found in states[done : done + (1 if moment == ends[done] else 2)]
        assert repaired(cut) == found


@pytest.mark.parametrize("name", ["put", "replacement", "delete", "rename", "eviction", "expire", "erase"])
def test_what_a_repair_left_after_a_kill_outlasts_a_power_cut(folder: Path, name: str) -> None:
    change, rng = CRASHING[name], random.Random(name)
    with MemoryStore(folder / "template") as store:
        change.prepare(store)
    disk = Disk(copied(store.folder, folder / "store"))
    record(disk, change.act)
    renamed = [at for at, event in enumerate(disk.events, 1) if isinstance(event, Names)]
    for at in rng.sample(renamed, min(len(renamed), 4)):
        disk = Disk(copied(store.folder, folder / "store"))
        record(disk, change.act, kill_after=at)
        mended = record(disk, mend)
        end = len(disk.events)
        later = record(disk, put("later", "9"))
        for moment in [end, *rng.choices(disk.moments[end:], k=3), len(disk.events)]:
            cut = disk.leave(moment, rng, folder / "cut")
            found = everything(cut)
            assert found in {end: [mended], len(disk.events): [later]}.get(moment, [mended, later])
            assert repaired(cut) == found


def test_what_is_stored_after_a_kill_outlasts_a_power_cut(folder: Path) -> None:
    """Whatever a killed process has made and not synced, such as folders, the next one relies on."""
    disk = Disk(folder / "above")

    def store(*, kill_after: int | None = None) -> object:
        disk.record(lambda: put("doc", "1")(MemoryStore(disk.folder / "store")), kill_after=kill_after)
        return everything(copied(disk.folder / "store", folder / "copy"))

    record(disk, lambda _: put("doc", "1")(MemoryStore(disk.folder / "store")))  # or the test is skipped
    named = {at: event.places for at, event in enumerate(disk.events, 1) if isinstance(event, Names)}
    folders = [at for at, places in named.items() if all("." not in name for _, name in places)]
    assert len(folders) == 3
    rng = random.Random(1)
    for at in folders:
        shutil.rmtree(disk.folder)
        disk = Disk(disk.folder)
        store(kill_after=at)
        stored = store()
        for _ in range(10):
            cut = disk.leave(len(disk.events), rng, folder / "cut") / "store"
            assert everything(cut) == stored
            assert repaired(cut) == stored


def with_ext4(folder: Path, act: Callable[[Path, Callable[[], Path]], None]) -> None:
    """Run an act in a process that sees a file system on an image, which commits nothing by itself for a long time.

    act: takes the folder of the file system, and a function that cuts the power: it returns a folder where another
    one is mounted, as it was on the disk at that moment. Skips the test where no image can be mounted.
    """
    image, places = folder / "image", [folder / "disk", folder / "after"]
    for place in places:
        place.mkdir()

    def mount(file: Path, place: Path) -> bool:
        return not subprocess.run(
            ["mount", "-o", "loop,commit=300", file, place], check=False, stderr=subprocess.DEVNULL
        ).returncode

    def cut() -> Path:
        subprocess.run(["umount", places[1]], check=False, stderr=subprocess.DEVNULL)
        shutil.copyfile(image, folder / "image after")
        assert mount(folder / "image after", places[1])
        return places[1]

    def run_mounted() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_OWN_MOUNTS) or libc.mount(b"none", b"/", None, _PRIVATE, None):
            os._exit(_UNMOUNTED)
        with image.open("wb") as file:
            file.truncate(32 << 20)
        made = subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image], check=False)
        if made.returncode or not mount(image, places[0]):
            os._exit(_UNMOUNTED)
        act(places[0], cut)

    code = wait(fork(run_mounted))
    if code == _UNMOUNTED:
        pytest.skip("no image can be mounted here")
    assert code == 0


@pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="makes a file system")
def test_on_ext4_what_was_removed_stays_away_and_what_was_stored_is_there(folder: Path) -> None:
    def act(disk: Path, cut: Callable[[], Path]) -> None:
        store = MemoryStore(disk / "store")
        states: States = {}
        for number in range(12):
            put(f"doc{number}", str(number))(store)
            states[f"doc{number}"] = State(str(number), str(number))
        with store.parts.catalog().connections.use() as db:
            # from now on the log is written to from its beginning again, so that its syncs take no names along
            assert db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0] == 0
        for number in range(0, 12, 2):
            if number % 3:
                store.delete(f"doc{number}")
            else:
                store.rename(f"doc{number}", f"renamed{number}")
                states[f"renamed{number}"] = states[f"doc{number}"]
            del states[f"doc{number}"]
            with MemoryStore(cut() / "store") as after:
                assert seen(after) == states
                mend(after)
                assert seen(after) == states

    with_ext4(folder, act)
