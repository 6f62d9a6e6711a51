"""Verifying and repairing a store on which others work all the time."""

from __future__ import annotations

import time
from pathlib import Path

from kv_samples import finish, start
from store_samples import put

from beacon_memory.storage.repair import repair, verify
from beacon_memory.storage.store import MemoryStore

WRITERS = 5

_WRITE = """
from beacon_memory.documents import Label
with MemoryStore(folder) as store:
    name, turn = os.getpid(), 0
    print("begun", flush=True)
    while not (folder.parent / "enough").exists():
        text = f"{TEXT} {name} {turn}"
        store.put(*sample(f"{name} {turn % 3}", text), text)
        store.update(f"{name} {turn % 3}", tags=[str(turn)])
        store.put(*sample("shared", text), text)
        if turn % 3 == 2:
            store.rename(f"{name} 1", f"{name} renamed")
            store.delete(f"{name} renamed")
        turn += 1
print(turn)
"""


def test_verify_and_repair_get_their_turn_between_steady_writers_and_find_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with MemoryStore(folder) as store:
        put(store)
        writers = [start(_WRITE, folder) for _ in range(WRITERS)]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "begun\n"
        try:
            for _ in range(3):
                assert verify(store) == []
                assert repair(store) == []
                time.sleep(0.1)
        finally:
            (tmp_path / "enough").touch()
            told = [finish(writer) for writer in writers]
        assert [(status, errors) for status, _, errors in told] == [(0, "")] * WRITERS
        assert min(int(turns) for _, turns, _ in told) > 1
        assert verify(store) == []
